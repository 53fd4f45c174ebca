"""Tokens of one sequence shared out over processes, heads inside the attention (DeepSpeed-Ulysses, arXiv 2309.14509).

Outside the attention each process runs its own S/n tokens. For the attention they exchange: each gets all S tokens of
heads/n heads, and gives back what it makes of them. What is computed stays the same, whatever the mask or the order.

Tokens that only fill the last shares are cut off before the attention, so no softmax sees them.

Letters: B batch, S tokens, s tokens of a share, n processes, D width, H heads.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..backends.operations import Tokens
from ..model.attention import Attention
from ..model.share import Share


class DividedShare(Share):
    """Of so many tokens those of this process, as many as all others have; the last ones are filled up with zeros."""

    divided = True

    def __init__(self, total: int, group: dist.ProcessGroup):
        super().__init__(total)
        self.group = group
        self.count = group.size()
        self.own = -(-total // self.count)
        self.start = group.rank() * self.own

    def part(self, x: Tensor) -> Tensor:
        part = x[:, self.start : self.start + self.own]
        missing = self.own - part.shape[1]
        # its own memory, as blocks may write into it
        return F.pad(part, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else part.contiguous()

    def whole(self, x: Tensor) -> Tensor:
        found = x.new_empty(self.count * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(found, x.contiguous(), group=self.group)
        return found.unflatten(0, (self.count, -1)).movedim(0, 1).flatten(1, 2)[:, : self.total]

    def tokens(self, tokens: Tokens) -> Tokens:
        if tokens.own is not None or tokens.mask is not None or tokens.queries is not None:
            raise ValueError("tokens that are shared out can't be masked; run captions of different lengths apart")
        by_token = tokens.time is not None and tokens.time.ndim == 3
        time = self.part(tokens.time) if by_token and tokens.time is not None else tokens.time
        return dataclasses.replace(tokens, rotations=self.part(tokens.rotations), time=time, counts=[self.own])

    def attention(self, attention: Attention) -> Attention:
        return partial(self._attend, attention)

    def _attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v [B, H, s, head_dim] of this share to [B, s, D], having attended to all tokens."""
        stacked = torch.stack([x.unflatten(1, (self.count, -1)) for x in (q, k, v)])  # (3, B, n, H/n, s, head_dim)
        received = self._exchange(stacked.movedim(2, 0))  # (n of tokens, 3, B, H/n, s, head_dim)
        together = received.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[..., : self.total, :]  # (3, B, H/n, S, head_dim)
        q, k, v = together.unbind(0)
        out = attention(q, k, v, mask)  # (B, S, D/n)
        filled = F.pad(out, (0, 0, 0, self.own * self.count - self.total))
        parts = self._exchange(filled.unflatten(1, (self.count, -1)).movedim(1, 0))  # (n of heads, B, s, D/n)
        return parts.permute(1, 2, 0, 3).flatten(2)

    def _exchange(self, x: Tensor) -> Tensor:
        """x [n, ...], of which x[i] goes to process i, to what the others sent here."""
        received = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dist.all_to_all_single(received, x.contiguous(), group=self.group)  # the form that every backend has
        return received
