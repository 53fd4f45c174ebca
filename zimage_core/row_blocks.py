"""A transformer block on a CPU: in place, the items of a batch one after another, their tokens in blocks of rows.

The same formulas as `transformer.Block`, which remains the reference, with less traffic of memory: what lies between
two matrix products runs over few rows at a time in float32 and is rounded once; large new tensors, whose pages the
system has to hand out and clear, are avoided; an item has no tokens that only pad it to the longest of its batch, so
attention needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused, products
from .attention import Attention

MATMUL_ROWS = 256  # bfloat16 products of so many rows take 80 to 95 % of the time of all rows at once (benchmarks)
NORM_ROWS = 64  # rows that stay in a core's cache between the passes of a norm
DTYPES = (torch.bfloat16, torch.float32)
LEAST = 2**18  # elements of an item; for fewer, calls cost more than traffic of memory


def suits(x: Tensor) -> bool:
    """Whether blocks run this way: on a CPU, where no gradient is asked for and nothing is being compiled."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and x[0].numel() >= LEAST
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def run(
    block: Any,  # a transformer.Block, from further up
    x: Tensor,
    rotation: Tensor,
    adaln: Tensor | None,
    attention: Attention,
    counts: Sequence[int],
    kept: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """The block on x [B, S, D], which it overwrites: item i has the tokens x[i, :counts[i]].

    rotation: [1 or B, S, 1, head_dim/2, 2, 2]. adaln: [B, 256] or None. kept: that only so many of the first tokens
    are needed afterwards. compiled: norms and gates by torch.compile. Returns x, [B, kept, D] of it.
    """
    way = COMPILED if compiled else EAGER
    gains = fused.block_gains(block, x, adaln)
    turns = torch.view_as_complex(rotation[..., 0, :, :, 0].contiguous())  # (1 or B, S, head_dim/2): cos + i sin
    for item, count in enumerate(counts):
        tokens, last = x[item, :count], count if kept is None else kept
        before_attention, after_attention, before_mlp, after_mlp = (gain[item % len(gain)] for gain in gains)
        eps = block.attention_norm1.eps
        out = _attend(way, block.attention, tokens, before_attention, eps, turns[item % len(turns)], attention, last)
        for rows in _rows(tokens[:last], block.attention.out):
            way.add_normed(tokens[rows], block.attention.out(out[rows]), after_attention, eps)
        mlp = block.feed_forward
        for rows in _rows(tokens[:last], mlp.w1):
            h = way.normed(tokens[rows], before_mlp, eps)
            way.add_normed(tokens[rows], mlp.w2(way.gated(mlp.w1(h), mlp.w3(h))), after_mlp, eps)
    return x if kept is None else x[:, :kept]


def _attend(
    way: Way,
    layer: Any,
    tokens: Tensor,
    gain: Tensor,
    eps: float,
    turns: Tensor,
    attention: Attention,
    queries: int,
) -> Tensor:
    """Attention of the first tokens to all, before its output projection: [queries, D]."""
    gains = torch.stack(
        (fused.norm_gain(layer.q_norm, tokens), fused.norm_gain(layer.k_norm, tokens))
    )  # (2, 1, head_dim)
    qkv = tokens.new_empty(len(tokens), 3 * tokens.shape[-1])
    for rows in _rows(tokens, layer.qkv):
        part = layer.qkv(way.normed(tokens[rows], gain, eps))
        _norm_and_turn(part, gains, layer.q_norm.eps, turns[rows])
        qkv[rows] = part
    q, k, v = qkv.unflatten(-1, (3, layer.n_heads, -1)).permute(1, 2, 0, 3).unsqueeze(1)  # each (1, heads, S, head_dim)
    return attention(q[:, :, :queries], k, v, None)[0]


def _rows(x: Tensor, layer: nn.Module) -> list[slice]:
    """The blocks in which rows of x go through a linear layer."""
    # a weight that has to be cast or expanded for each product is better used once
    plain = type(layer.weight) in (Tensor, nn.Parameter) and layer.weight.dtype == x.dtype
    step = MATMUL_ROWS if plain and products.multiplies(x.dtype) else max(len(x), 1)
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain of rows [N, D]."""
    out = torch.empty_like(x)
    for part, result in zip(x.split(NORM_ROWS), out.split(NORM_ROWS), strict=True):
        if x.dtype == torch.float32:
            torch.mul(part, _inverse_rms(part, eps), out=result).mul_(gain)
        else:
            exact = part.float()
            result.copy_(exact.mul_(_inverse_rms(exact, eps)).mul_(gain))
    return out


def _add_normed(x: Tensor, h: Tensor, gain: Tensor, eps: float) -> None:
    """x += h / rms(h) * gain of rows [N, D]; h is spent."""
    for total, part in zip(x.split(NORM_ROWS), h.split(NORM_ROWS), strict=True):
        exact = part.float()
        exact.mul_(_inverse_rms(exact, eps)).mul_(gain)
        total.copy_(exact.add_(total))


def _gated(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b; a is overwritten."""
    return F.silu(a, inplace=True).mul_(b)


def _add_normed_compiled(x: Tensor, h: Tensor, gain: Tensor, eps: float) -> None:
    x.copy_(fused.add_normed(x, h, gain, eps))


class Way(NamedTuple):
    """How the parts between matrix products run."""

    normed: Callable[[Tensor, Tensor, float], Tensor]
    add_normed: Callable[[Tensor, Tensor, Tensor, float], None]
    gated: Callable[[Tensor, Tensor], Tensor]


EAGER = Way(_normed, _add_normed, _gated)
COMPILED = Way(fused.normed, _add_normed_compiled, fused.gated)


def _norm_and_turn(qkv: Tensor, gains: Tensor, eps: float, turns: Tensor) -> None:
    """RMSNorm of each head of q and k and their rotation, in place: rows [N, 3 * D], gains [2, 1, head_dim].

    Not compiled: what torch.compile makes of it takes two to three times as long on a CPU.
    """
    width = qkv.shape[-1] // 3
    for part, turn in zip(qkv.split(NORM_ROWS), turns.split(NORM_ROWS), strict=True):
        stored = part[:, : 2 * width].unflatten(-1, (2, -1, gains.shape[-1]))  # (N, 2, heads, head_dim)
        exact = stored.float()  # itself in float32
        exact.mul_(_inverse_rms(exact, eps)).mul_(gains)
        torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(turn[:, None, None])
        if exact.dtype != stored.dtype:
            stored.copy_(exact)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
