"""A transformer block in float16, which ends at 65504 where Z-Image's activations don't.

What a block adds to its tokens has passed an RMSNorm, which takes a factor out again. So both branches run on inputs
that are made smaller by a power of two, and the norms behind them get an eps that is smaller by its square: the same
numbers bit for bit, as long as none of them leaves float16's normal range, with more room above. The factor lies in
vectors of the width and costs nothing per token.

The sum of all branches passes no such norm: where it may leave float16 (`model.numerics`), tokens are float32.

Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Values, attention and the two products of the MLP are kept at a sixteenth (up to a million fits), what these two gate
# and the MLP's result at its square (16 million). More room would cost small numbers their last bits.
SHRINK = 2.0**-4
SHRINK_MLP = SHRINK**2
# From here on float16 knows no sigmoid but 1. Some devices compute exp in float16, which holds exp(11).
SIGMOID_IS_ONE = 11.0


def run(
    block: Any,  # a transformer.Block, from further up
    x: Tensor,
    rotation: Tensor,
    adaln: Tensor | None,
    attention: Callable[..., Tensor],
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
