"""LoRA and its relatives as formulas: what each family of adapters makes of a weight.

A weight is changed some rows or columns at a time, so that no second matrix of its size is made; each family says along
which of the two its pieces know nothing of each other. Nothing here asks a device for a value, which would wait for it.

Letters: W a weight [out, in], s the strength, r the rank, n blocks of size k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8  # keeps the constraint of OFT finite where the rotation is none
ALL = slice(None)
Parts = Mapping[str, Tensor]
# (W's rows and columns, which rows, which columns) -> what is added to them
Piece = Callable[[Tensor, slice, slice], Tensor]


@dataclass(frozen=True)
class Adapter:
    """What a file holds for one weight."""

    family: str  # LoRA, LoKr, LoHa, GLoRA, OFT, BOFT, diff
    tensors: Mapping[str, Tensor]
    alpha: float | None = None

    @property
    def rank(self) -> int | None:
        for name, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
            if name in self.tensors:
                return self.tensors[name].shape[axis]
        return None

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without an alpha, or where the family has no rank or it is 0 (then nothing is added)."""
        return self._scaled(self.rank)

    def _scaled(self, rank: int | None) -> float:
        return self.alpha / rank if self.alpha is not None and rank else 1.0

    def axes(self, shape: tuple[int, ...]) -> set[int]:
        """Along which axes of W [*shape] pieces can be changed apart: rows (0), columns (1)."""
        axes = set(FAMILIES[self.family].axes if len(shape) > 1 else (0,))
        if (magnitude := self.tensors.get("magnitude")) is not None:
            axes &= {0 if _by_rows(magnitude, shape) else 1}
        return axes

    def pieces(self, shape: tuple[int, ...], like: Tensor, strength: float) -> Piece:
        """What is added to pieces of W [*shape] (or a bias or norm [out]) at this strength, on the device of `like` and
        in its dtype, float32 or float64."""
        # what may be as large as W is cast piece by piece
        dtype = None if self.family == "diff" else like.dtype
        parts = {name: tensor.to(like.device, dtype) for name, tensor in self.tensors.items()}
        change = FAMILIES[self.family].pieces
        if "magnitude" not in parts:
            return change(self, parts, shape, strength)
        # DoRA (arXiv:2402.09353): direction from the merged weight, length learnt; s runs from W to the result
        whole = change(self, parts, shape, 1.0)
        by_rows = _by_rows(parts["magnitude"], shape)
        magnitude = parts["magnitude"].to(like.dtype).reshape((-1, 1) if by_rows else (1, -1))

        def dora(weight: Tensor, rows: slice, columns: slice) -> Tensor:
            merged = weight + whole(weight, rows, columns)
            norm = merged.norm(dim=1 if by_rows else 0, keepdim=True)
            length = magnitude[rows] if by_rows else magnitude[:, columns]
            return strength * (merged * (length / norm) - weight)

        return dora

    def change(self, weight: Tensor, strength: float) -> Tensor:
        """What is added to the whole of W, float32 or float64."""
        return self.pieces(tuple(weight.shape), weight, strength)(weight, ALL, ALL)


def _by_rows(magnitude: Tensor, shape: tuple[int, ...]) -> bool:
    return magnitude.ndim == 1 or magnitude.shape[0] == shape[0]


# The families. Each: the parts that make it, and what it adds to pieces of W


def _lora(adapter: Adapter, p: Parts, shape: tuple[int, ...], strength: float) -> Piece:
    up, down, scale = p["up"].flatten(1), p["down"].flatten(1), strength * adapter.scale
    return lambda weight, rows, columns: scale * (up[rows] @ down[:, columns])


