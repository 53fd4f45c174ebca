"""GGUF's quantized types as tensor programs: blocks of bytes to the numbers that they mean.

A type stores a row of a weight as blocks, each some numbers' low bits with their scales. The layouts are those of
ggml's ggml-quants.c. Types that no Z-Image is published in are left to the `gguf` package, on the CPU.

A GPU is bound by the bytes that this moves, so each type is written to be one kernel when it is compiled, and to move
small whole numbers until the last operation when it is not. Both give the same bits: whatever is multiplied before it
is added to (a number of at most 5 bits, a float16's 11, a scale's 6) is exact in float32, fused or not.

Letters: n blocks, [n, bytes] uint8 in, [n, values] of the dtype that is asked for out.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError

logger = logging.getLogger(__name__)
Expand = Callable[[Tensor, torch.dtype], Tensor]
LARGE = 2**20  # bytes of a weight from which compiled expansion is worth its start


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types."""

    number: int  # in the file
    values: int  # of a block
    bytes: int  # of a block
    expand: Expand | None = None  # None: plain numbers, or left to the package


def expand(name: str, raw: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [*shape] that these bytes mean, on their device: float32, or rounded from it to another float dtype.

    raw: uint8, rows of whole blocks.
    """
    kind = TYPES[name]
    if not torch.compiler.is_compiling() and raw.storage_offset() % 2:  # no float16 numbers can be seen in it
        raw = raw.clone()
    blocks = raw.reshape(-1, kind.bytes)
    if kind.expand is None:
        return _by_package(name, blocks).reshape(shape).to(dtype)
    program = _compiled.get(name, kind.expand) if _pays(blocks) else kind.expand
    return program(blocks, dtype).reshape(shape)


def expand_stacked(parts: Sequence[tuple[str, tuple[int, ...]]], raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights (type, shape) whose bytes follow each other, expanded and stacked by rows: those of a type at once."""
    rows = list[Tensor]()
    for name, group in itertools.groupby(parts, key=lambda part: part[0]):
        shapes = [shape for _, shape in group]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        first, raw = raw.tensor_split((size(name, shape),))
        rows.append(expand(name, first, shape, dtype))
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _by_package(name: str, blocks: Tensor) -> Tensor:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"GGUF weights of type {name} need the gguf package: pip install gguf") from error
    values = gguf.quants.dequantize(blocks.cpu().numpy(), getattr(gguf.GGMLQuantizationType, name))
    return torch.from_numpy(values).to(blocks.device)


# Compiling


def _pays(blocks: Tensor) -> bool:
    """Whether to compile: on a GPU for which torch writes kernels, and where nobody else compiles or only pretends."""
    plain = type(blocks) is Tensor and blocks.is_cuda and blocks.numel() >= LARGE
    return plain and not torch.compiler.is_compiling() and Compiled.works


