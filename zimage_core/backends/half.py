"""Operations of a transformer block in float16, which ends at 65504 where Z-Image's activations don't.

What a block adds to its tokens has passed an RMSNorm, which takes a factor out again. So both branches run on inputs
that are made smaller by a power of two, and the norms behind them get an eps that is smaller by its square: the same
numbers bit for bit, as long as none of them leaves float16's normal range, with more room above. The factor lies in
vectors of the width and costs nothing per token.

The sum of all branches passes no such norm: where it may leave float16 (`model.numerics`), tokens are float32.

Letters: B batch, S tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.rope import rotate
from . import fused
from .operations import Gain, Modulation, Operations, add_normed_at_once, modulated

# Values, attention and the two matmuls of the MLP are kept at a sixteenth (up to a million fits), what these two gate
# and the MLP's result at its square (16 million). More room would cost small numbers their last bits.
SHRINK = 2.0**-4
# From here on float16 knows no sigmoid but 1. Some devices compute exp in float16, which holds exp(11).
SIGMOID_IS_ONE = 11.0


class HalfOperations(Operations):
    """On tokens x [B, S, D] that are float16 or float32; matmuls in float16."""

    shrink = SHRINK

    def __init__(self, gain: Gain):
        self.gain = gain

    def modulation(self, block: Any, x: Tensor, time: Tensor | None) -> Modulation:
        if time is None:
            return Modulation(SHRINK, None, SHRINK, None)
        parts = modulated(block, time).unflatten(-1, (2, 2, -1))  # (B, 1 or S, 2, 2, D)
        scales = torch.rsub(parts[..., 0, :], SHRINK, alpha=-SHRINK).unbind(2)  # SHRINK * (1 + scale)
        gates = parts[..., 1, :].tanh().unbind(2)
        return Modulation(scales[0], gates[0], scales[1], gates[1])

    def norm(self, norm: Any, x: Tensor, scale: Any) -> Tensor:
        """norm(x) * scale, in float16."""
        if x.dtype == torch.float16:
            return self._normed(norm, x) * scale
        return (F.rms_norm(x, x.shape[-1:], None, norm.eps) * (self.gain(norm, like(x)) * scale)).half()

    def norm_rotate(self, q: Tensor, k: Tensor, rotations: Tensor, q_norm: Any, k_norm: Any) -> tuple[Tensor, Tensor]:
        q, k = self._normed(q_norm, q, SHRINK), self._normed(k_norm, k, SHRINK)
        return rotate(q, rotations[:, : q.shape[1]]), rotate(k, rotations)

    def gated(self, a: Tensor, b: Tensor) -> Tensor:
        return gated(a, b)

    def add_normed(self, x: Tensor, h: Tensor, norm: Any, gate: Any, shrink: float) -> Tensor:
        """x + gate * norm(h / shrink), in x's dtype."""
        found = add_normed_at_once(x, h, norm, self.gain, gate, shrink)
        if found is not None:
            return found
        if x.dtype == torch.float16:
            h = self._normed(norm, h, shrink)
            return x + h if gate is None else torch.addcmul(x, gate, h)
        gain = self.gain(norm, h)  # with it a result may leave float16, too
        h = F.rms_norm(h, h.shape[-1:], None, norm.eps * shrink**2)
        return torch.addcmul(x, gain if gate is None else gain * gate, h)

    def _normed(self, norm: Any, x: Tensor, shrink: float = 1.0) -> Tensor:
        """norm(x / shrink) without x / shrink, which float16 may not hold."""
        return F.rms_norm(x, x.shape[-1:], self.gain(norm, x).to(x.dtype), norm.eps * shrink**2)


def gated(a: Tensor, b: Tensor) -> Tensor:
    """silu(a / SHRINK) * b / SHRINK, smaller by SHRINK squared, for a and b that are smaller by SHRINK."""
    if (found := fused.gated_(a, b, 1 / SHRINK)) is not None:
        return found
    # This is a * sigmoid(a / SHRINK) in one pass, and a / SHRINK can't overflow in it.
    silu: Tensor = torch.ops.aten.softplus_backward(a, a, 1 / SHRINK, SIGMOID_IS_ONE)
    return silu.mul_(b)


def like(x: Tensor) -> Tensor:
    """An empty float16 tensor where x is: weights are read for that, whatever the tokens are carried in."""
    return x.new_empty(0, dtype=torch.float16)
