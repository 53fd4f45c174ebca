"""The journal and the folder: nothing is lost, overwritten or written twice, whatever ended the run before."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from ..helpers import ROOT
from .making import SMALL, Run

PROMPTS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path, PROMPTS, *SMALL, "--batch-size", "1")


def test_a_line_for_each_image(run, capsys):
    assert run() == 0
    assert capsys.readouterr().out.startswith("3 of 3 images done (3 of 3 rows), ")
    lines = run.lines()
    assert [list(line) for line in lines] == [
        ["row", "image", "file", "seed", "seconds", "status", "error", "key"]
    ] * 3  # fmt: skip
    for number, (line, prompt) in enumerate(zip(lines, PROMPTS, strict=True)):
        assert line["row"] == number + 1 and line["image"] == 1 and line["seed"] == number and line["seconds"] > 0
        assert (line["status"], line["error"], line["file"]) == ("done", None, f"00000{number + 1}_{number}.png")
        told = Image.open(run.out / line["file"]).text["parameters"]
        assert told == (
            f"{prompt}\nSteps: 2, Sampler: Euler, CFG scale: 1, Seed: {number}, Size: 32x32, Model: Z-Image-Nano, "
            f"Key: {line['key']}"
        )
    assert sorted(path.name for path in run.out.iterdir() if path.suffix != ".png") == [
        ".results.lock",
        "results.jsonl",
    ]


def test_the_same_command_makes_what_is_missing(run, capsys):
    assert run() == 0
    made, text = run.images(), run.journal.read_text()
    assert run() == 0 and run.journal.read_text() == text  # nothing was to be done
    (run.out / "000002_1.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in run.out.glob("*.png")}
    assert run() == 0 and run.images() == made
    assert [line["row"] for line in run.lines()] == [1, 2, 3, 2]
    assert all((run.out / name).stat().st_mtime_ns == time for name, time in before.items())


def test_a_torn_last_line_is_cut_off_and_told(run, capsys):
    assert run() == 0
    made, text = run.images(), run.journal.read_bytes()
    lines = text.splitlines(keepends=True)
    for torn in (lines[2][:-1], lines[2][:20], b"\xc3"):
        run.journal.write_bytes(b"".join(lines[:2]) + torn)
        assert run() == 0
        assert f"the last line of results.jsonl was unfinished ({len(torn)} bytes)" in capsys.readouterr().err
        assert [line["row"] for line in run.lines()] == [1, 2, 3] and run.images() == made
        assert run.lines()[2]["seconds"] == 0  # its image was there, and not made again


GOOD = (
    '{"row": %d, "image": 1, "file": "%s", "seed": 0, "seconds": 1.5, "status": "done", "error": null, "key": "0123"}'
)


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"row": 1', "line 2 is damaged"),
        ("", "line 2 is damaged"),
        ("[]", "line 2 is damaged (expected an object of row, image"),
        ('{"row": 1}', "expected an object of row, image"),
        ("ROW", "row is '1'"),
        ("STATUS", "status is 'done' and file None"),
    ],
)
def test_a_damaged_line_in_the_middle_is_an_error(run, capsys, line, words):
    first = GOOD % (1, "000001_0.png")
    second = GOOD % (2, "000002_1.png")
    run.out.mkdir()
    bad = {"ROW": first.replace('"row": 1', '"row": "1"'), "STATUS": first.replace('"000001_0.png"', "null")}
    text = "\n".join([first, bad.get(line, line), second, ""])
    run.journal.write_text(text)
    assert run() == 2
    told = capsys.readouterr().err
    assert words in told and "delete this line" in told and run.journal.read_text() == text


def test_what_a_killed_run_left_half_written_is_removed(run):
    (run.out / "sub").mkdir(parents=True)
    for place in (run.out / ".zimage-0123.half", run.out / "sub" / ".zimage-4567.half", run.out / "mine.half"):
        place.write_text("half")
    assert run("--name", "sub/{row}.png") == 0
    assert [path.name for path in run.out.rglob("*.half")] == ["mine.half"]


def test_changed_rows_are_refused_and_made_again_when_told_to(run, capsys):
    assert run() == 0
    made = run.images()
    run.write([PROMPTS[0], "a yellow ring", PROMPTS[2]])
    assert run() == 2
    told = capsys.readouterr().err
    assert "1 image is made with other settings" in told and "row 2 (000002_1.png)" in told and "--redo-changed" in told
    assert run.images() == made
    assert run("--redo-changed") == 0
    again = run.images()
    assert {name for name in made if made[name] != again[name]} == {"000002_1.png"} and made.keys() == again.keys()
    assert Image.open(run.out / "000002_1.png").text["parameters"].startswith("a yellow ring\n")
    assert run("--guidance-scale", "1") == 2
    assert "3 images are made with other settings" in capsys.readouterr().err
    assert run() == 0


def test_a_new_row_is_made_beside_the_old_ones(run):
    assert run() == 0
    run.write([*PROMPTS, "a ring"])
    assert run() == 0 and [line["row"] for line in run.lines()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "extension", ["png", pytest.param("jpg", marks=pytest.mark.slow), pytest.param("webp", marks=pytest.mark.slow)]
)
def test_an_image_without_a_line_is_taken_if_it_is_this_one(run, capsys, extension):
    run.write([*PROMPTS[:2], "x" * 40_000 + "\u00e9\U0001f600"])
    name = ("--name", "{row}." + extension)
    assert run(*name) == 0
    made = run.images()
    assert {Image.open(run.out / file).format for file in made} == {{"jpg": "JPEG"}.get(extension, extension.upper())}
    run.journal.unlink()
    assert run(*name) == 0 and run.images() == made
    assert [line["seconds"] for line in run.lines()] == [0, 0, 0]
    run.journal.unlink()
    (run.out / f"2.{extension}").write_bytes(made[f"2.{extension}"][:-300])  # the head is whole
    assert run(*name) == 2
    assert "1 image is in the way" in capsys.readouterr().err and not run.journal.read_bytes()
    (run.out / f"2.{extension}").write_bytes(made[f"2.{extension}"])
    assert run(*name, "--seed", "1") == 2  # complete, but of another seed


def test_files_in_the_way_are_not_overwritten(run, capsys):
    run.out.mkdir()
    (run.out / "000002_1.png").write_text("mine")
    (run.out / "000003_2.png").symlink_to("nowhere")
    assert run() == 2
    told = capsys.readouterr().err
    assert (
        "2 images are in the way" in told
        and "row 2 (000002_1.png), row 3 (000003_2.png)" in told
        and "Move it away" in told
    )
    assert (run.out / "000002_1.png").read_text() == "mine" and not (run.out / "000001_0.png").exists()


def test_rows_that_changed_places_do_not_overwrite_each_other(run):
    names = ("--name", "{prompt}.png", "--seed", "5")
    run.file = run.file.with_suffix(".csv")
    run.file.write_text("prompt,seed\na red circle,1\na star,2\n")
    assert run(*names) == 0
    made = run.images()
    run.file.write_text("prompt,seed\na star,2\na red circle,1\n")
    assert run(*names) == 2
    assert run(*names, "--redo-changed") == 0 and run.images() == made
    assert [line["seconds"] for line in run.lines()[2:]] == [0, 0]
    run.file.write_text("prompt,seed\na star,2\na star,1\n")
    assert run(*names, "--redo-changed") == 2 and run.images() == made


@pytest.mark.slow
def test_one_run_at_a_time(run, capsys):
    run.out.mkdir()
    code = (
        "import sys; from zimage_core.batch.folder import Folder\n"
        "with Folder(sys.argv[1]).lock(): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run.out)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    assert run() == 2
    assert f"another run works in {run.out}" in capsys.readouterr().err
    other.kill()
    other.wait(30)
    assert run() == 0  # the system has let go of it


def test_an_output_that_is_a_file(run, capsys):
    run.out.write_text("")
    assert run() == 2 and "is a file; give a folder" in capsys.readouterr().err
