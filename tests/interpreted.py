"""The kernels of `backends.fused` on the CPU, by Triton's interpreter: how far off float64 they are, as JSON.

In a process of its own, as TRITON_INTERPRET=1 is read when Triton is imported.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from zimage_core.backends import triton_kernels
from zimage_core.backends.half import SHRINK

from .helpers import relative

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(1, 3, 1000), (2, 8, 256)]  # not in whole pieces, and in whole ones
GATES = [None, (1, 1), (2, 1), (2, 5)]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gated(shape: tuple[int, ...], dtype: torch.dtype, factor: float) -> float:
    a, b = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    expected = a.double() * (a.double() * factor).sigmoid() * b.double()
    triton_kernels.gated_(a, b, factor)
    return relative(a.double(), expected)


def add_normed(dtype: torch.dtype, of_h: torch.dtype, gate: tuple[int, int] | None) -> float:
    """Of the first 5 of 7 tokens, as in the last block; the gate is a part of something larger, as in a block."""
    x, h, gain = drawn(2, 7, 96, dtype=dtype)[:, :5], drawn(2, 5, 96, dtype=of_h, seed=1), drawn(96, dtype=of_h, seed=2)
    gates = None if gate is None else drawn(*gate, 2, 96, dtype=of_h, seed=3)[..., 1, :].expand(h.shape)
    exact = h.double()
    exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double()
    expected = x.double() + exact * (1 if gates is None else gates.double())
    out = torch.full((2, 5, 96), torch.nan, dtype=dtype)
    triton_kernels.add_normed(out, x, h, gain, gates, 1e-5)
    return relative(out.double(), expected)


if __name__ == "__main__":
    found: dict[str, list[float]] = {name: [] for name in DTYPES}
    for name, dtype in DTYPES.items():
        found[name] += [gated(shape, dtype, factor) for shape in SHAPES for factor in (1.0, 1 / SHRINK)]
        found[name] += [add_normed(dtype, dtype, gate) for gate in GATES]
    # float16 beside tokens of float32
    found["float32"] += [add_normed(torch.float32, torch.float16, gate) for gate in GATES]
    print(json.dumps(found))
