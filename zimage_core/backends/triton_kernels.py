"""The kernels of `fused` in Triton. Importing this needs Triton, which PyTorch brings for GPUs on Linux.

Every value is computed in float32 and rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PIECE = 1024  # elements of a program of `gated`: 16 bytes of 16-bit numbers for each thread of four warps


@triton.jit
def gated_kernel(a, b, factor, count, PIECE: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    inside = places < count
    exact = tl.load(a + places, inside).to(tl.float32)
    found = exact * tl.sigmoid(exact * factor) * tl.load(b + places, inside).to(tl.float32)
    tl.store(a + places, found.to(a.dtype.element_ty), inside)


@triton.jit
def add_normed_kernel(
    out, x, h, gain, gate, eps, width, x_item, x_row, h_item, h_row, gate_item, gate_row,
    HAS_GATE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program for each token; WIDTH: the power of two from `width` on."""
    row, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    exact = tl.load(h + item * h_item + row * h_row + columns, inside, 0.0).to(tl.float32)
    factor = tl.load(gain + columns, inside, 0.0).to(tl.float32)
    factor *= tl.rsqrt(tl.sum(exact * exact, 0) / width + eps)
    if HAS_GATE:
        factor *= tl.load(gate + item * gate_item + row * gate_row + columns, inside, 0.0).to(tl.float32)
    found = tl.load(x + item * x_item + row * x_row + columns, inside, 0.0).to(tl.float32) + exact * factor
    place = out + (item * tl.num_programs(0) + row) * width
    tl.store(place + columns, found.to(out.dtype.element_ty), inside)


def gated_(a: Tensor, b: Tensor, factor: float) -> None:
    count = a.numel()
    gated_kernel[(triton.cdiv(count, PIECE),)](a, b, factor, count, PIECE)


def add_normed(out: Tensor, x: Tensor, h: Tensor, gain: Tensor, gate: Tensor | None, eps: float) -> None:
    """All but gain [D] are [B, S, D] (repeated by strides of 0, perhaps), out is contiguous."""
    items, rows, width = h.shape
    gate_item, gate_row = (0, 0) if gate is None else gate.stride()[:2]
    add_normed_kernel[(rows, items)](
        out, x, h, gain, gain if gate is None else gate, eps, width, *x.stride()[:2], *h.stride()[:2],
        gate_item, gate_row, HAS_GATE=gate is not None, WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
