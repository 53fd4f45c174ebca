"""What a transformer block does between its matrix products, as functions that torch.compile fuses.

They hold no weights and know no layer: one compilation serves all layers, sizes, prompts and LoRA, and every way in
which a host keeps its weights. `run` is a block made of them, for a GPU; `cpu_rows.run` uses them on a CPU.

Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .half import SHRINK, SHRINK_MLP, like

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
def norm_and_turn(qk: Tensor, q_gain: Tensor, k_gain: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm of each head of q and k [B, N, 2, heads, head_dim], and their rotation by angles [1 or B, N, head_dim/2].

    Gains: [head_dim].
    """
    exact = qk.float()
    gains = torch.stack((q_gain, k_gain)).float().unsqueeze(1)  # (2, 1, head_dim)
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * gains
    even, odd = exact.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., None, None, :], sin[..., None, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(qk.dtype)


def run(
    block: Any,  # a transformer.Block, as it was built (`transformer.is_as_built`)
    x: Tensor,
    rotation: Tensor,
    adaln: Tensor | None,
    attention: Callable[..., Tensor],
    mask: Tensor | None = None,
    kept: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The block on x [B, N, D], with the arguments of its `forward`. dtype: of the matrix products, None is x's.

    In float16 they run on smaller numbers, see `half`.
    """
    half = (dtype or x.dtype) == torch.float16
    shrunk, shrunk_mlp = (SHRINK**2, SHRINK_MLP**2) if half else (1, 1)  # of eps
    needed = like(x) if half else x  # what weights are read for
    layer, mlp = block.attention, block.feed_forward
    modulation: Sequence[Tensor | None]
    modulation = [None] * 4 if adaln is None else block.adaLN_modulation(adaln).unsqueeze(1).chunk(4, dim=-1)
    scale_msa, gate_msa, scale_mlp, gate_mlp = modulation  # each (B, 1, D)
    norm = block.attention_norm1
    qkv = layer.qkv(normed(x, block.gain(norm, needed), norm.eps, scale_msa, half))
    qkv = qkv.unflatten(-1, (3, layer.n_heads, -1))  # (B, N, 3, heads, head_dim)
    gains = block.gain(layer.q_norm, needed), block.gain(layer.k_norm, needed)
    cos, sin = rotation[:, :, 0, :, 0, 0], rotation[:, :, 0, :, 1, 0]
    q, k = norm_and_turn(qkv[:, :, :2], *gains, layer.q_norm.eps * shrunk, cos, sin).permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(q[:, :, :kept], k, qkv[:, :, 2].transpose(1, 2), mask)  # (B, kept, D)
    norm = block.attention_norm2
    x = add_normed(x[:, :kept], layer.out(out), block.gain(norm, needed), norm.eps * shrunk, gate_msa)
    norm = block.ffn_norm1
    h = normed(x, block.gain(norm, needed), norm.eps, scale_mlp, half)
    norm = block.ffn_norm2
    h = mlp.w2(gated(mlp.w1(h), mlp.w3(h)))
    return add_normed(x, h, block.gain(norm, needed), norm.eps * shrunk_mlp, gate_mlp)


def block_gains(block: Any, x: Tensor, adaln: Tensor | None) -> list[Tensor]:
    """What the results of a block's four norms are multiplied by, in their order: float32, [1 or B, 1, D]."""
    norms = (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2)
    gains = [block.gain(norm, x).float().view(1, 1, -1) for norm in norms]
    if adaln is None:
        return gains
    scale_msa, gate_msa, scale_mlp, gate_mlp = block.adaLN_modulation(adaln).float().unsqueeze(1).chunk(4, dim=-1)
    attention1, attention2, mlp1, mlp2 = gains
    return [
        torch.addcmul(attention1, attention1, scale_msa),
        attention2 * gate_msa.tanh(),
        torch.addcmul(mlp1, mlp1, scale_mlp),
        mlp2 * gate_mlp.tanh(),
    ]


def norm_gain(norm: Any, _like: Tensor) -> Tensor:
    """The weight of an RMSNorm, [D], on the device of the tensor that it is for, in whatever dtype."""
    weight: Tensor = norm.weight
    return weight


def finite(x: Tensor) -> Tensor:
    """Cuts off what float16 can't hold, where a block that others changed overflows; other dtypes pass untouched."""
    return torch.nan_to_num(x, nan=0.0) if x.dtype == torch.float16 else x
