"""Quantised weights: how each dialect marks them, and their exact values.

fp8 files come in three dialects: weights alone ("plain"), with `scale_weight` beside each and a `scaled_fp8` marker
(the older one), and with `weight_scale` and a `comfy_quant` marker or a `_quantization_metadata` header (ComfyUI's).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .config import CheckpointError
from .tensor_files import TensorFiles

SCALES = (".scale_weight", ".weight_scale")  # what `<layer>.weight` is multiplied with
INPUT_SCALES = (".scale_input", ".input_scale")  # for matrix products in fp8; here they run in full precision
MARKER = ".comfy_quant"  # JSON in bytes: {"format": ...}
OLD_MARKER = "scaled_fp8"
HEADER = "_quantization_metadata"  # of the file: {"layers": {layer: {"format": ...}}}
FORMATS = ("float8_e4m3fn", "float8_e5m2")
DEQUANTISED = torch.bfloat16  # where no dtype is asked for: fp8 times its scale, rounded once


def split(files: TensorFiles, keys: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """(keys of weights, key of a quantised weight -> key of its scale). Raises CheckpointError for other formats."""
    keys = list(keys)
    known = set(keys)
    scales: dict[str, str] = {}
    auxiliary: set[str] = set()
    marked: dict[str, str] = {}  # weight that is said to be quantised -> where that is said
    for key in keys:
        layer, _, last = key.rpartition(".")
        if last == MARKER[1:]:
            _expect(files, key, _json(files, key, bytes(files.read(key).flatten().to(torch.uint8).tolist())))
            marked[f"{layer}.weight"] = key
        elif f".{last}" in SCALES and f"{layer}.weight" in known:
            scales[f"{layer}.weight"] = key
        elif last != OLD_MARKER and not (f".{last}" in INPUT_SCALES and f"{layer}.weight" in known):
            continue
        auxiliary.add(key)
    if stored := files.metadata.get(HEADER):
        layers = _json(files, HEADER, stored.encode()).get("layers")
        for name, layer_format in (layers if isinstance(layers, dict) else {}).items():
            _expect(files, name, layer_format)
            marked |= {key: HEADER for key in known if key == f"{name}.weight" or key.endswith(f".{name}.weight")}
    if unscaled := sorted(marked.keys() - scales.keys()):
        raise CheckpointError(
            f"{files.paths[0]}: {unscaled[0]} is quantised by {marked[unscaled[0]]}, but its weight_scale is missing; "
            "download the file again"
        )
    return [key for key in keys if key not in auxiliary], scales


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [out, in] times its scale, one number or one for each row; float32, exact but for its rounding."""
    return weight.float() * (scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float().reshape(()))


def _expect(files: TensorFiles, key: str, found: Any) -> None:
    name = found.get("format") if isinstance(found, dict) else None
    if name not in FORMATS:
        raise CheckpointError(
            f"{files.paths[0]}: {key.removesuffix(MARKER)} is quantised as {name!r}, expected one of "
            f"{', '.join(FORMATS)}; load a bf16, fp16 or fp8 version of the model instead"
        )


def _json(files: TensorFiles, key: str, raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{files.paths[0]}: {key} is damaged ({error}); download the file again") from error
    return found if isinstance(found, dict) else {}
