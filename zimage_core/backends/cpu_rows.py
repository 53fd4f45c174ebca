"""A transformer block on a CPU: in place, the items of a batch one after another, their tokens in blocks of rows.

The same formulas as `transformer.Block`, which remains the reference, with less traffic of memory: what lies between
two matrix products runs over few rows at a time in float32 and is rounded once; large new tensors, whose pages the
system has to hand out and clear, are avoided; an item has no tokens that only pad it to the longest of its batch, so
attention needs no mask.

Where tensors are small, calls are what costs: there a batch goes whole, in half as many as `transformer.Block` makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import compiled as fused
from . import matmul

MATMUL_ROWS = 256  # bfloat16 products of so many rows take 80 to 95 % of the time of all rows at once (benchmarks)
CACHED = 2**19  # values that stay in a core's cache between the passes of a norm: 136 rows at the published width
DTYPES = (torch.bfloat16, torch.float32)
SMALL = 2**18  # elements of an item; below, calls cost more than traffic of memory


def suits(x: Tensor, compiled: bool) -> bool:
    """Whether blocks run this way: on a CPU, where no gradient is asked for and nothing is being compiled.

    Small ones whose parts are compiled are left to `compiled.run`: a batch that goes whole would be compiled once more.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and not (compiled and _is_small(x))
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _is_small(x: Tensor) -> bool:
    return x[0].numel() < SMALL


