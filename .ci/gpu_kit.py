"""Makes build/gpu-kit/kit.tar.xz: what `python -m benchmarks.gpu` needs on a machine with a GPU and no network.

There, Python 3.12 and PyTorch with CUDA are expected, with the usual packages around them (transformers, aiohttp,
scipy, ...). The kit brings what such a machine lacks: ComfyUI's source, its kernel package without the libraries of
other makers' GPUs, diffusers, some small packages, and a stand-in for `av`, which ComfyUI imports for videos.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import provision
from provision import ROOT, SetupError

KIT = ROOT / "build" / "gpu-kit" / "kit.tar.xz"
MOST = 45 * 2**20  # bytes: what may travel with the checkout
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 24, 17, 5)] + ["manylinux2014_x86_64", "any"]
PACKAGES = (
    "comfy-kitchen comfy-aimdo diffusers importlib-metadata zipp sqlalchemy alembic mako blake3 torchsde trampoline "
    "simpleeval gguf pydantic pydantic-core pydantic-settings annotated-types python-dotenv"
).split()
# of ComfyUI, what is not run
LEFT_OUT = ("tests", "tests-unit", "blueprints", "comfy_api_nodes", "script_examples", ".github", "web", "models")
OTHERS = re.compile(r"/backends/hip/_C|aimdo_rocm|\.pyc$|/__pycache__/|/tests?/|\.dll$")  # of packages
# `av` with any name in it, as far as importing goes
STAND_IN = '''"""Stands in for PyAV, which ComfyUI imports for videos: nothing here makes one."""
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Anything(ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return ModuleSpec(name, _Finder, is_package=True) if name.startswith("av.") else None

    @staticmethod
    def create_module(spec):
        return _Anything(spec.name)

    @staticmethod
    def exec_module(module):
        pass


sys.meta_path.append(_Finder)
sys.modules[__name__].__class__ = _Anything
'''


def main() -> int:
    try:
        comfyui = provision.newest()
        KIT.parent.mkdir(parents=True, exist_ok=True)
        partial = KIT.with_suffix(".partial")
        with tempfile.TemporaryDirectory() as wheels, tarfile.open(partial, "w:xz") as kit:
            _download(Path(wheels))
            for wheel in sorted(Path(wheels).iterdir()):
                _add_wheel(kit, wheel)
            _add(kit, "site/av/__init__.py", STAND_IN.encode())
            for path, name in _sources(comfyui):
                kit.add(path, f"comfyui/{name}", recursive=False)
        size = partial.stat().st_size
        if size > MOST:
            raise SetupError(f"the kit has {size / 2**20:.1f} MB, expected at most {MOST / 2**20:.0f}: leave more out")
        shutil.move(partial, KIT)
        print(f"{KIT.relative_to(ROOT)}: {size / 2**20:.1f} MB, ComfyUI {provision.release(comfyui)}, for {PYTHON}")
        return 0
    except (SetupError, OSError) as error:
        print(f"gpu-kit: error: {error}", file=sys.stderr)
        return 1


def _download(folder: Path) -> None:
    """The wheels of PACKAGES at the versions that are installed here, for the other Python."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--python-version", PYTHON, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command += [f"{name}=={version(name)}" for name in PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"could not get the packages of the kit: {done.stderr.strip()[-1000:]}")


def _add_wheel(kit: tarfile.TarFile, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        for name in sorted(packed.namelist()):
            if not name.endswith("/") and not OTHERS.search(f"/{name}"):
                _add(kit, f"site/{name}", packed.read(name))


def _add(kit: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    kit.addfile(entry, io.BytesIO(content))


def _sources(comfyui: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(comfyui.rglob("*")):
        name = path.relative_to(comfyui)
        if path.is_file() and name.parts[0] not in LEFT_OUT and not OTHERS.search(f"/{name.as_posix()}"):
            yield path, name.as_posix()


if __name__ == "__main__":
    sys.exit(main())
