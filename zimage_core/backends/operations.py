"""What a transformer block does between its matmuls, as a bundle of operations; and what it knows of its tokens.

`model.block.Block` is written once over them. This is the plain bundle, which all others are measured against: `half`
for float16, `compiled` for torch.compile, `cpu_rows` for a CPU; a host adds those of its kernels. A bundle may put off
work and do it for some rows at a time: to a block, what it hands from one operation to the next is opaque.

Letters: B batch, S tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.rope import rotate
from . import fused

# (an RMSNorm, a tensor on the device and in the dtype that it computes in) -> its weight there, [D], in any dtype
Gain = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Tokens:
    """What a block knows of tokens x [B, S, D] beside their values."""

    rotations: Tensor  # [1 or B, S, 1, head_dim/2, 2, 2]
    time: Tensor | None  # embedded, [B, A] for all tokens of an item or [B, S, A] for each; None: it doesn't matter
    counts: Sequence[int]  # of each item's tokens that are its own, the first ones; one where they are all of x
    own: Tensor | None = None  # the same as a mask [B, 1, 1, S], true for those; None where they are all of x
    mask: Tensor | None = None  # true where a query attends to a token, [1 or B, 1 or heads, 1 or S, S]; None: all
    queries: int | None = None  # only so many of the first tokens are needed afterwards, and come out

    def attended(self) -> Tensor | None:
        """Which tokens the queries attend to, [1 or B, 1 or heads, 1 or queries, S]; None: all."""
        mask = self.mask if self.mask is None or self.mask.shape[-2] == 1 else self.mask[..., : self.queries, :]
        return mask if self.own is None else self.own if mask is None else mask & self.own

    def of_item(self, item: int) -> Tokens:
        """Of one item without what pads it to the longest of the batch: [1, counts[item], D]."""
        count = self.counts[item % len(self.counts)]
        time, mask = self.time, self.mask
        if time is not None:
            time = time[item : item + 1]
            time = time[:, :count] if time.ndim == 3 else time
        if mask is not None:
            mask = mask[item % len(mask)].unsqueeze(0)[..., :count]
            mask = mask if mask.shape[-2] == 1 else mask[..., :count, :]
        rotations = self.rotations[item % len(self.rotations)].unsqueeze(0)[:, :count]
        return Tokens(rotations, time, [count], None, mask, self.queries)


@dataclass(frozen=True)
class Modulation:
    """What the time makes of a block, each [B, 1 or S, D], None where nothing: a bundle's own numbers."""

    before_attention: Any
    after_attention: Any
    before_mlp: Any
    after_mlp: Any

    def each(self, function: Callable[[Any], Any]) -> Modulation:
        return Modulation(*(function(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def of_queries(self, queries: int | None) -> Modulation:
        """Where each token has its own: of so many first ones, in what follows the attention."""
        if queries is None:
            return self
        found = self.each(lambda part: part[..., :queries, :] if _is_by_token(part) else part)
        return dataclasses.replace(found, before_attention=self.before_attention)


def _is_by_token(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim > 1 and part.shape[-2] > 1


class Operations:
    """In the dtype of the tokens, by torch's own functions and the block's own modules."""

    shrink = 1.0  # what comes out of the attention is smaller by this factor, out of the MLP by its square

    def modulation(self, block: Any, x: Tensor, time: Tensor | None) -> Modulation:
        """Factors of the norms before the branches, and gates of the branches."""
        if time is None:
            return Modulation(None, None, None, None)
        parts = modulated(block, time).unflatten(-1, (2, 2, -1))  # (B, 1 or S, 2, 2, D)
        before_attention, before_mlp = (1 + parts[..., 0, :]).unbind(2)
        after_attention, after_mlp = parts[..., 1, :].tanh().unbind(2)
        return Modulation(before_attention, after_attention, before_mlp, after_mlp)

    def by_item(
        self, run: Callable[[Tensor, Tokens, Modulation], Tensor], x: Tensor, tokens: Tokens, modulation: Modulation
    ) -> Tensor:
        """run(x, tokens, modulation), for all items at once or one after another: [B, queries, D]."""
        return run(x, tokens, modulation)

    def norm(self, norm: Any, x: Tensor, scale: Any) -> Any:
        """norm(x) * scale, an RMSNorm."""
        return norm(x) if scale is None else norm(x) * scale

    def linear(self, layer: Any, x: Any) -> Any:
        return layer(x)

    def heads(self, qkv: Any, layer: Any, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """q (of the queries), k, v of an attention layer, q and k normed and rotated, each [B, heads, S, head_dim]."""
        q, k, v = qkv.unflatten(-1, (3, layer.n_heads, -1)).unbind(2)  # each (B, S, heads, head_dim)
        q, k = self.norm_rotate(q[:, : tokens.queries], k, tokens.rotations, layer.q_norm, layer.k_norm)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def norm_rotate(self, q: Tensor, k: Tensor, rotations: Tensor, q_norm: Any, k_norm: Any) -> tuple[Tensor, Tensor]:
        """q [B, Q, heads, head_dim] and k [B, S, heads, head_dim]; q are the first Q of S tokens."""
        return rotate(q_norm(q), rotations[:, : q.shape[1]]), rotate(k_norm(k), rotations)

    def gated(self, a: Any, b: Any) -> Any:
        """silu(a) * b."""
        return finite(F.silu(a) * b)

    def add_normed(self, x: Tensor, h: Any, norm: Any, gate: Any, shrink: float) -> Tensor:
        """x + gate * norm(h); h is smaller by `shrink`."""
        h = norm(finite(h))
        return x + h if gate is None else torch.addcmul(x, gate, h)


PLAIN = Operations()


class LeanOperations(Operations):
    """Fewer passes over the tokens, for blocks that nobody has changed: the weights of norms are read (`Gain`)."""

    def __init__(self, gain: Gain):
        self.gain = gain

    def norm(self, norm: Any, x: Tensor, scale: Any) -> Any:
        if scale is None or scale.numel() != x.shape[-1]:
            return super().norm(norm, x, scale)
        # one factor for all tokens goes into the norm's weight
        return F.rms_norm(x, x.shape[-1:], (self.gain(norm, x) * scale.flatten()).to(x.dtype), norm.eps)

    def gated(self, a: Any, b: Any) -> Any:
        if torch.is_grad_enabled():
            return super().gated(a, b)
        # in place: these are the largest tensors of a step
        found = fused.gated_(a, b)
        return F.silu(a, inplace=True).mul_(b) if found is None else found

    def add_normed(self, x: Tensor, h: Any, norm: Any, gate: Any, shrink: float) -> Tensor:
        found = add_normed_at_once(x, h, norm, self.gain, gate, shrink)
        return super().add_normed(x, h, norm, gate, shrink) if found is None else found


def add_normed_at_once(x: Tensor, h: Tensor, norm: Any, gain: Gain, gate: Any, shrink: float) -> Tensor | None:
    """x + gate * norm(h / shrink) by one kernel; None where there is none."""
    if not fused.may_run(x, h):  # asked before a weight is fetched
        return None
    return fused.add_normed(x, h, gain(norm, h), gate, norm.eps * shrink**2)


def modulated(block: Any, time: Tensor) -> Tensor:
    """A block's four modulations side by side, [B, 1 or S, 4 * D]."""
    found: Tensor = block.adaLN_modulation(time)
    return found if time.ndim == 3 else found.unsqueeze(1)


def read_gain(norm: Any, _like: Tensor) -> Tensor:
    """A `Gain` for weights that lie where they are used."""
    weight: Tensor = norm.weight
    return weight


def finite(x: Tensor) -> Tensor:
    """Cuts off what float16 can't hold, where a block that others changed overflows; other dtypes pass untouched."""
    return torch.nan_to_num(x, nan=0.0) if x.dtype == torch.float16 else x