def run(
    block: Any,  # a transformer.Block, as it was built (`transformer.is_as_built`)
    x: Tensor,
    rotation: Tensor,
    adaln: Tensor | None,
    attention: Callable[..., Tensor],
    counts: Sequence[int],
    mask: Tensor | None = None,
    kept: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """The block on x [B, S, D], which it overwrites: item i has the tokens x[i, :counts[i]], as the mask tells too.

    One count is for all items.

    rotation: [1 or B, S, 1, head_dim/2, 2, 2]. adaln: [B, 256] or None. mask: of `attention`; None where all tokens
    are an item's own. kept: that only so many of the first tokens are needed afterwards. compiled: norms and gates by
    torch.compile. Returns x, [B, kept, D] of it.
    """
    way = COMPILED if compiled else EAGER
    gains = fused.block_gains(block, x, adaln)
    turns = torch.view_as_complex(rotation[..., 0, :, :, 0].contiguous())  # (1 or B, S, head_dim/2): cos + i sin
    layer, mlp = block.attention, block.feed_forward
    head_gains = torch.stack((block.gain(layer.q_norm, x), block.gain(layer.k_norm, x))).float().unsqueeze(1)
    for tokens, (before_attention, after_attention, before_mlp, after_mlp), turn, masked in _parts(
        x, gains, turns, counts, mask
    ):
        eps = block.attention_norm1.eps
        out = _attend(way, layer, tokens, before_attention, eps, head_gains, turn, attention, masked, kept)
        tokens, eps = tokens[..., :kept, :], block.attention_norm2.eps
        for part, found in _rows(layer.out, tokens, out):
            way.add_normed(part, layer.out(found), after_attention, eps)
        for (part,) in _rows(mlp.w1, tokens):
            h = way.normed(part, before_mlp, block.ffn_norm1.eps)
            way.add_normed(part, mlp.w2(way.gated(mlp.w1(h), mlp.w3(h))), after_mlp, block.ffn_norm2.eps)
    return x[:, :kept]


def _parts(
    x: Tensor, gains: Sequence[Tensor], turns: Tensor, counts: Sequence[int], mask: Tensor | None
) -> Iterator[tuple[Tensor, Sequence[Tensor], Tensor, Tensor | None]]:
    """What runs at a time, with its gains, rotations and mask: each item's own tokens [S_i, D], or the batch."""
    if _is_small(x):
        yield x, gains, turns, mask
        return
    for item in range(len(x)):
        count = counts[item % len(counts)]
        yield x[item, :count], [gain[item % len(gain)] for gain in gains], turns[item % len(turns), :count], None


def _attend(
    way: Way,
    layer: Any,
    tokens: Tensor,
    gain: Tensor,
    eps: float,
    head_gains: Tensor,
    turns: Tensor,
    attention: Callable[..., Tensor],
    mask: Tensor | None,
    queries: int | None,
) -> Tensor:
    """Attention of the first tokens to all, before its output projection: [..., queries, D].

    head_gains: of the norms of q and k, [2, 1, head_dim].
    """
    qkv = tokens.new_empty(*tokens.shape[:-1], 3 * tokens.shape[-1])
    for part, turn, place in _rows(layer.qkv, tokens, turns, qkv):
        found = layer.qkv(way.normed(part, gain, eps))
        _norm_and_turn(found, head_gains, layer.q_norm.eps, turn)
        place.copy_(found)
    qkv = qkv if tokens.ndim == 3 else qkv.unsqueeze(0)
    q, k, v = qkv.unflatten(-1, (3, layer.n_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, S, head_dim)
    out = attention(q[:, :, :queries], k, v, mask)
    return out if tokens.ndim == 3 else out[0]


def _rows(layer: nn.Module, x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of x [..., S, D] as they go through a linear layer, block by block, with the same rows of the others."""
    # rows of a whole batch would be no matrix
    blocks = x.ndim == 2 and matmul.multiplies(x.dtype) and _is_ready(layer, x.dtype)
    return _split(MATMUL_ROWS if blocks else x.shape[-2], x, *others)


def _is_ready(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a weight is used as it is. One that is cast, expanded or patched for each product is better used once."""
    weight = layer._parameters.get("weight")  # an attribute may be a property that expands it
    patched = getattr(layer, "weight_function", None)  # what a host adds on the way
    return weight is not None and type(weight) in (Tensor, nn.Parameter) and weight.dtype == dtype and not patched


def _split(rows: int, x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many rows of each [..., S, *] at a time."""
    if rows >= x.shape[-2]:
        return iter([(x, *others)])
    return zip(*(tensor.split(rows, dim=-2) for tensor in (x, *others)), strict=True)


def _in_cache(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many rows of each at a time that those of x stay in the cache."""
    return _split(max(1, CACHED * x.shape[-2] // max(1, x.numel())), x, *others)


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain of rows [..., N, D]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, result in _in_cache(x, out):
        if x.dtype == torch.float32:
            torch.mul(part, _inverse_rms(part, eps), out=result).mul_(gain)
        else:
            exact = part.float()
            result.copy_(exact.mul_(_inverse_rms(exact, eps)).mul_(gain))
    return out


def _add_normed(x: Tensor, h: Tensor, gain: Tensor, eps: float) -> None:
    """x += h / rms(h) * gain of rows [..., N, D]; h is spent."""
    for total, part in _in_cache(x, h):
        exact = part.float()
        exact.mul_(_inverse_rms(exact, eps))
        if x.dtype == torch.float32:
            total.addcmul_(exact, gain)
        else:
            total.copy_(exact.mul_(gain).add_(total))


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
    """RMSNorm of each head of q and k and their rotation, in place: rows [..., N, 3 * D], gains [2, 1, head_dim].

    Not compiled: what torch.compile makes of it takes two to three times as long on a CPU.
    """
    qk = qkv.narrow(-1, 0, qkv.shape[-1] // 3 * 2)
    for part, turn in _in_cache(qk, turns):
        stored = part.unflatten(-1, (2, -1, gains.shape[-1]))  # (..., N, 2, heads, head_dim)
        exact = stored.float()  # itself in float32
        exact.mul_(_inverse_rms(exact, eps)).mul_(gains)
        torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(turn[..., None, None, :])
        if exact.dtype != stored.dtype:
            stored.copy_(exact)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@functools.cache
def _constant(value: float) -> Tensor:
    """A number as a tensor, which calls would make of it each time: half of what a small one takes."""
    with torch.inference_mode(False):  # to be kept, whatever mode the first call is in
        return torch.tensor(value, dtype=torch.float32, device="cpu")
