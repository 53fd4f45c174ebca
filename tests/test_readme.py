"""What the README and docs/ say exists, exists; the nodes' pages are their schemas; explained errors are raised."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from .helpers import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("**/*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "nano" / "README.md"]}
NODE_PAGES = {page.stem: page for page in PAGES if page.parent.name == "nodes"}
SOURCES = "".join(
    path.read_text(encoding="utf-8") for path in [*ROOT.glob("zimage_core/**/*.py"), *ROOT.glob("nodes/**/*.py")]
)


def section(page: str, title: str) -> str:
    return TEXT[ROOT / page].split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table(text: str) -> list[list[str]]:
    """The cells of the first table's rows, without its head."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert set(rows[1]) <= set("|-: ")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


# Files and links


def test_every_room_exists_and_none_of_the_core_is_left_out():
    folder, named, last = ROOT, {}, ROOT
    for line in TEXT[ROOT / "docs" / "files.md"].split("```")[1].strip().splitlines():
        name, _, told = line.strip().partition(" ")
        if line.startswith("    "):  # goes on from the line above
            named[last] += " " + line.strip()
            continue
        folder = folder if line.startswith(" ") else ROOT / name
        last = folder / name if line.startswith(" ") else folder
        assert last.exists(), name
        named[last] = told
    core = ROOT / "zimage_core"
    rooms = {path.parent for path in core.glob("*/__init__.py")}
    assert {path for path in named if path.parent == core} == rooms | {*core.glob("*.py")} - {core / "__init__.py"}
    for room in [*rooms, ROOT / "nodes", ROOT / "nodes" / "bridge"]:
        files = {file.stem for file in room.glob("[!_]*.py")}
        assert not files - {*re.findall(r"\w+", named[room])}, room


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(target, anchor) of those that lead to files."""
    for target in re.findall(r"\]\(([^)]+)\)", TEXT[page]):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXT, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        found = {(page.parent / path).resolve() for path, _ in links(page) if path.endswith(".md")}
        waiting += [target for target in found & {*PAGES} if target not in reached]
    assert reached == {*PAGES}


def test_workflows_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"\bzimage_(?:nano|turbo|base)_\w+", TEXT[page]):
            assert (ROOT / "workflows" / f"{name}.json").is_file(), f"{name} in {page}"


def test_the_readme_is_short_and_says_early_what_was_not_done():
    assert len(TEXT[README].splitlines()) <= 170
    assert "No image with the real Z-Image weights was made" in "".join(TEXT[README].splitlines()[:20])


# Nodes


Schema = tuple[list[dict], list[str]]  # inputs in order with the arguments of each; types of the outputs


def schemas() -> dict[str, Schema]:
    """node id -> its schema, from the sources of `nodes/` without importing them."""
    found = {}
    for path in ROOT.glob("nodes/*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        helpers = {item.name: item for item in module.body if isinstance(item, ast.FunctionDef)}
        for call in ast.walk(module):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                outputs = [_kind(item, "Output") for item in given["outputs"].elts]
                found[given["node_id"].value] = ([*_inputs(given["inputs"], helpers)], outputs)
    return found


def _kind(call: ast.Call, role: str) -> str:
    io, kind, what = ast.unparse(call.func).split(".")
    assert (io, what) == ("io", role)
    return kind.upper()


def _inputs(node: ast.expr, helpers: dict[str, ast.FunctionDef]) -> Iterator[dict]:
    if isinstance(node, ast.List):
        for item in node.elts:
            yield from _inputs(item, helpers)
    elif isinstance(node, ast.Starred):
        yield from _inputs(node.value, helpers)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):  # a function that makes some of them
        (returned,) = [item for item in ast.walk(helpers[node.func.id]) if isinstance(item, ast.Return)]
        yield from _inputs(returned.value, helpers)
    else:
        arguments = {keyword.arg: keyword.value for keyword in node.keywords}
        read = {name: ast.literal_eval(value) for name, value in arguments.items() if _is_literal(value)}
        yield {**read, "name": node.args[0].value, "kind": _kind(node, "Input")}


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


SCHEMAS = schemas()


def test_node_table_is_the_packs():
    """And each row leads to the node's page."""
    listed = re.findall(r"^\| \[.+\]\(docs/nodes/(\w+)\.md\) `(ZImage\w+)` \|", section("README.md", "Nodes"), re.M)
    declared = re.findall(r'node_id="(ZImage\w+)"', SOURCES)
    assert sorted(name for _, name in listed) == sorted(declared) and len(declared) == 8
    assert all(page == name for page, name in listed)
    assert sorted(NODE_PAGES) == sorted(SCHEMAS) == sorted(declared)


