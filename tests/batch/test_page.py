"""docs/batch.md: its example runs, its options, columns and fields are the command's."""

from __future__ import annotations

import re
import shlex

from PIL import Image

from zimage_core.__main__ import _parser, main
from zimage_core.batch.names import FIELDS
from zimage_core.batch.results import TYPES
from zimage_core.batch.rows import COLUMNS

from ..helpers import ROOT

PAGE = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")


def part(title: str) -> str:
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_example_makes_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(PAGE.split("```jsonl\n")[1].split("```")[0])
    program, *options = shlex.split(PAGE.split("```\npython -m ")[1].split("\n```")[0])
    assert program == "zimage_core" and main([*options, "--cpu", "--quiet"]) == 0
    made = {path.name: Image.open(path) for path in (tmp_path / "images").glob("*.png")}
    assert {*made} == {"000001_7.png", "000002_1.png", "000002_2.png", "000002_3.png", "000003_4.png"}
    assert made["000003_4.png"].size == (64, 96) and "five images" in PAGE


def test_options_columns_and_fields_are_those_of_the_page():
    (commands,) = [action for action in _parser()._actions if action.choices]
    declared = {option for action in commands.choices["batch"]._actions for option in action.option_strings}
    named = {*re.findall(r"`(--?[\w-]+)`", part("Options"))}
    named |= {*re.findall(r"^\| `(--ray[\w-]*)`", part("On a cluster"), flags=re.MULTILINE)}
    assert named == declared - {"-h", "--help"}
    columns = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", part("The file"), flags=re.MULTILINE)
    assert {name for cell in columns for name in re.findall(r"\w+", cell)} == {*COLUMNS}
    assert {*re.findall(r"`\{(\w+)\}`", part("Names"))} == {*FIELDS}
    assert {*TYPES} <= {*re.findall(r"`(\w+)`", part("Going on"))}
