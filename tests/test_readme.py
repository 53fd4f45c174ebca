"""What the README and docs/ say exists, exists; the nodes' pages are their schemas; explained errors are raised."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from .helpers import NANO, ROOT, tracked

README = ROOT / "README.md"
HELP = sorted((ROOT / "web" / "docs").glob("*/*.md"))  # <node id>/<language>.md
PAGES = [README, *sorted((ROOT / "docs").glob("**/*.md")), *(page for page in HELP if page.stem == "en")]
TRANSLATED = [page for page in HELP if page.stem != "en"]
OTHERS = [*TRANSLATED, ROOT / "CHANGELOG.md", ROOT / "nano" / "README.md"]
TEXT = {page: page.read_text(encoding="utf-8") for page in [*PAGES, *OTHERS]}
NODE_PAGES = {page.parent.name: page for page in HELP if page.stem == "en"}
SOURCES = "".join(
    path.read_text(encoding="utf-8") for path in [*ROOT.glob("zimage_core/**/*.py"), *ROOT.glob("nodes/**/*.py")]
)


def section(page: str, title: str) -> str:
    return TEXT[ROOT / page].split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table(text: str) -> list[list[str]]:
    """The cells of the first table's rows, without its head."""
    return tables(text)[0]


def tables(text: str) -> list[list[list[str]]]:
    found = []
    for head, lines in re.findall(r"^(\|.+)\n\|[-:| ]+\|\n((?:\|.+\n?)*)", text, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in lines.splitlines()]
        assert all(len(row) == head.count("|") - 1 for row in rows), head
        found.append(rows)
    return found


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
            yield unquote(path), anchor


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
            stem = f"{name.removesuffix('_api')}_api"
            assert (ROOT / "workflows" / "api" / f"{stem}.json").is_file(), f"{name} in {page}"


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


OWN_TYPES = {"CROP": "ZIMAGE_CROP"}  # by their names in the sources


def _kind(call: ast.Call, role: str) -> str:
    kind, what = ast.unparse(call.func).removeprefix("io.").split(".")
    assert what == role
    return OWN_TYPES.get(kind, kind.upper())


def _inputs(node: ast.expr, helpers: dict[str, ast.FunctionDef]) -> Iterator[dict]:
    if isinstance(node, ast.List):
        for item in node.elts:
            yield from _inputs(item, helpers)
    elif isinstance(node, ast.Starred):
        yield from _inputs(node.value, helpers)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):  # a function that makes some of them
        (returned,) = [item for item in ast.walk(helpers[node.func.id]) if isinstance(item, ast.Return)]
        for declared in _inputs(returned.value, helpers):
            yield {**declared, "name": ast.literal_eval(node.args[0])} if declared["name"] is None else declared
    else:
        arguments = {keyword.arg: keyword.value for keyword in node.keywords}
        read = {name: ast.literal_eval(value) for name, value in arguments.items() if _is_literal(value)}
        yield {**read, "name": getattr(node.args[0], "value", None), "kind": _kind(node, "Input")}


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


SCHEMAS = schemas()


def test_node_table_is_the_packs():
    """And each row leads to the node's page."""
    listed = re.findall(r"^\| \[.+\]\(web/docs/(\w+)/en\.md\) `(ZImage\w+)` \|", section("README.md", "Nodes"), re.M)
    declared = re.findall(r'node_id="(ZImage\w+)"', SOURCES)
    assert sorted(name for _, name in listed) == sorted(declared) and len(declared) == 11
    assert all(page == name for page, name in listed)
    assert sorted(NODE_PAGES) == sorted(SCHEMAS) == sorted(declared)


@pytest.mark.parametrize("node", SCHEMAS)
def test_page_of_a_node_tells_its_inputs(node):
    """Names, types, defaults and ranges, in the order of the node."""
    rows = table(section(f"web/docs/{node}/en.md", "Inputs"))
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
    rows = table(section(f"web/docs/{node}/en.md", "Outputs"))
    assert [row[1] for row in rows] == SCHEMAS[node][1]


def test_help_is_there_in_each_language_that_the_nodes_speak():
    languages = {"en", *(path.name for path in (ROOT / "locales").iterdir())}
    assert {*HELP} == {ROOT / "web" / "docs" / node / f"{language}.md" for node in SCHEMAS for language in languages}


