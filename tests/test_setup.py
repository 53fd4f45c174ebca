"""The set-up of the environment: when it has nothing to do, and that one that failed counts for nothing.

Commands are noted here, not run: that they work is shown by any `make` in a fresh checkout.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import setup


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a set-up in an empty folder runs."""
    ran: list[str] = []
    monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(setup, "STAMP", tmp_path / ".venv" / "setup-complete.json")
    monkeypatch.setattr(setup, "fetch", lambda version: (tmp_path / version).mkdir(exist_ok=True) or tmp_path / version)
    monkeypatch.setattr(setup.provision, "folder", lambda version: tmp_path / version)
    monkeypatch.setattr(setup, "newer", lambda: "no newer one")
    monkeypatch.setattr(setup.browser, "fetch", lambda: None)
    monkeypatch.setattr(setup.provision, "release", lambda _: "0.30.0")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)

    def run(*command: str | Path) -> None:
        ran.append(" ".join(map(str, command)))
        setup.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        setup.PYTHON.touch()

    monkeypatch.setattr(setup, "run", run)
    return ran


def test_a_set_up_runs_once_and_again_for_other_pins_or_without_what_it_made(commands, tmp_path, monkeypatch, capsys):
    assert setup.main() == 0
    venv, pip, uv, imports, frontend = commands
    assert " -m venv --clear " in venv and " -m pip install " in pip and "uv==" in pip
    assert (
        "uv pip install --python " in uv and " torch==" in uv and "requirements.txt" in uv and "import torch" in imports
    )
    assert frontend.endswith(" comfyui-frontend-package==1.58.1")
    assert setup.main() == 0
    assert len(commands) == 5 and capsys.readouterr().out.endswith("setup: ready: .venv, ComfyUI 0.30.0\n")
    setup.PYTHON.unlink()
    assert setup.main() == 0 and len(commands) == 10
    (tmp_path / setup.provision.OLDEST).rmdir()
    assert setup.main() == 0 and len(commands) == 15
    monkeypatch.setattr(setup, "pins", lambda: {"uv": "uv==1", "pip": "pip==1"})
    assert setup.main() == 0 and len(commands) == 20


def test_a_set_up_that_fails_is_done_again(commands, monkeypatch, capsys):
    def fail(*command: str | Path) -> None:
        raise subprocess.CalledProcessError(2, "pip")

    assert setup.main() == 0
    with monkeypatch.context() as patched:
        patched.setattr(setup, "run", fail)
        patched.setattr(setup, "pins_digest", lambda _: "other pins")
        assert setup.main() == 1
    assert "setup: error: Command 'pip' returned non-zero exit status 2" in capsys.readouterr().err
    assert setup.main() == 0 and len(commands) == 10


def test_another_comfyui_is_another_environment(tmp_path):
    (tmp_path / "requirements.txt").write_text("")
    before = setup.pins_digest(tmp_path)
    (tmp_path / "requirements.txt").write_text("numpy\n")
    assert len({before, setup.pins_digest(tmp_path), setup.pins_digest(None)}) == 3


def test_a_machine_without_apt_has_no_browser_and_all_else(commands, monkeypatch, capsys):
    def fetch() -> None:
        raise FileNotFoundError(2, "No such file or directory", "apt-get")

    monkeypatch.setattr(setup.browser, "fetch", fetch)
    assert setup.main() == 0
    assert "no Chromium, so its tests take an installed one or are skipped: " in capsys.readouterr().out
    assert setup.STAMP.is_file()


def test_every_pin_is_exact():
    assert [pin for pin in setup.pins().values() if pin.count("==") != 1] == []
    lines = setup.CONSTRAINTS.read_text().splitlines()
    assert [line for line in lines if not line.startswith("#") and line.count("==") != 1] == []