@pytest.mark.parametrize("node", SCHEMAS)
def test_page_of_a_node_tells_its_inputs(node):
    """Names, types, defaults and ranges, in the order of the node."""
    rows = table(section(f"docs/nodes/{node}.md", "Inputs"))
    inputs, _ = SCHEMAS[node]
    assert [row[0] for row in rows] == [f"`{declared['name']}`" for declared in inputs]
    for (name, kind, default, span, told), declared in zip(rows, inputs, strict=True):
        assert kind == declared["kind"] + (", optional" if declared.get("optional") else ""), name
        if "default" in declared:
            written = str(declared["default"])
            assert default == (written.lower() if isinstance(declared["default"], bool) else written), name
        if "min" in declared:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", span)]
            assert numbers == [float(declared[key]) for key in ("min", "max", "step") if key in declared], name
        assert "display_name" not in declared or declared["display_name"] in told, name
        assert told, name


@pytest.mark.parametrize("node", SCHEMAS)
def test_page_of_a_node_tells_its_name_place_and_outputs(node):
    text = TEXT[NODE_PAGES[node]]
    (title,) = re.findall(rf'node_id="{node}",\s+display_name="(.+?)"', SOURCES)
    assert text.startswith(f"# {title}\n")
    graph = text.split("```")[1]
    assert f"[{title}]" in graph and "->" in graph
    rows = table(section(f"docs/nodes/{node}.md", "Outputs"))
    assert [row[1] for row in rows] == SCHEMAS[node][1]


# Commands, errors, examples


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    mentioned = {name for page in PAGES for name in re.findall(r"(?:`|^)make ([\w-]+)", TEXT[page], flags=re.MULTILINE)}
    assert {"demo", "test", "check", "serve", "bench", "bench-gpu"} <= mentioned <= {*targets}


def test_options_of_the_command_line_are_the_parsers():
    from zimage_core.__main__ import _parser

    (commands,) = [action for action in _parser()._actions if action.choices]
    declared = {
        option for action in commands.choices["generate"]._actions for option in action.option_strings
    } - {"-h", "--help"}  # fmt: skip
    rows = table(TEXT[ROOT / "docs" / "command-line.md"])
    assert {option for row in rows for option in re.findall(r"`(--?[\w-]+)", row[0])} == declared


def test_explained_errors_are_raised():
    """Each text between the placeholders, numbers and names of an explained error is somewhere in the code."""
    code = re.sub(r'"\s*\n\s*f?["\']', "", SOURCES)  # join the lines of long messages
    text = TEXT[ROOT / "docs" / "troubleshooting.md"]
    rows = re.findall(r"^\| `+ ?(.+?) ?`+ (?:\(.*\) )?\|", text, flags=re.MULTILINE)
    assert len(rows) == len(table(text)) >= 15
    for message in rows:
        parts = re.split(
            r"…|\d+(?:\.\d+)?(?:x\d+)?|[`\\]|\b(?:config.json|transformer|positive|negative|latent)\b", message
        )
        for part in parts:
            words = part.strip(" :();,/")
            if len(words) > 12:
                assert words in code, f"{words!r} of {message!r}"


def test_the_library_example_is_the_api(tmp_path):
    from zimage_core.pipeline import ZImagePipeline

    example = TEXT[ROOT / "docs" / "library.md"].split("```python")[1].split("```")[0]
    example = example.replace("nano/snapshot", str(ROOT / "nano" / "snapshot"))
    script = tmp_path / "example.py"
    script.write_text(example.replace("width=128, height=128", "width=32, height=32, steps=1"), encoding="utf-8")
    names = runpy.run_path(str(script))
    assert names["image"].shape == (1, 3, 32, 32)
    assert isinstance(names["pipe"], ZImagePipeline)


# Words


def test_words_are_those_of_the_field():
    """US spelling, and one word for one thing; what code says itself stands in backticks."""
    others = (
        r"colour\w*|grey|licence|(?:quanti|recogni|normali)s\w+|neighbour\w*|behaviour"
        r"|pictures?|dialects?|matrix products?|hosts?"
    )
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        prose = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "", TEXT[page], flags=re.DOTALL)
        found = re.search(rf"\b(?:{others})\b", prose, flags=re.IGNORECASE)
        assert not found, f"{found[0]!r} in {page}"