@pytest.mark.parametrize("page", HELP, ids=lambda page: page.relative_to(ROOT / "web" / "docs").as_posix())
def test_help_reads_in_the_browser(page):
    """Which would look for linked files beside itself; and no line of HTML."""
    assert "](" not in TEXT[page] and not re.search(r"<\w+[ />]", TEXT[page])


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.relative_to(ROOT / "web" / "docs").as_posix())
def test_translated_help_tells_what_the_english_tells(page):
    """Sections, inputs under the names that the browser shows, types, defaults, numbers, errors, outputs."""
    node, text, english = page.parent.name, TEXT[page], TEXT[NODE_PAGES[page.parent.name]]
    names = json.loads((ROOT / "locales" / page.stem / "nodeDefs.json").read_text(encoding="utf-8"))[node]
    assert text.startswith(f"# {names['display_name']}\n")
    assert f"[{names['display_name']}]" in text.split("```")[1]
    assert text.count("\n## ") == english.count("\n## ") and text.count("\n- ") == english.count("\n- ")
    (inputs, outputs, *_, errors), (inputs_en, outputs_en, *_, errors_en) = tables(text), tables(english)
    for row, row_en in zip(inputs, inputs_en, strict=True):
        key = row_en[0].strip("`")
        assert row[0] == f"{names['inputs'][key]['name']} `{key}`"
        assert (re.match(r"\w+", row[1], re.ASCII)[0], row[2]) == (row_en[1].split(",")[0], row_en[2]), key
        assert ("," in row_en[1]) == (len(row[1]) > len(row_en[1].split(",")[0])), key  # optional
    assert [row[1] for row in outputs] == [row[1] for row in outputs_en]
    assert [row[0] for row in outputs] == [told["name"] for told in names["outputs"].values()]
    assert [code(row[0]) for row in errors] == [code(row[0]) for row in errors_en]
    for part, part_en in zip(text.split("\n## "), english.split("\n## "), strict=True):
        assert {*re.findall(NUMBERS, part)} == {*re.findall(NUMBERS, part_en)}


NUMBERS = r"\d+(?:\.\d+)?"


def code(cell: str) -> str:
    """The first that a cell holds in backticks."""
    return re.match(r"(`+) ?(.+?) ?\1", cell)[2]


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
    sources = re.sub(r'"\s*\n\s*f?["\']', "", SOURCES)  # join the lines of long messages
    explained = table(TEXT[ROOT / "docs" / "troubleshooting.md"])
    assert len(explained) >= 15
    for page in NODE_PAGES.values():
        explained = explained + table(section(page.relative_to(ROOT).as_posix(), "Errors"))
    for message in (code(row[0]) for row in explained):
        parts = re.split(
            r"…|\d+(?:\.\d+)?(?:x\d+)?|[`\\]|\b(?:config.json|transformer|positive|negative|latent)\b", message
        )
        for part in parts:
            words = part.strip(" :();,/")
            if len(words) > 12:
                assert words in sources, f"{words!r} of {message!r}"


EXAMPLES = [page for page in TEXT if "```python" in TEXT[page]]


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_of_python_run(page, tmp_path, monkeypatch, control_file):
    """On the nano model, a CPU, and at a size and a number of steps that take no time."""
    import torch

    from zimage_core.pipeline import ZImagePipeline

    from_pretrained, generate = ZImagePipeline.from_pretrained, ZImagePipeline.generate

    def small(pipe, prompt, **settings):
        size = {} if "image" in settings else {"width": 32, "height": 32}
        return generate(pipe, prompt, **{**settings, **size, "steps": 1})

    def here(path, **settings):
        inspect.signature(from_pretrained).bind(path, **settings)
        return from_pretrained(path)

    monkeypatch.setattr(ZImagePipeline, "from_pretrained", here)
    monkeypatch.setattr(ZImagePipeline, "generate", small)
    monkeypatch.chdir(tmp_path)
    for name in ("nano/snapshot", "models/Z-Image-Turbo"):
        Path(name).parent.mkdir()
        Path(name).symlink_to(NANO)
    Path("union.safetensors").symlink_to(control_file)
    given = {"pipe": from_pretrained(NANO), "house": torch.rand(1, 3, 32, 32), "edges": torch.rand(1, 3, 32, 32)}
    given["door"] = (given["house"][:, :1] > 0.5).float()
    for example in re.findall(r"```python\n(.*?)```", TEXT[page], flags=re.DOTALL):
        Path("example.py").write_text(example, encoding="utf-8")
        names = runpy.run_path("example.py", given)
        assert names["image"].shape == (1, 3, 32, 32)


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


def test_words_in_code_are_those_of_the_field():
    """In names, comments and docstrings; a `host` is any program around `zimage_core`, ComfyUI has a name."""
    others = r"colour|neighbour|behaviour|dialect|matrix product|(?:quanti|recogni|normali|optimi)s(?:e|ed|ing)\b"
    others += r"|\bthe_host|\bthe hosts?\b|[^a-z]pictures?\b"
    said_as_data = {"nano/captions.py", "tests/test_readme.py"}  # what people write in prompts, and these words
    names = tracked("*.py", "*.js") - said_as_data
    assert len(names) > 300
    for name in sorted(names):
        found = re.search(others, (ROOT / name).read_text(encoding="utf-8"), flags=re.IGNORECASE)
        assert not found, f"{found[0]!r} in {name}"
