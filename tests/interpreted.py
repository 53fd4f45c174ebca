"""The kernels of `backends.fused` on the CPU, by Triton's interpreter: how far off float64 blocks' passes are, as JSON.

In a process of its own, as TRITON_INTERPRET=1 is read when Triton is imported.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from torch import Tensor

from zimage_core.backends import fused
from zimage_core.backends.half import SHRINK, HalfOperations
from zimage_core.backends.operations import LeanOperations, Operations, read_gain

from .helpers import relative

SHAPES = [(1, 3, 1000), (2, 8, 256)]  # not in whole pieces, and in whole ones
GATES = [None, (1, 1), (2, 1), (2, 5)]
LEAN, HALF = LeanOperations(read_gain), HalfOperations(read_gain)
# name -> bundle, dtype of tokens, dtype of what a branch makes, by how much that is smaller
CASES: dict[str, tuple[Operations, torch.dtype, torch.dtype, float]] = {
    "float32": (LEAN, torch.float32, torch.float32, 1.0),
    "bfloat16": (LEAN, torch.bfloat16, torch.bfloat16, 1.0),
    "float16": (HALF, torch.float16, torch.float16, SHRINK),
    "float16 beside float32": (HALF, torch.float32, torch.float16, SHRINK),
}
EPS = 0.1  # large enough to be seen


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gated(operations: Operations, shape: tuple[int, ...], dtype: torch.dtype, shrink: float) -> float:
    a, b = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    exact = a.double() / shrink
    expected = exact * exact.sigmoid() * b.double() / shrink * shrink**2
    found = operations.gated(a, b)
    assert found is a
    return relative(found, expected)


def add_normed(
    operations: Operations, dtype: torch.dtype, of_h: torch.dtype, shrink: float, gate: tuple[int, int] | None
) -> float:
    """Of the first 5 of 7 tokens, as in the last block; the gate is a part of something larger, as in a block."""
    x, h = drawn(2, 7, 96, dtype=dtype)[:, :5], drawn(2, 5, 96, dtype=of_h, seed=1)
    norm = SimpleNamespace(weight=drawn(96, dtype=of_h, seed=2), eps=EPS)
    gates = None if gate is None else drawn(*gate, 2, 96, dtype=of_h, seed=3)[..., 1, :]
    exact = h.double() / shrink
    exact = exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm.weight.double()
    expected = x.double() + exact * (1 if gates is None else gates.double())
    before = x.clone()
    found = operations.add_normed(x, h, norm, gates, shrink)
    assert x.equal(before) and found.dtype == dtype
    return relative(found, expected)


@torch.no_grad()
def main() -> dict[str, list[float]]:
    fused.may_run = lambda *_: True
    fused._GATED, fused._ADD_NORMED = fused._gated_, fused._add_normed
    found = {}
    for name, (operations, dtype, of_h, shrink) in CASES.items():
        found[name] = [gated(operations, shape, of_h, shrink) for shape in SHAPES]
        found[name] += [add_normed(operations, dtype, of_h, shrink**power, gate) for power in (1, 2) for gate in GATES]
    assert fused.enabled
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