def _loha(adapter: Adapter, p: Parts, shape: tuple[int, ...], strength: float) -> Piece:
    """Hadamard product of two low-rank matrices (arXiv:2108.06098)."""
    a1, b1, a2, b2 = (p[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale = strength * adapter.scale
    return lambda weight, rows, columns: scale * ((a1[rows] @ b1[:, columns]) * (a2[rows] @ b2[:, columns]))


def _lokr(adapter: Adapter, p: Parts, shape: tuple[int, ...], strength: float) -> Piece:
    """Kronecker product (LyCORIS). `scale` is 1 if neither factor is decomposed, whatever alpha says."""
    first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    second = (p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]).flatten(1)
    scale, (height, width) = strength * adapter.scale, second.shape
    every = [torch.arange(first.shape[axis] * second.shape[axis], device=first.device) for axis in (0, 1)]

    def piece(weight: Tensor, rows: slice, columns: slice) -> Tensor:
        i, j = every[0][rows, None], every[1][columns]
        return scale * (first[i // height, j // width] * second[i % height, j % width])

    return piece


def _glora(adapter: Adapter, p: Parts, shape: tuple[int, ...], strength: float) -> Piece:
    """W A + B, both low-rank (arXiv:2306.07967); LyCORIS has turned its factors round between versions."""
    a1, a2, b1, b2 = (p[f"glora_{name}"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1] and b2.shape[0] == shape[0]:  # the older way
        a1, a2, b1, b2 = a2, a1, b2, b1
    scale = strength * adapter._scaled(a1.shape[1])
    return lambda weight, rows, columns: scale * (b1[rows] @ b2 + weight @ a1 @ a2)


def _oft(adapter: Adapter, p: Parts, shape: tuple[int, ...], strength: float) -> Piece:
    """The rows of W turned block by block (arXiv:2306.07280); s runs from no turn to the whole."""
    turns, rescale = _rotations(adapter, p, strength), p.get("rescale")  # (n, k, k)

    def piece(weight: Tensor, rows: slice, columns: slice) -> Tensor:
        turned = torch.einsum("n i j, n i d -> n j d", turns, weight.unflatten(0, turns.shape[:2])).flatten(0, 1)
        return _rescaled(rescale, turned, strength) - weight

    return piece


def _boft(adapter: Adapter, p: Parts, shape: tuple[int, ...], strength: float) -> Piece:
    """OFT in the butterfly order of blocks (arXiv:2311.06243)."""
    levels, rescale = _rotations(adapter, p, strength), p.get("rescale")

    def piece(weight: Tensor, rows: slice, columns: slice) -> Tensor:
        turned = weight
        for level, turns in enumerate(levels):  # (n, k, k)
            half = 2**level * (turns.shape[-1] // 2)
            turned = turned.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2).unflatten(0, turns.shape[:2])
            turned = torch.einsum("n i j, n j d -> n i d", turns, turned)
            turned = turned.flatten(0, 1).unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return _rescaled(rescale, turned, strength) - weight

    return piece


def _rotations(adapter: Adapter, p: Parts, strength: float) -> Tensor:
    """Cayley transforms of the skew parts, mixed with the identity by 1 - s."""
    blocks = p["oft_blocks"]
    skew = blocks - blocks.mT
    if adapter.alpha is not None and adapter.alpha > 0:  # what the norm may be at most
        skew = skew * (adapter.alpha / (skew.norm() + EPS)).clamp(max=1)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    for level in skew if skew.ndim == 4 else [skew]:  # BOFT's one after the other: they are large
        inverse = torch.linalg.inv_ex(eye - level).inverse  # there always is one, so nothing has to be asked
        level.copy_(strength * ((eye + level) @ inverse) + (1 - strength) * eye)
    return skew


def _rescaled(rescale: Tensor | None, turned: Tensor, strength: float) -> Tensor:
    return turned if rescale is None else turned * (1 + strength * (rescale.reshape(-1, 1) - 1))


def _diff(adapter: Adapter, p: Parts, shape: tuple[int, ...], strength: float) -> Piece:
    diff = p["diff"].reshape(shape)

    def piece(weight: Tensor, rows: slice, columns: slice) -> Tensor:
        return strength * (diff[rows, columns] if diff.ndim > 1 else diff[rows]).to(weight.dtype)

    return piece


@dataclass(frozen=True)
class Family:
    """Which parts a file must have for it, one of several ways, the formula, and the axes of `Adapter.axes`."""

    needs: tuple[tuple[str, ...], ...]
    pieces: Callable[[Adapter, Parts, tuple[int, ...], float], Piece]
    axes: tuple[int, ...] = (0, 1)


FAMILIES = {
    "LoRA": Family((("down", "up"),), _lora),
    "LoHa": Family((("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),), _loha),
    "LoKr": Family(
        (
            ("lokr_w1", "lokr_w2"),
            ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
            ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
            ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
        ),
        _lokr,
    ),
    "GLoRA": Family((("glora_a1", "glora_a2", "glora_b1", "glora_b2"),), _glora, (0,)),
    "OFT": Family((("oft_blocks",),), _oft, (1,)),
    "BOFT": Family((("oft_blocks",),), _boft, (1,)),
    "diff": Family((("diff",),), _diff),
}
EXTRAS = {"alpha", "magnitude", "rescale"}
