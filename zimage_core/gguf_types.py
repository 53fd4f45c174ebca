"""GGUF's quantised types as tensor programs: blocks of bytes to the numbers that they mean.

A type stores a row of a weight as blocks, each some numbers' low bits with their scales. The layouts are those of
ggml's ggml-quants.c. Types that no Z-Image is published in are left to the `gguf` package, on the CPU.

Letters: n blocks, [n, bytes] uint8 in, [n, values] float32 out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import CheckpointError


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types."""

    number: int  # in the file
    values: int  # of a block
    bytes: int  # of a block
    expand: Callable[[Tensor], Tensor] | None = None  # None: plain numbers, or left to the package


def expand(name: str, raw: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight [*shape] float32 that these bytes mean, on their device. raw: uint8, rows of whole blocks."""
    kind = TYPES[name]
    blocks = raw.reshape(-1, kind.bytes)
    return (_by_package(name, blocks) if kind.expand is None else kind.expand(blocks)).reshape(shape)


def _by_package(name: str, blocks: Tensor) -> Tensor:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"GGUF weights of type {name} need the gguf package: pip install gguf") from error
    values = gguf.quants.dequantize(blocks.cpu().numpy(), getattr(gguf.GGMLQuantizationType, name))
    return torch.from_numpy(values).to(blocks.device)


# Parts of blocks


def _half(two: Tensor) -> Tensor:
    """Bytes [n, 2k] as float16 numbers, [n, k] float32."""
    return two.contiguous().view(torch.float16).float()


def _fields(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` lowest fields of so many bits of each byte [..., k]: [..., count, k], the lowest first."""
    shifts = torch.arange(0, bits * count, bits, device=packed.device, dtype=torch.uint8)
    return (packed.unsqueeze(-2) >> shifts.unsqueeze(-1)) & (2**bits - 1)


def _bits(packed: Tensor) -> Tensor:
    """Bytes [n, k] to their bits, the lowest first: [n, 8k]."""
    return _fields(packed, 1, 8).mT.flatten(1)


def _signed(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.int8).float()


# Types of 32 values: one scale, and a lowest value where the range is not symmetric


def _q4_0(b: Tensor) -> Tensor:
    return (_fields(b[:, 2:], 4, 2).flatten(1).float() - 8) * _half(b[:, :2])


def _q4_1(b: Tensor) -> Tensor:
    return _fields(b[:, 4:], 4, 2).flatten(1).float() * _half(b[:, :2]) + _half(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    q = _fields(b[:, 6:], 4, 2).flatten(1) | _bits(b[:, 2:6]) << 4
    return (q.float() - 16) * _half(b[:, :2])


def _q5_1(b: Tensor) -> Tensor:
    q = _fields(b[:, 8:], 4, 2).flatten(1) | _bits(b[:, 4:8]) << 4
    return q.float() * _half(b[:, :2]) + _half(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return _signed(b[:, 2:]) * _half(b[:, :2])


_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl


def _uneven(q: Tensor) -> Tensor:
    return torch.tensor(_UNEVEN, dtype=torch.float32, device=q.device)[q.int()]


def _iq4_nl(b: Tensor) -> Tensor:
    return _uneven(_fields(b[:, 2:], 4, 2).flatten(1)) * _half(b[:, :2])


# Types of 256 values: groups of 16 or 32, whose scales are small whole numbers times one for the block


def _grouped(q: Tensor, scale: Tensor, low: Tensor | float = 0.0) -> Tensor:
    """q * scale - low for groups: q [n, 256], scale and low [n, groups]."""
    groups = q.unflatten(1, (scale.shape[1], -1)).float() * scale.unsqueeze(-1)
    return (groups - low.unsqueeze(-1) if isinstance(low, Tensor) else groups).flatten(1)


def _six_bit_pairs(s: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes of Q4_K and Q5_K to eight scales and eight lowest values, six bits each: [n, 8] twice."""
    first, second, rest = s[:, :4], s[:, 4:8], s[:, 8:]
    scale = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], 1)
    low = torch.cat([second & 63, rest >> 4 | (second >> 6) << 4], 1)
    return scale.float(), low.float()


def _q2_k(b: Tensor) -> Tensor:
    q = _fields(b[:, 16:80].unflatten(1, (2, 32)), 2, 4).flatten(1)
    return _grouped(q, _half(b[:, 80:82]) * (b[:, :16] & 15).float(), _half(b[:, 82:]) * (b[:, :16] >> 4).float())


def _q3_k(b: Tensor) -> Tensor:
    low = _fields(b[:, 32:96].unflatten(1, (2, 32)), 2, 4).flatten(1)
    high = _fields(b[:, :32], 1, 8).flatten(1)
    scale = _fields(b[:, 96:104], 4, 2).flatten(1) | _fields(b[:, 104:108], 2, 4).flatten(1) << 4
    return _grouped((low | high << 2).float() - 4, _half(b[:, 108:]) * (scale.float() - 32))


def _q4_k(b: Tensor) -> Tensor:
    scale, low = _six_bit_pairs(b[:, 4:16])
    q = _fields(b[:, 16:].unflatten(1, (4, 32)), 4, 2).flatten(1)
    return _grouped(q, _half(b[:, :2]) * scale, _half(b[:, 2:4]) * low)


def _q5_k(b: Tensor) -> Tensor:
    scale, low = _six_bit_pairs(b[:, 4:16])
    q = _fields(b[:, 48:].unflatten(1, (4, 32)), 4, 2).flatten(1) | _fields(b[:, 16:48], 1, 8).flatten(1) << 4
    return _grouped(q, _half(b[:, :2]) * scale, _half(b[:, 2:4]) * low)


def _q6_k(b: Tensor) -> Tensor:
    low = _fields(b[:, :128].unflatten(1, (2, 64)), 4, 2).flatten(1)
    high = _fields(b[:, 128:192].unflatten(1, (2, 32)), 2, 4).flatten(1)
    return _grouped((low | high << 4).float() - 32, _half(b[:, 208:]) * _signed(b[:, 192:208]))


def _iq4_xs(b: Tensor) -> Tensor:
    high = _fields(b[:, 2:4], 2, 4).mT.flatten(1)  # [n, 8], two bits each
    low = _fields(b[:, 4:8], 4, 2).mT.flatten(1)
    q = _fields(b[:, 8:].unflatten(1, (8, 16)), 4, 2).flatten(1)
    return _grouped(_uneven(q), _half(b[:, :2]) * ((low | high << 4).float() - 32))


PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = {
    "F32": BlockType(0, 1, 4),
    "F16": BlockType(1, 1, 2),
    "Q4_0": BlockType(2, 32, 18, _q4_0),
    "Q4_1": BlockType(3, 32, 20, _q4_1),
    "Q5_0": BlockType(6, 32, 22, _q5_0),
    "Q5_1": BlockType(7, 32, 24, _q5_1),
    "Q8_0": BlockType(8, 32, 34, _q8_0),
    "Q2_K": BlockType(10, 256, 84, _q2_k),
    "Q3_K": BlockType(11, 256, 110, _q3_k),
    "Q4_K": BlockType(12, 256, 144, _q4_k),
    "Q5_K": BlockType(13, 256, 176, _q5_k),
    "Q6_K": BlockType(14, 256, 210, _q6_k),
    "IQ2_XXS": BlockType(16, 256, 66),
    "IQ2_XS": BlockType(17, 256, 74),
    "IQ3_XXS": BlockType(18, 256, 98),
    "IQ1_S": BlockType(19, 256, 50),
    "IQ4_NL": BlockType(20, 32, 18, _iq4_nl),
    "IQ3_S": BlockType(21, 256, 110),
    "IQ2_S": BlockType(22, 256, 82),
    "IQ4_XS": BlockType(23, 256, 136, _iq4_xs),
    "F64": BlockType(28, 1, 8),
    "IQ1_M": BlockType(29, 256, 56),
    "BF16": BlockType(30, 1, 2),
    "TQ1_0": BlockType(34, 256, 54),
    "TQ2_0": BlockType(35, 256, 66),
    "MXFP4": BlockType(39, 32, 17),
    "NVFP4": BlockType(40, 64, 36),
}
BY_NUMBER = {kind.number: name for name, kind in TYPES.items()}


def size(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape; raises ValueError where its rows are no whole blocks."""
    kind, count = TYPES[name], math.prod(shape)
    if (shape[-1] if shape else 1) % kind.values:
        raise ValueError(f"rows of {shape[-1]} values are no multiple of {name}'s {kind.values}")
    return count // kind.values * kind.bytes
