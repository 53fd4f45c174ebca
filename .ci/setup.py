"""Makes or completes what `make` works in: `.venv` with pinned packages, the ComfyUI releases to test on, a browser.

What is there is left alone: uv sees in a tenth of a second, and without a network, that every package is as pinned.
Runs on the standard library alone, under the Python that is to be the environment's.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import browser
import provision
from provision import ROOT, SOURCES, VENV, SetupError

UNFINISHED = VENV / "unfinished"  # there while anything is made: it may be half there
CONSTRAINTS = Path(__file__).with_name("constraints.txt")


def main() -> int:
    try:
        if sys.version_info < (3, 11):
            found = sys.version.split()[0]
            raise SetupError(f"Python 3.11 or later is needed, this is {found}; try make PYTHON=python3.12")
        with VENV.with_name(".venv.lock").open("w") as lock:  # beside .venv, which may be deleted
            fcntl.flock(lock, fcntl.LOCK_EX)  # another set-up of this checkout may be at work
            set_up(provision.chosen())
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


def set_up(comfyui: Path | None) -> None:
    """Adds what is missing; `comfyui` is the user's checkout, if any. A set-up that was cut short begins anew.

    Packages that are pinned no more stay until `.venv` is deleted.
    """
    python, uv = VENV / "bin" / "python", VENV / "bin" / "uv"
    install = [uv, "pip", "install", "--python", python]
    fresh = UNFINISHED.exists() or not uv.exists()
    if fresh:
        print("setup: a virtual environment; PyTorch and the rest take about 6 GB and some minutes", flush=True)
        uv.unlink(missing_ok=True)  # first: while the rest is deleted, this may be cut short as well
        run(sys.executable, "-m", "venv", "--clear", VENV)  # without ensurepip (Debian: python3-venv) it says so
        UNFINISHED.touch()
        run(python, "-m", "pip", "install", "--quiet", pins()["uv"], pins()["pip"])
    missing = [] if comfyui else [version for version in SOURCES if not provision.folder(version).exists()]
    if missing:
        print(f"setup: ComfyUI {', '.join(missing)}; {provision.newer(python)}", flush=True)
    for version in missing:
        provision.fetch(version, python)
    # The exact versions of everything below the pins are those that ComfyUI's provisioned release was tested with.
    known = [] if comfyui else ["--constraint", CONSTRAINTS]
    needed = [*pins().values(), "--requirement", (comfyui or provision.newest()) / "requirements.txt", *known]
    if fresh or lacks(install, needed):
        UNFINISHED.touch()
        run(*install, *needed)
    for version in browser.FRONTENDS:
        target = browser.frontend(version).parents[1]
        if not target.exists():
            UNFINISHED.touch()
            run(*install, "--no-deps", "--target", target, f"comfyui-frontend-package=={version}")
    if fresh or browser.program() is None:
        try:
            browser.fetch()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"setup: no Chromium, so its tests take an installed one or are skipped: {error}", flush=True)
    UNFINISHED.unlink(missing_ok=True)


def lacks(install: Sequence[str | Path], needed: Sequence[str | Path]) -> bool:
    """Whether anything is to be installed. What can't be found out is an error that leaves everything as it is."""
    found = subprocess.run([*install, "--dry-run", *needed], capture_output=True, text=True)
    if found.returncode:
        raise SetupError(f"uv can't tell what is to be installed: {found.stderr.strip()}")
    return "Would make no changes" not in found.stderr


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})


if __name__ == "__main__":
    sys.exit(main())
