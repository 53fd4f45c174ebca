"""Norms and rotations by ComfyUI's kernel package, and weights of norms where ComfyUI keeps them."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.cli_args import args
from torch import Tensor

from ...zimage_core.backends import fused
from ...zimage_core.backends.half import HalfOperations
from ...zimage_core.backends.operations import LeanOperations, Operations

try:  # ComfyUI's kernel package; older ones lack these two
    from comfy_kitchen import rms_rope, rms_rope1
except ImportError:
    rms_rope = rms_rope1 = None


def may_use_triton() -> bool:
    """As ComfyUI's flag says; older ones have none."""
    return not getattr(args, "disable_triton_backend", False)


fused.enabled = may_use_triton()


class _Kernels(Operations):
    """In one pass: the norm and rotation of q and k by ComfyUI's kernel package, and a branch's norm with its sum."""

    def add_normed(self, x: Tensor, h: Tensor, norm: Any, gate: Any, shrink: float) -> Tensor:
        if fused.may_run(x, h):
            weight, bias, lent = _cast(norm, h)
            found = fused.add_normed(x, h, weight, gate, norm.eps * shrink**2)
            comfy.ops.uncast_bias_weight(norm, weight, bias, lent)
            if found is not None:
                return found
        return super().add_normed(x, h, norm, gate, shrink)

    def norm_rotate(self, q: Tensor, k: Tensor, rotations: Tensor, q_norm: Any, k_norm: Any) -> tuple[Tensor, Tensor]:
        if rms_rope is None or q.device.type == "cpu" or torch.is_grad_enabled():
            return super().norm_rotate(q, k, rotations, q_norm, k_norm)
        return self.by_kernel(q, k, rotations, q_norm, k_norm)

    def by_kernel(self, q: Tensor, k: Tensor, rotations: Tensor, q_norm: Any, k_norm: Any) -> tuple[Tensor, Tensor]:
        eps = q_norm.eps * self.shrink**2
        (q_gain, q_bias, q_lent), (k_gain, k_bias, k_lent) = _cast(q_norm, q), _cast(k_norm, k)
        if q.shape == k.shape:
            q, k = rms_rope(q, k, rotations, q_gain, k_gain, eps)
        else:
            q = rms_rope1(q, rotations[:, : q.shape[1]], q_gain, eps)
            k = rms_rope1(k, rotations, k_gain, eps)
        comfy.ops.uncast_bias_weight(q_norm, q_gain, q_bias, q_lent)
        comfy.ops.uncast_bias_weight(k_norm, k_gain, k_bias, k_lent)
        return q, k


class KernelOperations(_Kernels, LeanOperations):
    pass


class KernelHalfOperations(_Kernels, HalfOperations):
    pass


def gain(norm: Any, like: Tensor) -> Tensor:
    """An RMSNorm's weight (`operations.Gain`), where ComfyUI moves, casts and patches weights as they are used."""
    weight, bias, lent = _cast(norm, like)
    is_lent = lent[0] is not None or "_v" in vars(norm)  # by a stream or the paging of weights
    own = weight.clone() if is_lent else weight
    comfy.ops.uncast_bias_weight(norm, weight, bias, lent)
    return own


def _cast(norm: Any, like: Tensor) -> Any:
    """(weight, bias, what `uncast_bias_weight` wants): itself where nothing is to be done, so nothing is launched."""
    return comfy.ops.cast_bias_weight(norm, like, offloadable=True)
