"""Weight files as ComfyUI maps its own, and the converted ones that we keep for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import folder_paths
from torch import Tensor

from ...zimage_core.weights import converted
from ...zimage_core.weights.component import Component
from ...zimage_core.weights.tensor_files import MapFile, Mapped, map_safetensors

try:  # the paging of weights; older versions have none
    import comfy.memory_management as paging
except ImportError:
    paging = None

logger = logging.getLogger(__name__)


def map_file() -> MapFile | None:
    """How weight files are mapped (`TensorFiles`); None with ComfyUI's flag --disable-mmap.

    Where ComfyUI pages weights it reads tensors that it has mapped itself straight from their file, into pinned memory
    or the device; others pass through the memory of the process first.
    """
    if comfy.utils.DISABLE_MMAP:
        return None
    paged = getattr(paging, "aimdo_enabled", False) and hasattr(comfy.utils, "load_safetensors")
    return _by_comfyui if paged else map_safetensors


def _by_comfyui(path: Path) -> Mapped:
    try:
        return _ComfyFile(comfy.utils.load_safetensors(str(path))[0])
    except Exception as error:  # a dtype that ComfyUI doesn't map, or a library that fails: it would only be faster
        logger.info("%s is mapped without ComfyUI (%s: %s).", path, type(error).__name__, error)
        return map_safetensors(path)


class _ComfyFile:
    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def cache_converted(component: Component, dtypes: converted.Dtypes) -> Component:
    """The same network from a file in ComfyUI's user directory that holds it so (`converted`), written if need be."""
    folder = Path(folder_paths.get_user_directory()) / "zimage" / "weights"
    between: Any = mm.throw_exception_if_processing_interrupted
    return converted.cache_converted(component, dtypes, folder, between)
