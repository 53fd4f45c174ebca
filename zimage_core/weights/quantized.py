"""Quantized weights: how each format marks and stores them, and the exact numbers that they mean.

ComfyUI's files name a layer's format in a `comfy_quant` marker or in the file's `_quantization_metadata`; older fp8
files have `scale_weight` beside each weight and a `scaled_fp8` marker; fp8 without scales is a dtype like any other.
GGUF files name each tensor's type (`gguf_dequant`).

Letters: N rows (out), K columns (in) of a weight; g the size of a rotated group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import gguf_dequant
from .tensor_files import DTYPES, TensorFiles

MARKER = "comfy_quant"  # a layer's JSON in bytes: {"format": ...}
HEADER = "_quantization_metadata"  # of the file: {"layers": {layer: {"format": ...}}}
OLD_MARKER = "scaled_fp8"
OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}  # of the older fp8 files
# tensors that may lie beside a quantized weight; input_scale is for matmuls in fp8, our own are exact
PARTS = (
    "weight_scale",
    "weight_scale_2",
    "weight_s_rel",
    "weight_s_channel",
    "weight_codebook",
    "weight_correction",
    "pre_quant_scale",
    "input_scale",
)
DEQUANTIZED = torch.bfloat16  # where no dtype is asked for
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # 4-bit floats without their sign, as of the OCP MX formats
HADAMARD = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))  # regular: all rows have the same sum
AGAIN = "download the file again"

Parts = Mapping[str, Tensor]  # "weight" and what lies beside it


@dataclass(frozen=True)
class Packed:
    """A quantized weight as its file has it."""

    format: str  # one of FORMATS, of gguf_dequant.TYPES, or one that only a newer host knows
    shape: tuple[int, ...]  # of the numbers; some formats pad it to whole tiles
    tensors: Parts
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        return self.format in gguf_dequant.TYPES

    def expand(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers [*shape], rounded only where float32 is and then to the dtype."""
        if self.is_gguf:
            return gguf_dequant.expand(self.format, self.tensors["weight"], self.shape, dtype)
        weight = FORMATS[self.format].expand(self.tensors, self.settings)
        if (smoothing := self.tensors.get("pre_quant_scale")) is not None:
            weight = weight * smoothing.float()  # it multiplies the layer's input, which is the same for the product
        return weight.to(dtype)


# The formats: stored dtypes of the weight, what has to lie beside it, and the numbers


@dataclass(frozen=True)
class Format:
    """One of ComfyUI's quantized formats."""

    dtypes: tuple[str, ...]  # of `weight` in the file
    scales: tuple[str, ...]  # tensors that must be there
    values: int  # of one stored element
    expand: Callable[[Parts, Mapping[str, Any]], Tensor]


def _scaled(parts: Parts, _settings: Mapping[str, Any]) -> Tensor:
    """One scale for all or one for each row."""
    scale = parts["weight_scale"].float()
    rows = len(parts["weight"])
    if scale.numel() not in (1, rows):
        raise ValueError(f"weight_scale has shape {list(scale.shape)}, expected one number or {rows}")
    return parts["weight"].float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))


