"""LoRA and its relatives as formulas: what each family of adapters makes of a weight.

Letters: W a weight [out, in], s the strength, r the rank, n blocks of size k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8  # keeps the constraint of OFT finite where the rotation is none


@dataclass(frozen=True)
class Adapter:
    """What a file holds for one weight."""

    family: str  # LoRA, LoKr, LoHa, GLoRA, OFT, BOFT, diff
    tensors: Mapping[str, Tensor]

    @property
    def alpha(self) -> float | None:
        alpha = self.tensors.get("alpha")
        return None if alpha is None else float(alpha)

    @property
    def rank(self) -> int | None:
        for name, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
            if name in self.tensors:
                return self.tensors[name].shape[axis]
        return None

    def change(self, weight: Tensor, strength: float) -> Tensor:
        """What is added to W [out, in] (or a bias or norm [out]) at this strength; in W's dtype, float32 or float64."""
        parts = {name: tensor.to(weight.device, weight.dtype) for name, tensor in self.tensors.items()}
        change = FAMILIES[self.family].change(parts, weight, self.scale, strength)
        if "magnitude" not in parts:
            return change
        # DoRA (arXiv:2402.09353): direction from the merged weight, length learnt; s runs from W to the result
        merged = weight + FAMILIES[self.family].change(parts, weight, self.scale, 1.0)
        magnitude = parts["magnitude"]
        by_rows = magnitude.ndim == 1 or magnitude.shape[0] == weight.shape[0]
        norm = merged.norm(dim=1 if by_rows else 0, keepdim=True)
        magnitude = magnitude.reshape(-1, 1) if by_rows else magnitude.reshape(1, -1)
        return strength * (merged * (magnitude / norm) - weight)

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without an alpha, or where the family has no rank."""
        rank = self.rank
        return 1.0 if self.alpha is None or rank is None else self.alpha / rank


# The families. Each: the parts that make it, and what it adds to W


def _lora(p: Mapping[str, Tensor], weight: Tensor, scale: float, strength: float) -> Tensor:
    return (strength * scale) * (p["up"].flatten(1) @ p["down"].flatten(1))


def _loha(p: Mapping[str, Tensor], weight: Tensor, scale: float, strength: float) -> Tensor:
    """Hadamard product of two low-rank matrices (arXiv:2108.06098)."""
    return (strength * scale) * ((p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]))


def _lokr(p: Mapping[str, Tensor], weight: Tensor, scale: float, strength: float) -> Tensor:
    """Kronecker product (LyCORIS). `scale` is 1 if neither factor is decomposed, whatever alpha says."""
    first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    second = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    return (strength * scale) * torch.kron(first, second.flatten(1))


def _glora(p: Mapping[str, Tensor], weight: Tensor, _scale: float, strength: float) -> Tensor:
    """W A + B, both low-rank (arXiv:2306.07967); LyCORIS has turned its factors round between versions."""
    a1, a2, b1, b2 = (p[f"glora_{name}"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1] and b2.shape[0] == weight.shape[0]
    rank = a1.shape[0] if old else a1.shape[1]
    scale = float(p["alpha"]) / rank if "alpha" in p else 1.0
    change = b2 @ b1 + weight @ a2 @ a1 if old else b1 @ b2 + weight @ a1 @ a2
    return (strength * scale) * change


def _oft(p: Mapping[str, Tensor], weight: Tensor, _scale: float, strength: float) -> Tensor:
    """The rows of W turned block by block (arXiv:2306.07280); s runs from no turn to the whole."""
    turns = _rotations(p, strength)  # (n, k, k)
    turned = torch.einsum("n i j, n i d -> n j d", turns, weight.unflatten(0, turns.shape[:2])).flatten(0, 1)
    return _rescaled(p, turned, strength) - weight


def _boft(p: Mapping[str, Tensor], weight: Tensor, _scale: float, strength: float) -> Tensor:
    """OFT in the butterfly order of blocks (arXiv:2311.06243)."""
    turned = weight
    for level, turns in enumerate(_rotations(p, strength)):  # (n, k, k)
        half = 2**level * (turns.shape[-1] // 2)
        turned = turned.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2).unflatten(0, turns.shape[:2])
        turned = torch.einsum("n i j, n j d -> n i d", turns, turned)
        turned = turned.flatten(0, 1).unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    return _rescaled(p, turned, strength) - weight


def _rotations(p: Mapping[str, Tensor], strength: float) -> Tensor:
    """Cayley transforms of the skew parts, mixed with the identity by 1 - s."""
    blocks = p["oft_blocks"]
    skew = blocks - blocks.mT
    constraint = float(p["alpha"]) if "alpha" in p else 0.0
    if constraint > 0 and (norm := skew.norm() + EPS) > constraint:
        skew = skew * (constraint / norm)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return strength * ((eye + skew) @ torch.linalg.inv(eye - skew)) + (1 - strength) * eye


def _rescaled(p: Mapping[str, Tensor], turned: Tensor, strength: float) -> Tensor:
    return turned * (1 + strength * (p["rescale"].reshape(-1, 1) - 1)) if "rescale" in p else turned


def _diff(p: Mapping[str, Tensor], weight: Tensor, _scale: float, strength: float) -> Tensor:
    return strength * p["diff"].reshape(weight.shape)


@dataclass(frozen=True)
class Family:
    """Which parts a file must have for it, one of several ways, and the formula."""

    needs: tuple[tuple[str, ...], ...]
    change: Callable[[Mapping[str, Tensor], Tensor, float, float], Tensor]


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
    "GLoRA": Family((("glora_a1", "glora_a2", "glora_b1", "glora_b2"),), _glora),
    "OFT": Family((("oft_blocks",),), _oft),
    "BOFT": Family((("oft_blocks",),), _boft),
    "diff": Family((("diff",),), _diff),
}
EXTRAS = {"alpha", "magnitude", "rescale"}
