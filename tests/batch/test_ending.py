"""How a run ends: done, killed, interrupted or out of room; and that the next one goes on from there."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from ..helpers import ROOT
from .making import SMALL, Run

HEARD = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells start background jobs deaf to it


def started(run: Run, *options: str, before: tuple[str, ...] = (), prepare=HEARD) -> subprocess.Popen[str]:
    """The command, as a process of its own."""
    return subprocess.Popen(
        [*before, sys.executable, "-m", "zimage_core", *run.command, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def wait_for(run: Run, lines: int) -> None:
    deadline = time.monotonic() + 60
    while not run.journal.exists() or run.journal.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_events_as_json(tmp_path, capsys):
    run = Run(tmp_path, [{"prompt": "a star", "images": 2}, {"prompt": "a\u00e9"}], *SMALL, "--json")
    assert run() == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["start", "row", "row", "row", "end"]
    assert events[0] == {"event": "start", "rows": 2, "images": 3, "done": 0}
    assert [{**line, "event": "row"} for line in run.lines()] == events[1:4]
    assert events[4].pop("seconds") >= 0
    assert events[4] == {"event": "end", "status": "done", "rows": 2, "images": 3, "done": 3, "failed": 0}
    assert run() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["done"] == 3


def test_the_bar_and_the_quiet(tmp_path, capsys):
    rows = [
        {"prompt": "a star", "images": 2},
        {"prompt": "a ring"},
        {"prompt": "a ring", "width": 2**20, "height": 2**20},
    ]
    run = Run(tmp_path, rows, *SMALL[:-1])
    assert run() == 1
    said = capsys.readouterr()
    assert "4/4" not in said.err and "3/4" in said.err and "rows 2/3, failed 1" in said.err
    assert "image/s" in said.err or "s/image" in said.err
    assert "row 3, image 1 failed: out of memory" in said.err
    assert said.out.startswith("3 of 4 images done (2 of 3 rows), 1 failed, ") and said.out.count("\n") == 1
    run.write(rows[:2])
    assert run("--quiet") == 0
    said = capsys.readouterr()
    assert said.out.startswith("3 of 3 images done (2 of 2 rows), ") and said.err == ""


@pytest.mark.slow
def test_help_loads_no_model_code():
    command = [sys.executable, "-X", "importtime", "-m", "zimage_core", "batch", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--skip-bad" in done.stdout and "{row:06}_{seed}.png" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "zimage_core.batch.command" in imported
    assert not imported & {
        "transformers",
        "PIL",
        "PIL.Image",
        "zimage_core.batch.maker",
        "zimage_core.batch.run",
    }


@pytest.mark.slow
def test_control_c_finishes_the_step_and_the_next_run_goes_on(tmp_path):
    prompts = [f"a star {number}" for number in range(40)]
    run = Run(tmp_path, prompts, *SMALL, "-s", "8", "--batch-size", "1")
    process = started(run)
    wait_for(run, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the step that runs is finished" in err and "run the same command again to go on" in err
    made = run.lines()
    assert 3 <= len(made) < 40 and {line["status"] for line in made} == {"done"}
    assert out.startswith(f"{len(made)} of 40 images done") and "interrupted" in out
    assert len(run.images()) == len(made) and not [*run.out.glob("*.half")]
    for path in run.out.glob("*.png"):
        Image.open(path).load()
    run.write(prompts[: len(made) + 2])
    assert run() == 0 and len(run.lines()) == len(made) + 2


@pytest.mark.slow
def test_a_second_control_c_ends_at_once(tmp_path):
    run = Run(tmp_path, [{"prompt": "a star", "width": 768, "height": 768}], *SMALL)
    process = started(run, "-s", "50", "--batch-size", "1")
    wait_for(run, 0)
    time.sleep(2)  # in the middle of a step, each of which takes seconds
    process.send_signal(signal.SIGINT)
    assert "ends at once" in process.stderr.readline() + process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and time.monotonic() - began < 1
    assert run.lines() == []


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(tmp_path):
    """SIGKILL, five times at random moments, then to the end: the images of a run that nothing has disturbed."""
    rows = [{"prompt": f"a star {number}", "steps": 1 + number % 3, "images": 1 + number % 2} for number in range(30)]
    whole, killed = (Run(tmp_path, rows, *SMALL, "--batch-size", "1", name=name) for name in ("whole", "killed"))
    assert whole() == 0
    chance = random.Random(os.environ["FUZZ_SEED"])
    told = []
    for _ in range(5):
        process = started(killed)
        before = len(killed.lines()) if killed.journal.exists() else 0
        wait_for(killed, min(before + 1, 40))
        time.sleep(chance.random() * 0.3)
        process.kill()
        told.append(process.communicate(timeout=60)[1])
        for path in killed.out.glob("*.png"):
            Image.open(path).load()  # whole, or not there
    assert killed() == 0
    assert killed.images() == whole.images() and not [*killed.out.glob("*.half")]
    done = [(line["row"], line["image"]) for line in killed.lines()]
    assert sorted({*done}) == sorted((line["row"], line["image"]) for line in whole.lines()) and len(done) == 45


def on_a_disk(run: Run, room: int, taken: int, *options: str) -> tuple[int, str, str]:
    """Exit status and output of the command on a file system of so many kB, of which something else takes so many.

    What it leaves is then where it would be.
    """
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("this system mounts nothing for its users")
    run.out.mkdir()
    kept = run.out.with_name("kept")
    script = (
        f'mount -t tmpfs -o size={room}k none "{run.out}" && head -c {taken * 1024} /dev/zero > "{run.out}/other"; '
        f'"$@"; code=$?; cp -a "{run.out}" "{kept}"; exit $code'
    )
    process = started(run, *options, before=("unshare", "-Urm", "sh", "-c", script, "sh"))
    out, err = process.communicate(timeout=300)
    run.out.rmdir()
    kept.rename(run.out)
    (run.out / "other").unlink()
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize("room, taken", [(60, 0), (60, 55)])  # with the latter not one image fits
def test_a_full_disk_stops_the_run_and_the_next_goes_on(tmp_path, room, taken):
    run = Run(tmp_path, [f"a star {number}" for number in range(40)], *SMALL, "--batch-size", "1")
    code, out, err = on_a_disk(run, room, taken)
    assert code == 1, err
    assert "there is no room left to write" in err and "make room, then run the same command again" in err
    assert "Traceback" not in err and "stopped" in out
    text = run.journal.read_bytes()
    assert text == b"" or text.endswith(b"\n")
    made = len(run.lines())
    assert (made == 0) == bool(taken) and made < 40 and not [*run.out.glob("*.half")]
    assert len(run.images()) - made in (0, 1, 2)  # one or two may have been saved whose lines had no room
    for path in run.out.glob("*.png"):
        Image.open(path).load()
    assert run() == 0 and len(run.lines()) == 40 == len(run.images())


@pytest.mark.slow
def test_a_journal_without_room_has_no_wrong_line(tmp_path):
    """A file may not grow beyond a bound here: images fit, the journal does not."""
    run = Run(tmp_path, [f"a star {number}" for number in range(20)], *SMALL, "--batch-size", "1")
    bound = 2560  # bytes; an image has less
    process = started(run, prepare=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (bound, bound)))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "there is no room left to write" in err, err
    text = run.journal.read_bytes()
    assert text.endswith(b"\n") and 0 < len(run.lines()) < 20 and len(text) <= bound
    assert run() == 0 and len(run.lines()) == 20 == len(run.images())


def test_what_is_wrong_with_options_is_told_in_one_line(tmp_path, capsys):
    run = Run(tmp_path, ["a star"], *SMALL)
    for options, words in (
        (["--name", "../x.png"], "leads out of the output folder"),
        (["--lora", "none.safetensors"], "--lora: there is no such file"),
        (["-m", "no/such/model"], "there is no such file or folder"),
    ):
        assert run(*options) == 2
        told = capsys.readouterr().err
        assert words in told and told.startswith("error: ") and told.count("\n") == 1 and not run.out.exists()
    for options, words in ((["--images", "0"], "a whole number from 1"), (["--image", "none.png"], "no such file")):
        with pytest.raises(SystemExit):
            run(*options)
        assert words in capsys.readouterr().err
    missing = Run(tmp_path, ["a star"], *SMALL)
    missing.file = Path(tmp_path / "missing.txt")
    assert missing() == 2 and "missing.txt" in capsys.readouterr().err
