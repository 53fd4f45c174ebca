"""Converted weights as a file of their own: what was cast, fused or expanded once is mapped from then on.

Memory that no file backs can't be given up, and ComfyUI pins a copy of it on top. A page of a file can.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..prompts.cache import stamps
from .component import Component
from .tensor_files import DTYPES, TensorFiles, read_header

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SOURCES = "zimage.sources"  # in the metadata: what the weights were when they were converted
ALIGNED = 64  # bytes; ComfyUI reads whole lines of a cache

Dtypes = Mapping[str, torch.dtype | None]  # parameter -> dtype, None for the file's own


def cache_converted(
    component: Component, dtypes: Dtypes, folder: str | os.PathLike[str], between: Callable[[], None] = lambda: None
) -> Component:
    """The same network from a file in `folder` that holds it in these dtypes, written where it isn't there yet.

    Where its weights have changed since, the file is written anew. A component whose own files hold all of it just so
    is returned as it is. between: called before each tensor is written; may raise to give up. Raises CheckpointError
    where the file can't be written; nothing half-written is left.
    """
    if all(component.is_stored(name, dtype) for name, dtype in dtypes.items()):
        return component
    sources = json.dumps(stamps(component.files.paths))
    path = Path(folder) / _name(component, dtypes)
    if not _is_of(path, sources):
        try:
            _write(path, component, dtypes, sources, between)
        except OSError as error:
            size = sum(math.prod(component.shapes[name]) * _dtype(component, name, dtypes).itemsize for name in dtypes)
            raise CheckpointError(
                f"the converted weights of {component.source} can't be kept here "
                f"({error.strerror or error}); they need {size / 1e9:.1f} GB. Make room, or switch off keeping them",
                folder,
            ) from error
    return Component(component.kind, component.config, TensorFiles([path], component.files.map_file))


def _name(component: Component, dtypes: Dtypes) -> str:
    """Of the file: one for each set of source files and dtypes."""
    files = [os.path.realpath(path) for path in component.files.paths]
    asked = json.dumps([component.kind, files, {name: str(dtype) for name, dtype in dtypes.items()}])
    first = component.files.paths[0]
    stem = first.stem if len(files) == 1 else first.parent.name
    return f"{stem}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.safetensors"


def _is_of(path: Path, sources: str) -> bool:
    if not path.is_file():
        return False
    try:
        return read_header(path)[1].get(SOURCES) == sources
    except CheckpointError:  # damaged from outside
        return False


def _dtype(component: Component, name: str, dtypes: Dtypes) -> torch.dtype:
    return dtypes[name] or component.tensor(name, component.shapes[name]).dtype


def _write(path: Path, component: Component, dtypes: Dtypes, sources: str, between: Callable[[], None]) -> None:
    """One tensor in memory at a time. Raises OSError."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", SOURCES: sources}}
    end = 0
    for name, shape in component.shapes.items():
        dtype = _dtype(component, name, dtypes)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(path.parent).free) < end:
        raise OSError(f"only {free / 1e9:.1f} GB are free")
    half_written = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(half_written, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in component.shapes.items():
                between()
                file.write(_bytes(component.tensor(name, shape, dtype=dtypes[name])))
        os.replace(half_written, path)
    except BaseException:
        with suppress(OSError):
            half_written.unlink(missing_ok=True)
        raise


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(values)
