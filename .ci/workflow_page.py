"""Writes docs/workflows.md: each workflow with a screenshot, its note and its nodes.

.venv/bin/python .ci/workflow_page.py                 # the text
.venv/bin/python .ci/workflow_page.py build/screenshots/default/en-litegraph   # and the screenshots of the browser test
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cards import TITLES
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGE, SCREENSHOTS = ROOT / "docs" / "workflows.md", ROOT / "docs" / "images" / "workflows"
WIDTH = 1000  # pixels, of a screenshot on the page
HEAD = """\
# Workflows

[Back to the README](../README.md). In ComfyUI: *Workflow \u2192 Browse Templates \u2192 ComfyUI-ZImage*, or drag a file
onto the window. Those of the nano model run at once; the others offer the files that are missing. App mode shows
prompt, size and seed only. `workflows/api/` holds the same as prompts for `POST /prompt`.
"""


def text() -> str:
    """The page."""
    contents = "\n".join(f"- [{title}](#{anchor(title)})" for title in TITLES.values())
    return "\n".join([HEAD, contents, *map(section, TITLES.items())]) + "\n"


def section(workflow: tuple[str, str]) -> str:
    api, title = workflow
    graph = json.loads((ROOT / "workflows" / f"{title}.json").read_text(encoding="utf-8"))
    (note,) = (node for node in graph["nodes"] if node["type"] == "MarkdownNote")
    nodes = dict.fromkeys(node["type"] for node in graph["nodes"] if node["type"] != "MarkdownNote")
    return "\n".join(
        [
            f"\n## {title}\n",
            f"![The graph of {title}](images/workflows/{slug(title)}.jpg)\n",
            f"{note['widgets_values'][0]}\n",
            f"Files: [graph](../workflows/{quote(title)}.json), [API](../workflows/api/{api}_api.json). "
            f"Nodes: {', '.join(map(linked, nodes))}.",
        ]
    )


def linked(node: str) -> str:
    help_page = ROOT / "web" / "docs" / node / "en.md"
    return f"[{node}](../web/docs/{node}/en.md)" if help_page.is_file() else node


def slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def shrink(screenshots: Path) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for title in TITLES.values():
        shot: Any = Image.open(screenshots / f"{title}.png").convert("RGB")
        height = round(shot.height * WIDTH / shot.width)
        shot = shot.resize((WIDTH, height), Image.Resampling.LANCZOS)
        shot.save(SCREENSHOTS / f"{slug(title)}.jpg", quality=80, optimize=True)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        shrink(Path(folder))
    PAGE.write_text(text(), encoding="utf-8")
