"""What the README says exists, exists; the errors it explains are errors that the code raises."""

from __future__ import annotations

import re

from .helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = "".join(
    path.read_text(encoding="utf-8") for path in [*ROOT.glob("zimage_core/**/*.py"), *ROOT.glob("nodes/**/*.py")]
)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_every_room_exists_and_none_of_the_core_is_left_out():
    folder, named = ROOT, {}
    for line in section("The files").split("```")[1].strip().splitlines():
        name, _, told = line.strip().partition(" ")
        folder = folder if line.startswith(" ") else ROOT / name
        path = folder / name if line.startswith(" ") else folder
        assert path.exists(), name
        named[path] = told
    core = ROOT / "zimage_core"
    rooms = {path.parent for path in core.glob("*/__init__.py")}
    assert {path for path in named if path.parent == core} == rooms | {*core.glob("*.py")} - {core / "__init__.py"}
    for room in rooms:
        left_out = [file.stem for file in room.glob("[!_]*.py") if file.stem not in named[room]]
        assert not left_out, room


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_node_table_is_the_packs():
    listed = re.findall(r"`(ZImage\w+)` \|", section("Nodes"))
    declared = re.findall(r'node_id="(ZImage\w+)"', SOURCES)
    assert sorted(listed) == sorted(declared) and len(declared) == 8


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    mentioned = re.findall(r"(?:`|^)make (\w+)", section("Two commands"), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(mentioned) <= set(targets)


def test_explained_errors_are_raised():
    """Each text between the placeholders, numbers and names of an explained error is somewhere in the code."""
    code = re.sub(r'"\s*\n\s*f?["\']', "", SOURCES)  # join the lines of long messages
    rows = re.findall(r"^\| `+ ?(.+?) ?`+ (?:\(.*\) )?\|", section("Troubleshooting"), flags=re.MULTILINE)
    assert len(rows) >= 9
    for message in rows:
        parts = re.split(
            r"…|\d+(?:\.\d+)?(?:x\d+)?|[`\\]|\b(?:config.json|transformer|positive|negative|latent)\b", message
        )
        for part in parts:
            words = part.strip(" :();,/")
            if len(words) > 12:
                assert words in code, f"{words!r} of {message!r}"


def test_the_library_example_is_the_api():
    from zimage_core.pipeline import ZImagePipeline

    example = section("The pipeline in five lines").split("```python")[1].split("```")[0]
    example = example.replace("nano/snapshot", str(ROOT / "nano" / "snapshot"))
    names: dict = {}
    exec(example.replace("width=128, height=128", "width=32, height=32, steps=1"), names)
    assert names["image"].shape == (1, 3, 32, 32)
    assert isinstance(names["pipe"], ZImagePipeline)
