"""What a transformer block does between its matmuls, as functions that torch.compile fuses.

They hold no weights and know no layer: one compilation serves all layers, sizes, prompts and LoRA, and every way in
which a host keeps its weights. `CompiledOperations` are for a GPU, `cpu_rows` uses some of the functions on a CPU.

Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .half import SHRINK, like
from .operations import Gain, Modulation, Operations, Tokens, modulated

logger = logging.getLogger(__name__)


class Compiled:
    """A function behind torch.compile with dynamic sizes, compiled when it is first called.

    Where that fails (no C++ compiler, no Triton, ...), it warns once and goes on uncompiled.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.call: Callable[..., Tensor] | None = None

    def __call__(self, *arguments: Any) -> Tensor:
        if self.call is None:  # not earlier: it imports the whole compiler
            self.call = torch.compile(self.function, dynamic=True)
        try:
            return self.call(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("torch.compile does not work here, so %s runs without: %s", self.function.__name__, reason)
            self.call = self.function
            return self.function(*arguments)


@Compiled
def normed(x: Tensor, gain: Tensor, eps: float, scale: Tensor | None = None, half: bool = False) -> Tensor:
    """x / rms(x) * gain * (1 + scale) over the last dimension, in float32; back in x's dtype.

    half: in float16, and smaller by SHRINK.
    """
    exact = x.float()
    gain = gain.float() if scale is None else torch.addcmul(gain.float(), gain.float(), scale.float())
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * gain
    return (exact * SHRINK).half() if half else exact.to(x.dtype)


@Compiled
def add_normed(x: Tensor, h: Tensor, gain: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """x + tanh(gate) * h / rms(h) * gain, in float32; back in x's dtype."""
    exact = h.float()
    gain = gain.float() if gate is None else gain.float() * gate.float().tanh()
    return (x.float() + exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


@Compiled
def gated(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b. In float16 a and b are smaller by SHRINK, and the result by its square."""
    if a.dtype != torch.float16:
        return F.silu(a) * b
    return (a.float() * (a.float() / SHRINK).sigmoid() * b.float()).half()


@Compiled
def norm_rotate(qk: Tensor, q_gain: Tensor, k_gain: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm of each head of q and k [B, N, 2, heads, head_dim], and their rotation by angles [1 or B, N, head_dim/2].

    Gains: [head_dim].
    """
    exact = qk.float()
    gains = torch.stack((q_gain, k_gain)).float().unsqueeze(1)  # (2, 1, head_dim)
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * gains
    even, odd = exact.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., None, None, :], sin[..., None, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(qk.dtype)


class CompiledOperations(Operations):
    """These functions, in float16 on smaller numbers (`half`)."""

    def __init__(self, gain: Gain, half: bool = False):
        self.gain = gain
        self.half = half
        self.shrink = SHRINK if half else 1.0

    def modulation(self, block: Any, x: Tensor, time: Tensor | None) -> Modulation:
        """As the block has them: the functions make factors and gates of them."""
        if time is None:
            return Modulation(None, None, None, None)
        before_attention, after_attention, before_mlp, after_mlp = modulated(block, time).chunk(4, dim=-1)
        return Modulation(before_attention, after_attention, before_mlp, after_mlp)

    def norm(self, norm: Any, x: Tensor, scale: Any) -> Tensor:
        return normed(x, self._gain(norm, x), norm.eps, scale, self.half)

    def heads(self, qkv: Tensor, layer: Any, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv.unflatten(-1, (3, layer.n_heads, -1))  # (B, S, 3, heads, head_dim)
        gains = self._gain(layer.q_norm, qkv), self._gain(layer.k_norm, qkv)
        cos, sin = tokens.rotations[:, :, 0, :, 0, 0], tokens.rotations[:, :, 0, :, 1, 0]
        qk = norm_rotate(qkv[:, :, :2], *gains, layer.q_norm.eps * self.shrink**2, cos, sin)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)
        return q[:, :, : tokens.queries], k, qkv[:, :, 2].transpose(1, 2)

    def gated(self, a: Tensor, b: Tensor) -> Tensor:
        return gated(a, b)

    def add_normed(self, x: Tensor, h: Tensor, norm: Any, gate: Any, shrink: float) -> Tensor:
        return add_normed(x, h, self._gain(norm, x), norm.eps * shrink**2, gate)

    def _gain(self, norm: Any, x: Tensor) -> Tensor:
        return self.gain(norm, like(x) if self.half else x)
