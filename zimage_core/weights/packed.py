"""Layers whose weights stay quantized in memory and are expanded when they are used, with LoRA on top.

A layer may hold several quantized parts, stacked by rows: a fused q, k, v of a file that has them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.matmul import LINEAR_KINDS, Embedding, Linear, linear
from .quantized import Packed


class PackedLayer(nn.Module):
    """What linear layers and embeddings share. GGUF's types only: their rows are whole blocks, so any can be taken."""

    def __init__(self, parts: Sequence[Packed], dtype: torch.dtype):
        """dtype: of the expanded weight."""
        super().__init__()
        self.parts = [(part.format, part.shape) for part in parts]
        self.dtype = dtype
        self.changes: Callable[[Tensor], Tensor] | None = None  # of LoRA: in the expanded weight's place
        for number, part in enumerate(parts):
            self.register_buffer(f"packed_{number}", part.tensors["weight"])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return sum(shape[0] for _, shape in self.parts), self.parts[0][1][1]

    def expanded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] without changes."""
        buffers = (self.get_buffer(f"packed_{number}") for number in range(len(self.parts)))
        parts = (Packed(name, shape, {"weight": raw}) for (name, shape), raw in zip(self.parts, buffers, strict=True))
        rows = [part.expand(dtype) for part in parts]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in `dtype`, made anew each time."""
        if not self.changes:
            return self.expanded(self.dtype)
        return self.changes(self.expanded()).to(self.dtype)


class PackedLinear(PackedLayer):
    """nn.Linear with a packed weight."""

    def __init__(self, parts: Sequence[Packed], dtype: torch.dtype, bias: nn.Parameter | None = None):
        super().__init__(parts, dtype)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


LINEAR_KINDS.add(PackedLinear)


class PackedEmbedding(PackedLayer):
    """nn.Embedding with a packed weight; only the rows that are asked for are expanded."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.changes or len(self.parts) > 1:
            return F.embedding(ids, self.weight)
        ((name, (rows, columns)),) = self.parts
        raw: Tensor = self.get_buffer("packed_0").view(rows, -1)[ids.flatten()]
        return Packed(name, (*ids.shape, columns), {"weight": raw}).expand(self.dtype)


def replace(model: nn.Module, name: str, parts: Sequence[Packed], dtype: torch.dtype) -> bool:
    """Puts a packed layer in the place of the one whose weight has this name; False where it is no such layer."""
    path, _, last = name.rpartition(".")
    layer: Any = model.get_submodule(path)
    kinds: dict[type, type[PackedLayer]] = {Linear: PackedLinear, Embedding: PackedEmbedding}
    if last != "weight" or type(layer) not in kinds:
        return False
    bias = {"bias": layer.bias} if isinstance(layer, nn.Linear) else {}
    model.set_submodule(path, kinds[type(layer)](parts, dtype, **bias))
    return True


def layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Name of the weight -> the packed layer that has it."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
