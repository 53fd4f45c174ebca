"""Downloads by the command line, and by two processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from zimage_core.__main__ import main
from zimage_core.hub import download

from . import test_download
from .helpers import NANO, ROOT
from .test_download import ALL, NAME, WEIGHTS, contents

folder = test_download.folder
hub = test_download.hub


def generate(*arguments: str) -> int:
    size = ["--width", "32", "--height", "32", "-o", "out.png"]
    return main(["generate", "a red circle", "--cpu", "--steps", "1", *size, *arguments])


def test_the_command_line_downloads_when_told_to(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "models" / "zimage" / "Org--Nano"
    assert generate("-m", NAME) == 2 and hub.asked == [] and not folder.exists()
    told = capsys.readouterr().err
    assert "transformer and text encoder and vae of Org/Nano are not here. Add --download" in told
    assert generate("-m", NAME, "--download") == 0
    assert download.is_complete(folder, ALL) and (tmp_path / "out.png").is_file()
    assert "B/s" in capsys.readouterr().err
    hub.asked.clear()
    assert generate("-m", NAME) == 0 and hub.asked == []
    assert generate("-m", "nowhere") == 2
    assert "is no repository" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_stops_at_once(hub, tmp_path):
    """Control-C: nothing looks complete, and the next run goes on."""
    hub.speed = 2e6
    command = [sys.executable, "-m", "zimage_core", "generate", "a red circle", "-m", NAME, "--download"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells start background jobs deaf to it
    )
    folder = tmp_path / "models" / "zimage" / "Org--Nano"
    deadline = time.monotonic() + 60
    while sum(map(len, contents(folder).values())) < 2e6:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted, no image was written" in words and not download.is_complete(folder, ALL)


# Two at once


@pytest.mark.slow
def test_two_processes_share_a_folder(hub, folder):
    """The second waits for the first, or takes what it has fetched; nothing is fetched twice or damaged."""
    hub.speed = 6e6
    script = (
        "import sys; from pathlib import Path; from zimage_core.hub import download;"
        f"download.fetch(download.Repository({NAME!r}), Path(sys.argv[1]), {list(ALL)!r})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert contents(folder) == contents(NANO)
    assert len(hub.sent(WEIGHTS)) == 1
