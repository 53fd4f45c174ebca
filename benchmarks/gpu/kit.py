"""What `make gpu-kit` packed, unpacked once on the machine that lacks it."""

from __future__ import annotations

import importlib.util
import os
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "build" / "gpu-kit" / "kit.tar.xz"
PLACE = "ZIMAGE_GPU_KIT"  # where it lies unpacked, for the processes that follow


def unpack_if_needed() -> None:
    """Makes ComfyUI and the packages importable. Nothing happens where `make setup` has provided them."""
    if importlib.util.find_spec("comfy_kitchen") is not None:
        return
    place = Path(os.environ.get(PLACE) or tempfile.mkdtemp(prefix="zimage-gpu-kit-"))
    if not (place / "site").is_dir():
        if not KIT.is_file():
            sys.exit(f"There is no {KIT}. Run `make gpu-kit` where there are package registries, and bring it along.")
        with tarfile.open(KIT) as packed:
            packed.extractall(place, filter="data")
    site = str(place / "site")
    os.environ[PLACE] = str(place)
    os.environ["COMFYUI_PATH"] = str(place / "comfyui")
    sys.path.append(site)  # last: what is installed wins
