"""LoRA onto weights and off again, in place and by pieces; and how much two of them overlap (numbers: `formulas`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..weights import packed
from .files import Lora, Target
from .formulas import ALL, Adapter, Piece

# Onto a model

Change = tuple[Target, Adapter, float]  # at this strength
PIECE = 2**21  # numbers that are changed at a time


@torch.no_grad()
def add(model: nn.Module, component: str, loras: Sequence[tuple[Lora, float]]) -> dict[str, Tensor]:
    """Adds LoRAs with their strengths to a model's weights; returns the weights as they were, for `remove`.

    Each change is computed from the original weight in float32, so the order of the LoRAs does not matter. Weights
    that stay quantized are changed whenever they are expanded.
    """
    parameters = dict(model.named_parameters())
    layers = packed.layers(model)
    before: dict[str, Tensor] = {}
    changes: dict[str, list[Change]] = {}
    for lora, strength in loras:
        for target, adapter in lora.of(component).items():
            changes.setdefault(target.name, []).append((target, adapter, strength))
    for name, together in changes.items():
        if name in layers:
            layers[name].changes = functools.partial(apply, changes=together)
            continue
        parameter = parameters[name]
        before[name] = parameter.data
        parameter.data = apply(parameter.data, together, torch.empty_like(parameter.data))
    return before


@torch.no_grad()
def apply(weight: Tensor, changes: Sequence[Change], out: Tensor | None = None) -> Tensor:
    """Writes the weight with all changes to `out` (None: over the weight), and returns that.

    Each change is computed from the weight as it was, in float32, and the sum is rounded once. This goes by rows or by
    columns, whichever all adapters allow, so that it takes little more memory than PIECE numbers a few times.
    """
    out = weight if out is None else out
    exact = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
    axes = {0, 1} if weight.ndim > 1 else {0}
    made: list[tuple[int, int, Piece]] = []  # first row, number of rows, what is added to pieces of them
    for target, adapter, strength in changes:
        first, count = target.rows(len(weight))
        shape = (count, *weight.shape[1:])
        axes &= adapter.axes(shape)
        made.append((first, count, adapter.pieces(shape, exact, strength)))
    axis = min(axes, default=0)
    size = weight.shape[axis]
    step = max(1, min(size, PIECE * size // max(1, weight.numel()))) if axes else max(1, size)
    for begin in range(0, size, step):
        end = min(begin + step, size)
        base = weight.narrow(axis, begin, end - begin).to(exact.dtype)
        total = torch.zeros_like(base)
        for first, count, piece in made:
            top, bottom = (max(begin, first), min(end, first + count)) if axis == 0 else (first, first + count)
            if top < bottom:
                held = slice(top - begin, bottom - begin) if axis == 0 else slice(first, first + count)
                columns = slice(begin, end) if axis else ALL
                total[held] += piece(base[held], slice(top - first, bottom - first), columns)
        out.narrow(axis, begin, end - begin).copy_(total.add_(base))
    return out


@torch.no_grad()
def remove(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Puts the weights back that `add` replaced, bit for bit."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, weight in before.items():
        parameters[name].data = weight
    for layer in packed.layers(model).values():
        layer.changes = None


@torch.no_grad()
def overlap(first: Lora, second: Lora, weights: Mapping[str, Tensor], component: str = "transformer") -> Overlap:
    """How two LoRAs meet on a model, at strength 1. weights: our parameter names -> the weights without LoRA."""
    ours, theirs = first.of(component), second.of(component)
    mixed = _product(ours, theirs, weights)
    norms = [math.sqrt(max(_product(adapters, adapters, weights), 0.0)) for adapters in (ours, theirs)]
    sizes = [
        math.sqrt(sum(float(_rows(weights[target.name], target).float().square().sum()) for target in adapters))
        for adapters in (ours, theirs)
    ]
    cosine = mixed / (norms[0] * norms[1]) if all(norms) else 0.0
    relative = [norm / size if size else 0.0 for norm, size in zip(norms, sizes, strict=True)]
    return Overlap(cosine, *relative)


def _product(first: Mapping[Target, Adapter], second: Mapping[Target, Adapter], weights: Mapping[str, Tensor]) -> float:
    by_name: dict[str, list[Target]] = {}
    for target in second:
        by_name.setdefault(target.name, []).append(target)
    return sum(_inner(a, first[a], b, second[b], weights[a.name]) for a in first for b in by_name.get(a.name, ()))


class Overlap(NamedTuple):
    """Cosine of two changes (near 0 they mix well, near 1 they add up to more than was trained, near -1 they cancel),
    and the norm of each relative to the weights that it changes."""

    cosine: float
    first: float
    second: float


def _inner(a: Target, adapter_a: Adapter, b: Target, adapter_b: Adapter, weight: Tensor) -> float:
    """Sum of the products of two changes, element by element, over the rows that both change."""
    (first_a, count_a), (first_b, count_b) = a.rows(len(weight)), b.rows(len(weight))
    begin, end = max(first_a, first_b), min(first_a + count_a, first_b + count_b)
    if begin >= end:
        return 0.0
    if _is_plain(adapter_a) and _is_plain(adapter_b):  # <B A, D C> = <B^T D, A C^T>: no matrix of W's size is made
        up_a = adapter_a.tensors["up"].float().flatten(1)[begin - first_a : end - first_a]
        up_b = adapter_b.tensors["up"].float().flatten(1)[begin - first_b : end - first_b]
        down_a, down_b = (adapter.tensors["down"].float().flatten(1) for adapter in (adapter_a, adapter_b))
        return adapter_a.scale * adapter_b.scale * float(((up_a.T @ up_b) * (down_a @ down_b.T)).sum())
    change_a = adapter_a.change(_rows(weight, a).float(), 1.0)[begin - first_a : end - first_a]
    change_b = adapter_b.change(_rows(weight, b).float(), 1.0)[begin - first_b : end - first_b]
    return float((change_a * change_b).sum())


def _is_plain(adapter: Adapter) -> bool:
    return adapter.family == "LoRA" and "magnitude" not in adapter.tensors


def _rows(weight: Tensor, target: Target) -> Tensor:
    first, count = target.rows(len(weight))
    return weight[first : first + count]