def _int8(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    weight = _scaled(parts, settings)
    return _rotated_back(weight, settings) if settings.get("convrot") else weight


def _convrot_w4a4(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """Two signed numbers of four bits in a byte, the even column in the lower half."""
    packed = parts["weight"].to(torch.int8)
    pairs = torch.stack((packed << 4 >> 4, packed >> 4), -1)  # [N, K/2, 2]
    return _rotated_back(_scaled({**parts, "weight": pairs.flatten(1)}, settings), settings)


def _w4a8(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """Codes of four bits, the even column in the lower half; what a group's scale makes of them is rounded to int8."""
    packed, channel = parts["weight"].view(torch.uint8), parts["weight_s_channel"].float()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)  # [N, K]
    book, correction = parts.get("weight_codebook"), parts.get("weight_correction")
    values = codes.float() - 8 if book is None else book.float()[codes.int()]
    group = settings.get("group_size", 16)
    if not isinstance(group, int) or group < 1 or codes.shape[1] % group:
        raise ValueError(f"group_size is {group!r}, expected a number that divides {codes.shape[1]}")
    scale = parts["weight_s_rel"]
    scale = scale.view(torch.float8_e4m3fn) if scale.element_size() == 1 else scale  # some files say U8
    for name, found, expected in (
        ("weight_s_rel", scale, (len(codes), codes.shape[1] // group)),
        ("weight_s_channel", channel, (len(codes),)),
        ("weight_correction", correction, (codes.shape[1] // group, len(codes))),
        ("weight_codebook", book, (16,)),
    ):
        if found is not None and tuple(found.shape) != expected:
            raise ValueError(f"{name} has shape {list(found.shape)}, expected {list(expected)}")
    whole = (values.unflatten(1, (-1, group)) * scale.float().unsqueeze(-1)).round().clamp(-127, 127)
    weight = whole * channel[:, None, None]
    if correction is not None:
        weight = weight + correction.float().T.unsqueeze(-1)
    return _rotated_back(weight.flatten(1), settings)


def _mxfp8(parts: Parts, _settings: Mapping[str, Any]) -> Tensor:
    """Blocks of 32 columns, scaled by a power of two."""
    exponent = parts["weight_scale"].view(torch.uint8)
    scale = torch.ldexp(torch.ones(exponent.shape), exponent.int() - 127)
    return _by_block(parts["weight"].float(), scale, 32)


def _nvfp4(parts: Parts, _settings: Mapping[str, Any]) -> Tensor:
    """Blocks of 16 columns, two 4-bit floats in a byte, the even column in the upper half."""
    packed = parts["weight"]
    halves = torch.stack((packed >> 4, packed & 15), -1).flatten(1)  # [N, K]
    table = torch.tensor(E2M1 + tuple(-value for value in E2M1))
    scale = parts["weight_scale"].view(torch.float8_e4m3fn).float() * parts["weight_scale_2"].float()
    return _by_block(table[halves.int()], scale, 16)


def _by_block(weight: Tensor, scale: Tensor, block: int) -> Tensor:
    """weight [N, K] times its blocks' scales, which lie in tiles of 128x4 (cuBLAS): entry (32a+b, c) at (b, 4a+c)."""
    rows, columns = weight.shape
    high, wide = -(-rows // 128), -(-columns // (4 * block))
    if scale.numel() != high * wide * 512 or columns % block:
        raise ValueError(f"weight_scale has shape {list(scale.shape)}, expected [{high * 128}, {wide * 4}]")
    plain = scale.reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(high * 128, wide * 4)
    return (weight.unflatten(1, (-1, block)) * plain[:rows, : columns // block, None]).flatten(1)


def _rotated_back(weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Each group of g columns times a symmetric orthogonal matrix, which undoes itself."""
    group = settings.get("convrot_groupsize", 256)
    if not isinstance(group, int) or group not in (4, 16, 64, 256, 1024) or weight.shape[1] % group:
        raise ValueError(f"convrot_groupsize is {group!r}, expected a power of 4 that divides {weight.shape[1]}")
    step = torch.tensor(HADAMARD, dtype=torch.float32)
    rotation = step
    while len(rotation) < group:
        rotation = torch.kron(rotation, step)
    return (weight.unflatten(1, (-1, group)) @ (rotation / group**0.5)).flatten(1)


FORMATS = {
    "float8_e4m3fn": Format(("F8_E4M3",), ("weight_scale",), 1, _scaled),
    "float8_e5m2": Format(("F8_E5M2",), ("weight_scale",), 1, _scaled),
    "mxfp8": Format(("F8_E4M3",), ("weight_scale",), 1, _mxfp8),
    "nvfp4": Format(("U8",), ("weight_scale", "weight_scale_2"), 2, _nvfp4),
    "int8_tensorwise": Format(("I8",), ("weight_scale",), 1, _int8),
    "convrot_w4a4": Format(("I8",), ("weight_scale",), 2, _convrot_w4a4),
    "asym_w4a8_int8": Format(("I8",), ("weight_s_rel", "weight_s_channel"), 2, _w4a8),
}
PADDED = {"mxfp8": 32, "nvfp4": 16}  # format -> the tile to whose size its weights are padded
BY_DTYPE = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # of weights with a scale and no marker


# Files


class Weights:
    """The weights among the tensors of a file, plain or quantized, by their keys."""

    def __init__(self, files: TensorFiles, keys: Iterable[str]):
        """Reads headers and markers. Raises CheckpointError for missing scales.

        Other formats than FORMATS are refused when their numbers are asked for: a host may know them.
        """
        self.files = files
        keys = list(keys)
        self._layers: dict[str, tuple[str, Mapping[str, Any], dict[str, str]]] = {}  # key -> format, settings, parts
        marked, beside = self._marks(keys)
        # two values in the older marker mean that matmuls are not to be made in fp8
        old_marker = next((key for key in keys if key.rpartition(".")[2] == OLD_MARKER), None)
        exact = old_marker is not None and files.entries[old_marker].shape == (2,)
        old = {"full_precision_matrix_mult": True} if exact else {}
        for key, (settings, _where) in marked.items():
            self._layers[key] = (str(settings.get("format")), settings, beside.pop(key, {}))
        for key, parts in beside.items():
            dtype = files.entries[key].dtype
            if "weight_scale" in parts:
                if dtype not in BY_DTYPE:
                    raise CheckpointError(f"{key} has a scale, but is stored as {dtype}; {AGAIN}", files.paths[0])
                self._layers[key] = (BY_DTYPE[dtype], old, parts)
        auxiliary = {part for _, _, parts in self._layers.values() for part in parts.values()}
        auxiliary |= {key for key in keys if key.rpartition(".")[2] in (MARKER, OLD_MARKER)}
        self.keys = [key for key in keys if key not in auxiliary]
        self._check_layers()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: self._shape(key) for key in self.keys}

    def dtype(self) -> torch.dtype:
        """That of most values, from the headers alone; what is quantized counts as what it becomes."""
        if self._layers or any(self._is_gguf(key) for key in self.keys):
            return DEQUANTIZED
        return self.files.dtype(self.keys)

    def packed(self, key: str) -> Packed | None:
        """The weight as the file has it, if it is quantized."""
        if self._is_gguf(key):
            entry = self.files.entries[key]
            return Packed(entry.dtype, entry.shape, {"weight": self.files.read(key)})
        if key not in self._layers:
            return None
        name, settings, parts = self._layers[key]
        tensors = {"weight": self.files.read(key)} | {part: self.files.read(at) for part, at in parts.items()}
        return Packed(name, self._shape(key), tensors, settings)

    def read(self, key: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers: as they are stored if they are not quantized, else in this dtype (None: DEQUANTIZED).

        shape: what they should be, where some formats pad rows and columns to whole tiles.
        """
        packed = self.packed(key)
        if packed is None:
            return self.files.read(key)
        if key in self._layers and packed.format not in FORMATS:
            raise CheckpointError(
                f"{key.removesuffix('.weight')} is quantized as {packed.format!r}, "
                f"expected one of {', '.join(FORMATS)}, or a newer ComfyUI that knows it; load a bf16, fp16 or fp8 "
                "version of the model instead",
                self.files.entries[key].path,
            )
        try:
            weight = packed.expand(dtype or DEQUANTIZED)
            tile = PADDED.get(packed.format, 1)
            padding = [has - should for has, should in zip(weight.shape, shape or weight.shape, strict=False)]
            if any(padding) and all(0 <= rows_or_columns < tile for rows_or_columns in padding):
                weight = weight[: weight.shape[0] - padding[0], : weight.shape[1] - padding[1]]
            return weight
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"{key} ({packed.format}): {str(error).splitlines()[0]}; {AGAIN}", self.files.entries[key].path
            ) from error

    def _is_gguf(self, key: str) -> bool:
        return self.files.entries[key].dtype in gguf_dequant.TYPES.keys() - gguf_dequant.PLAIN.keys()

    def _shape(self, key: str) -> tuple[int, ...]:
        shape = self.files.entries[key].shape
        kind = FORMATS.get(self._layers[key][0]) if key in self._layers else None
        return shape if kind is None else (*shape[:-1], shape[-1] * kind.values)

    def _marks(self, keys: list[str]) -> tuple[dict[str, tuple[Mapping[str, Any], str]], dict[str, dict[str, str]]]:
        """(weight -> its settings and where they are noted, weight -> part -> key of what lies beside it)."""
        known = set(keys)
        marked: dict[str, tuple[Mapping[str, Any], str]] = {}
        beside: dict[str, dict[str, str]] = {}
        for key in keys:
            layer, _, last = key.rpartition(".")
            part = OLD_NAMES.get(last, last)
            if last == MARKER:
                raw = self.files.read(key).flatten().to(torch.uint8).numpy().tobytes()
                marked[f"{layer}.weight"] = (_json(self.files, key, raw), key)
            elif part in PARTS and f"{layer}.weight" in known:
                beside.setdefault(f"{layer}.weight", {})[part] = key
        if stored := self.files.metadata.get(HEADER):
            layers = _json(self.files, HEADER, stored.encode()).get("layers")
            for name, settings in (layers if isinstance(layers, dict) else {}).items():
                for key in known:
                    if key == f"{name}.weight" or key.endswith(f".{name}.weight"):
                        marked.setdefault(key, (settings if isinstance(settings, dict) else {}, HEADER))
        for key, (_, where) in marked.items():
            if key not in known:
                raise CheckpointError(f"{key}, which {where} speaks of, is missing; {AGAIN}", self.files.paths[0])
        for key, (settings, where) in marked.items():
            nested = settings.get("params")
            marked[key] = ({**(nested if isinstance(nested, dict) else {}), **settings}, where)
        unknown = {key for key, (settings, _) in marked.items() if settings.get("format") not in FORMATS}
        for key in keys if unknown else ():  # whatever lies beside such a weight belongs to it
            layer, _, last = key.rpartition(".")
            if f"{layer}.weight" in unknown and last not in ("weight", "bias", MARKER):
                beside.setdefault(f"{layer}.weight", {})[last] = key
        return marked, beside

    def _check_layers(self) -> None:
        for key, (name, _, parts) in self._layers.items():
            entry, kind = self.files.entries[key], FORMATS.get(name)
            if kind is None:
                continue
            if missing := [part for part in kind.scales if part not in parts]:
                raise CheckpointError(
                    f"{key} is quantized as {name}, but its {' and '.join(missing)} is missing; {AGAIN}", entry.path
                )
            if entry.dtype not in kind.dtypes or len(entry.shape) != 2:
                raise CheckpointError(
                    f"{key} is quantized as {name}, but stored as {entry.dtype} {list(entry.shape)}, "
                    f"expected a matrix of {kind.dtypes[0]}; {AGAIN}",
                    entry.path,
                )

    def check(self, key: str) -> None:
        """Raises CheckpointError if these are no weights: whole numbers, say, without a mark of what they mean."""
        entry = self.files.entries[key]
        if key not in self._layers and entry.dtype not in DTYPES and not self._is_gguf(key):
            raise CheckpointError(
                f"{key} is stored as {entry.dtype}, expected one of {', '.join(DTYPES)}; "
                "get a version of the model that is not quantized",
                entry.path,
            )


def _json(files: TensorFiles, key: str, raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{key} is damaged ({error}); {AGAIN}", files.paths[0]) from error
    return found if isinstance(found, dict) else {}