class Compiled:
    """A type's program behind torch.compile: one compilation for weights of all sizes, when it is first called.

    Where that fails (no Triton, no C compiler, an old GPU, ...), it warns once, and all types go on uncompiled.
    """

    works = importlib.util.find_spec("triton") is not None

    def __init__(self, program: Expand):
        self.program = program
        self.call: Expand | None = None

    def __call__(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        try:
            if self.call is None:  # not earlier: it imports the whole compiler
                self.call = torch.compile(self.program, fullgraph=True)
                logger.info("compiling the expansion of GGUF weights, once for each type")
            torch._dynamo.mark_dynamic(blocks, 0)
            with torch.no_grad():
                return self.call(blocks, dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            Compiled.works = False
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("torch.compile does not work here, so GGUF weights are expanded without: %s", reason)
            return self.program(blocks, dtype)


# Parts of blocks. Whole numbers stay bytes; what is made here may be changed in place


def _half(b: Tensor, at: int) -> Tensor:
    """The float16 number at this byte of each block, [n, 1] float32."""
    if torch.compiler.is_compiling():  # a view of another width would be a kernel's border
        two = b[:, at : at + 2].to(torch.int16)
        return (two[:, :1] | two[:, 1:] << 8).view(torch.float16).float()
    return b.view(torch.float16)[:, at // 2 : at // 2 + 1].float()


def _fields(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` lowest fields of so many bits of each byte [..., k]: [..., count, k], the lowest first."""
    shifts = torch.arange(0, bits * count, bits, device=packed.device, dtype=torch.uint8)
    return (packed.unsqueeze(-2) >> shifts.unsqueeze(-1)).bitwise_and_(2**bits - 1)


def _bits(packed: Tensor) -> Tensor:
    """Bytes [n, k] to their bits, the lowest first: [n, 8k]."""
    return _fields(packed, 1, 8).mT.flatten(1)


def _joined(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """low, changed in place, with `high` above its lowest bits."""
    return low.add_(high, alpha=2**bits)


def _signed(q: Tensor, middle: int) -> Tensor:
    """q, changed in place, less its middle: int8."""
    return q.view(torch.int8).sub_(middle)


# The last operation reads the whole numbers and writes the dtype that is asked for, with nothing of float32 between


def _product(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q * scale, float32 rounded to dtype. q: [n, ...], scale: float32, broadcast."""
    if _rounds_at_once(q):
        return torch.mul(q, scale, out=torch.empty(q.shape, dtype=dtype, device=q.device))
    return (q * scale).to(dtype)


def _line(q: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """q * scale + low, float32 rounded to dtype."""
    if _rounds_at_once(q):
        return torch.addcmul(low, q, scale, out=torch.empty(q.shape, dtype=dtype, device=q.device))
    return (q * scale + low).to(dtype)


def _rounds_at_once(q: Tensor) -> bool:
    """Whether torch's operations may write another dtype than they compute in; a compiler does so of itself."""
    return q.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


# Types of 32 values: one scale, and a lowest value where the range is not symmetric


def _q4_0(b: Tensor, dtype: torch.dtype) -> Tensor:
    return _product(_signed(_fields(b[:, 2:], 4, 2).flatten(1), 8), _half(b, 0), dtype)


def _q4_1(b: Tensor, dtype: torch.dtype) -> Tensor:
    return _line(_fields(b[:, 4:], 4, 2).flatten(1), _half(b, 0), _half(b, 2), dtype)


def _q5_0(b: Tensor, dtype: torch.dtype) -> Tensor:
    q = _joined(_fields(b[:, 6:], 4, 2).flatten(1), _bits(b[:, 2:6]), 4)
    return _product(_signed(q, 16), _half(b, 0), dtype)


def _q5_1(b: Tensor, dtype: torch.dtype) -> Tensor:
    q = _joined(_fields(b[:, 8:], 4, 2).flatten(1), _bits(b[:, 4:8]), 4)
    return _line(q, _half(b, 0), _half(b, 2), dtype)


def _q8_0(b: Tensor, dtype: torch.dtype) -> Tensor:
    return _product(b.view(torch.int8)[:, 2:], _half(b, 0), dtype)


def _iq4_nl(b: Tensor, dtype: torch.dtype) -> Tensor:
    return _product(_uneven(_fields(b[:, 2:], 4, 2).flatten(1)), _half(b, 0), dtype)


UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl
_tables: dict[torch.device, Tensor] = {}  # sending it for every weight would wait for the device each time


def _uneven(q: Tensor) -> Tensor:
    """The entries of UNEVEN: int8."""
    if torch.compiler.is_compiling():  # a table would have to be sent there; a choice of constants is free
        found = torch.zeros_like(q, dtype=torch.int8)
        for at, value in enumerate(UNEVEN):
            found = torch.where(q == at, value, found)
        return found
    table = _tables.get(q.device)
    if table is None:
        table = torch.tensor(UNEVEN, dtype=torch.int8, device=q.device)
        if type(table) is Tensor:  # and nothing that is only traced
            _tables[q.device] = table
    return table[q.int()]


# Types of 256 values: groups of 16 or 32, whose scales are small whole numbers times one for the block


def _grouped(q: Tensor, scale: Tensor, dtype: torch.dtype, low: Tensor | None = None) -> Tensor:
    """q * scale + low for groups: q [n, 256], scale and low [n, groups]."""
    q, scale = q.unflatten(1, (scale.shape[1], -1)), scale.unsqueeze(-1)
    groups = _product(q, scale, dtype) if low is None else _line(q, scale, low.unsqueeze(-1), dtype)
    return groups.flatten(1)


def _six_bit_pairs(b: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of the eight groups of Q4_K and Q5_K, and what is added to them: six bits each, [n, 8] twice."""
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], 1)
    low = torch.cat([second & 63, rest >> 4 | (second >> 6) << 4], 1)
    return _half(b, 0) * scale, -_half(b, 2) * low


def _q2_k(b: Tensor, dtype: torch.dtype) -> Tensor:
    q = _fields(b[:, 16:80].unflatten(1, (2, 32)), 2, 4).flatten(1)
    return _grouped(q, _half(b, 80) * (b[:, :16] & 15), dtype, -_half(b, 82) * (b[:, :16] >> 4))


def _q3_k(b: Tensor, dtype: torch.dtype) -> Tensor:
    low = _fields(b[:, 32:96].unflatten(1, (2, 32)), 2, 4).flatten(1)
    q = _joined(low, _fields(b[:, :32], 1, 8).flatten(1), 2)
    scale = _joined(_fields(b[:, 96:104], 4, 2).flatten(1), _fields(b[:, 104:108], 2, 4).flatten(1), 4)
    return _grouped(_signed(q, 4), _half(b, 108) * _signed(scale, 32), dtype)


def _q4_k(b: Tensor, dtype: torch.dtype) -> Tensor:
    scale, low = _six_bit_pairs(b)
    q = _fields(b[:, 16:].unflatten(1, (4, 32)), 4, 2).flatten(1)
    return _grouped(q, scale, dtype, low)


def _q5_k(b: Tensor, dtype: torch.dtype) -> Tensor:
    scale, low = _six_bit_pairs(b)
    q = _fields(b[:, 48:].unflatten(1, (4, 32)), 4, 2).flatten(1)
    q = _joined(q, _fields(b[:, 16:48], 1, 8).flatten(1), 4)
    return _grouped(q, scale, dtype, low)


def _q6_k(b: Tensor, dtype: torch.dtype) -> Tensor:
    q = _fields(b[:, :128].unflatten(1, (2, 64)), 4, 2).flatten(1)
    q = _joined(q, _fields(b[:, 128:192].unflatten(1, (2, 32)), 2, 4).flatten(1), 4)
    return _grouped(_signed(q, 32), _half(b, 208) * b.view(torch.int8)[:, 192:208], dtype)


def _iq4_xs(b: Tensor, dtype: torch.dtype) -> Tensor:
    high = _fields(b[:, 2:4], 2, 4).mT.flatten(1)  # [n, 8], two bits each
    scale = _joined(_fields(b[:, 4:8], 4, 2).mT.flatten(1), high, 4)
    q = _fields(b[:, 8:].unflatten(1, (8, 16)), 4, 2).flatten(1)
    return _grouped(_uneven(q), _half(b, 0) * _signed(scale, 32), dtype)


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
_compiled = {name: Compiled(kind.expand) for name, kind in TYPES.items() if kind.expand is not None}


def size(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape; raises ValueError where its rows are no whole blocks."""
    kind, count = TYPES[name], math.prod(shape)
    if (shape[-1] if shape else 1) % kind.values:
        raise ValueError(f"rows of {shape[-1]} values are no multiple of {name}'s {kind.values}")
    return count // kind.values * kind.bytes
