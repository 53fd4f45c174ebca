"""A transformer block in float16, which ends at 65504 where Z-Image's activations don't.

What a block adds to its tokens has passed an RMSNorm, which takes a factor out again. So both branches run on inputs
that are made smaller by a power of two, and the norms behind them get an eps that is smaller by its square: the same
numbers bit for bit, as long as none of them leaves float16's normal range, with more room above. The factor lies in
vectors of the width and costs nothing per token.

The sum of all branches passes no such norm. `largest_sum` tells whether it may leave float16; tokens are then float32.

Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TransformerConfig
from .attention import Attention

# Values, attention and the two products of the MLP are kept at a sixteenth (up to a million fits), what these two gate
# and the MLP's result at its square (16 million). More room would cost small numbers their last bits.
SHRINK = 2.0**-4
SHRINK_MLP = SHRINK**2
# From here on float16 knows no sigmoid but 1. Some devices compute exp in float16, which holds exp(11).
SIGMOID_IS_ONE = 11.0
SUM_FITS = 60_000.0  # leaves float16's roundings a tenth
LATENTS_WITHIN = 16.0  # noise stays within 6, and latents of pictures as well


def run(
    block: Any,  # a transformer.Block, from further up
    x: Tensor,
    rotation: Tensor,
    adaln: Tensor | None,
    attention: Attention,
    mask: Tensor | None = None,
    kept: int | None = None,
) -> Tensor:
    """The block on x [B, N, D], float16 or float32, with the arguments of its `forward`; matrix products in float16."""
    layer, mlp = block.attention, block.feed_forward
    before: Any = (SHRINK, SHRINK)
    gates: Any = (None, None)
    if adaln is not None:
        modulation = block.adaLN_modulation(adaln).unsqueeze(1).unflatten(-1, (2, 2, -1))  # (B, 1, 2, 2, D)
        before = torch.rsub(modulation[..., 0, :], SHRINK, alpha=-SHRINK).unbind(2)  # SHRINK * (1 + scale)
        gates = modulation[..., 1, :].tanh().unbind(2)
    h = _normed(block, block.attention_norm1, x, before[0])
    q, k, v = layer.qkv(h).unflatten(-1, (3, layer.n_heads, -1)).unbind(2)  # each (B, N, heads, head_dim)
    q, k = layer.norm_and_rotate(q[:, :kept], k, rotation, layer.q_norm, layer.k_norm, SHRINK)
    h = layer.out(attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask))  # (B, kept, D)
    del q, k, v  # the feed-forward is where a step needs most memory
    x = _add_normed(block, x[:, :kept], gates[0], block.attention_norm2, h, SHRINK)
    h = _normed(block, block.ffn_norm1, x, before[1])
    h = mlp.w2(gated(mlp.w1(h), mlp.w3(h)))
    return _add_normed(block, x, gates[1], block.ffn_norm2, h, SHRINK_MLP)


def gated(a: Tensor, b: Tensor) -> Tensor:
    """SHRINK_MLP * silu(a / SHRINK) * b / SHRINK, for a and b that were made smaller by SHRINK."""
    # This is a * sigmoid(a / SHRINK) in one pass, and a / SHRINK can't overflow in it.
    silu: Tensor = torch.ops.aten.softplus_backward(a, a, 1 / SHRINK, SIGMOID_IS_ONE)
    return silu.mul_(b)


def normed(norm: Any, x: Tensor, gain: Callable[[Any, Tensor], Tensor], factor: float = 1.0) -> Tensor:
    """norm(x / factor), an RMSNorm, without x / factor, which float16 may not hold. gain: see `Block.gain`."""
    return F.rms_norm(x, x.shape[-1:], gain(norm, x).to(x.dtype), norm.eps * factor**2)


def like(x: Tensor) -> Tensor:
    """An empty float16 tensor where x is: weights are read for that, whatever the tokens are carried in."""
    return x.new_empty(0, dtype=torch.float16)


def _normed(block: Any, norm: Any, x: Tensor, scale: Tensor | float) -> Tensor:
    """norm(x) * scale, in float16."""
    if x.dtype == torch.float16:
        return normed(norm, x, block.gain) * scale
    return (F.rms_norm(x, x.shape[-1:], None, norm.eps) * (block.gain(norm, like(x)) * scale)).half()


def _add_normed(block: Any, x: Tensor, gate: Tensor | None, norm: Any, h: Tensor, factor: float) -> Tensor:
    """x + gate * norm(h / factor), in x's dtype."""
    if x.dtype == torch.float16:
        h = normed(norm, h, block.gain, factor)
        return x + h if gate is None else torch.addcmul(x, gate, h)
    gain = block.gain(norm, h)  # with it a result may leave float16, too
    h = F.rms_norm(h, h.shape[-1:], None, norm.eps * factor**2)
    return torch.addcmul(x, gain if gate is None else gain * gate, h)


def largest_sum(read: Callable[[str], Tensor], config: TransformerConfig) -> float:
    """What no token's absolute value exceeds after any block, by the weights; `read` gives one by its name.

    A normed row of D numbers holds none above sqrt(D), and gates are at most 1: so a branch adds at most its norm's
    gain times sqrt(D). Only the embedders and the gains are read, 20 MB of the published model.
    """

    def added(stage: str, count: int) -> Tensor:
        names = (f"{stage}.{i}.{norm}.weight" for i in range(count) for norm in ("attention_norm2", "ffn_norm2"))
        return math.sqrt(config.dim) * sum((read(name).float().abs() for name in names), torch.zeros(config.dim))

    def embedded(layer: str, length: Tensor | float) -> Tensor:
        weight = read(f"{layer}.weight").float() * (length if isinstance(length, Tensor) else 1.0)
        rows = torch.linalg.vector_norm(weight, dim=1)  # of a vector of length 1, no product is larger
        return rows * (1.0 if isinstance(length, Tensor) else length) + read(f"{layer}.bias").float().abs()

    image = embedded("x_embedder", LATENTS_WITHIN * math.sqrt(config.patch_dim))
    gain = read("cap_embedder.0.weight").float()
    caption = embedded("cap_embedder.1", gain * math.sqrt(config.cap_feat_dim))
    image = torch.maximum(image, read("x_pad_token").float().abs().flatten())
    caption = torch.maximum(caption, read("cap_pad_token").float().abs().flatten())
    image = image + added("noise_refiner", config.n_refiner_layers)
    caption = caption + added("context_refiner", config.n_refiner_layers)
    return float((torch.maximum(image, caption) + added("layers", config.n_layers)).max())
