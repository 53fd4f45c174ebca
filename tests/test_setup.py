"""The set-up of the environment: it adds what is missing, and what was cut short begins anew.

Commands are noted here, not run: that they work is shown by any `make` in a fresh checkout.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import setup


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a set-up in an empty folder runs."""
    ran: list[str] = []

    def run(*command: str | Path) -> None:
        ran.append(" ".join(map(str, command)))
        folder = Path(command[command.index("--target") + 1]) if "--target" in command else tmp_path / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "uv").touch()

    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "UNFINISHED", tmp_path / "unfinished")
    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "lacks", lambda install, needed: False)
    monkeypatch.setattr(setup.provision, "folder", lambda version: tmp_path / version)
    monkeypatch.setattr(setup.provision, "newer", lambda python: "no newer one")
    monkeypatch.setattr(setup.provision, "fetch", lambda version, python: (tmp_path / version).mkdir())
    monkeypatch.setattr(setup.provision, "release", lambda folder: "0.30.0")
    monkeypatch.setattr(setup.browser, "frontend", lambda version: tmp_path / version / "package" / "static")
    monkeypatch.setattr(setup.browser, "fetch", lambda: None)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return ran


def test_a_set_up_adds_what_is_missing(commands, tmp_path, monkeypatch, capsys):
    assert setup.main() == 0
    venv, pip, packages, frontend = commands
    assert " -m venv --clear " in venv and " -m pip install " in pip and "uv==" in pip
    assert "uv pip install --python " in packages and " torch==" in packages and "requirements.txt" in packages
    assert frontend.endswith(" comfyui-frontend-package==1.58.1")
    (tmp_path / setup.provision.OLDEST).rmdir()
    capsys.readouterr()
    assert setup.main() == 0 and len(commands) == 4  # a folder, and no package
    told = f"setup: ComfyUI {setup.provision.OLDEST}; no newer one\nsetup: ready: .venv, ComfyUI 0.30.0\n"
    assert capsys.readouterr().out == told and (tmp_path / setup.provision.OLDEST).is_dir()
    monkeypatch.setattr(setup, "lacks", lambda install, needed: True)
    assert setup.main() == 0 and commands[4:] == [packages]


@pytest.mark.parametrize("done", range(5))
def test_a_set_up_that_was_cut_short_begins_anew(commands, monkeypatch, capsys, done):
    """After so many commands: four are a new set-up, and the fifth installs what one lacks that was complete."""
    run = setup.run

    def fail(*command: str | Path) -> None:
        if len(commands) == done:
            raise subprocess.CalledProcessError(2, "uv")
        run(*command)

    with monkeypatch.context() as patched:
        patched.setattr(setup, "run", fail)
        patched.setattr(setup, "lacks", lambda install, needed: True)
        assert [setup.main() for _ in range(1 + (done == 4))][-1] == 1
    assert "setup: error: Command 'uv' returned non-zero exit status 2" in capsys.readouterr().err
    commands.clear()
    assert setup.main() == 0
    assert " -m venv --clear " in commands[0] and any(" torch==" in command for command in commands)


def test_cut_short_while_the_old_one_is_deleted(commands, tmp_path, monkeypatch):
    assert setup.main() == 0
    setup.UNFINISHED.touch()
    commands.clear()

    def stop(*command: str | Path) -> None:
        setup.UNFINISHED.unlink()  # which may be the first that goes
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(setup, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            setup.main()
    assert setup.main() == 0 and " -m venv --clear " in commands[0]


def test_what_uv_lacks():
    install = [Path(sys.executable).with_name("uv"), "pip", "install", "--offline", "--python", sys.executable]
    assert not setup.lacks(install, ["pytest", "torch"])
    with pytest.raises(setup.SetupError, match="uv can't tell what is to be installed: "):
        setup.lacks(install, ["no-such-package-as-this==1"])


def test_a_machine_without_apt_has_no_browser_and_all_else(commands, monkeypatch, capsys):
    def fetch() -> None:
        raise FileNotFoundError(2, "No such file or directory", "apt-get")

    monkeypatch.setattr(setup.browser, "fetch", fetch)
    assert setup.main() == 0
    assert "no Chromium, so its tests take an installed one or are skipped: " in capsys.readouterr().out


def test_every_pin_is_exact():
    constraints = [line for line in setup.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in [*setup.pins().values(), *constraints] if pin.count("==") != 1] == []
