"""Operations of a transformer block on a CPU: in place, item by item of a batch, tokens in blocks of rows.

The same formulas as `operations.Operations`, which remain the reference, with less traffic of memory: what lies between
two matmuls runs over few rows at a time in float32 and is rounded once; large new tensors, whose pages the system has
to hand out and clear, are avoided; an item has no tokens that only pad it to the longest of its batch, so attention
needs no mask.

Where tensors are small, calls are what costs: there a batch goes whole, in half as many as the plain operations make.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import compiled, matmul
from .operations import Gain, Modulation, Operations, Tokens, modulated

MATMUL_ROWS = 256  # bfloat16 matmuls of so many rows take 80 to 95 % of the time of all rows at once (benchmarks)
CACHED = 2**19  # values that stay in a core's cache between the passes of a norm: 136 rows at the published width
DTYPES = (torch.bfloat16, torch.float32)
SMALL = 2**18  # elements of an item; below, calls cost more than traffic of memory


def suits(x: Tensor, compiled: bool) -> bool:
    """Whether blocks run this way: on a CPU, where no gradient is asked for and nothing is being compiled.

    Small ones whose parts are compiled are left to `CompiledOperations`: a batch that goes whole would be compiled once
    more.
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


class Rows:
    """Rows [B, S, *] that are not there yet: made some at a time, as they are asked for."""

    def __init__(self, source: Tensor, size: int, make: Callable[[slice], Tensor], again: bool = False):
        """source: [B, S, *], whose rows they are made of. size: how many at a time. again: the last ones are kept."""
        self.source, self.size, self.make, self.again = source, size, make, again
        self._last: tuple[slice, Tensor] | None = None

    def at(self, rows: slice) -> Tensor:
        if self._last is not None and self._last[0] == rows:
            return self._last[1]
        self._last = None  # before others are made, so that there is no third
        made = self.make(rows)
        if self.again:
            self._last = rows, made
        return made

    def parts(self) -> Iterator[slice]:
        count = self.source.shape[-2]
        return (slice(start, min(start + self.size, count)) for start in range(0, count, self.size))


class RowOperations(Operations):
    """For tokens x [B, S, D] that may be overwritten, bfloat16 or float32."""

    def __init__(self, gain: Gain, compiled: bool):
        """compiled: norms and gates by torch.compile."""
        self.gain = gain
        self.way = COMPILED if compiled else EAGER

    def modulation(self, block: Any, x: Tensor, time: Tensor | None) -> Modulation:
        """What the results of the block's four norms are multiplied by, float32."""
        norms = (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2)
        gains = Modulation(*(self.gain(norm, x).float().view(1, 1, -1) for norm in norms))
        if time is None:
            return gains
        scale_attention, gate_attention, scale_mlp, gate_mlp = modulated(block, time).float().chunk(4, dim=-1)
        return Modulation(
            torch.addcmul(gains.before_attention, gains.before_attention, scale_attention),
            gains.after_attention * gate_attention.tanh(),
            torch.addcmul(gains.before_mlp, gains.before_mlp, scale_mlp),
            gains.after_mlp * gate_mlp.tanh(),
        )

    def by_item(
        self, run: Callable[[Tensor, Tokens, Modulation], Tensor], x: Tensor, tokens: Tokens, modulation: Modulation
    ) -> Tensor:
        if _is_small(x):
            return run(x, tokens, modulation)
        for item in range(len(x)):
            own = tokens.of_item(item)
            count = own.counts[0]
            run(x[item : item + 1, :count], own, modulation.each(functools.partial(_of_item, item, count)))
        return x[:, : tokens.queries]

    def norm(self, norm: Any, x: Tensor, scale: Tensor) -> Rows:
        def make(rows: slice) -> Tensor:
            return self.way.normed(_at(x, rows), _at(scale, rows), norm.eps)

        return Rows(x, 0, make, again=True)  # by two matmuls, in an MLP

    def linear(self, layer: Any, x: Tensor | Rows) -> Rows:
        if isinstance(x, Rows):
            return Rows(x.source, x.size or _block(layer, x.source), lambda rows: layer(x.at(rows)))
        return Rows(x, _block(layer, x), lambda rows: layer(_at(x, rows)))

    def heads(self, qkv: Rows, layer: Any, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        x = qkv.source
        gains = torch.stack((self.gain(layer.q_norm, x), self.gain(layer.k_norm, x))).float().unsqueeze(1)
        turns = torch.view_as_complex(tokens.rotations[..., 0, :, :, 0].contiguous())  # (1 or B, S, head_dim/2)
        out = x.new_empty(*x.shape[:-1], 3 * x.shape[-1])
        for rows in qkv.parts():
            found = qkv.at(rows)
            _norm_rotate(found, gains, layer.q_norm.eps, _at(turns, rows))
            _at(out, rows).copy_(found)
        q, k, v = out.unflatten(-1, (3, layer.n_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, S, head_dim)
        return q[:, :, : tokens.queries], k, v

    def gated(self, a: Rows, b: Rows) -> Rows:
        return Rows(a.source, a.size, lambda rows: self.way.gated(a.at(rows), b.at(rows)))

    def add_normed(self, x: Tensor, h: Rows, norm: Any, gate: Tensor, shrink: float) -> Tensor:
        for rows in h.parts():
            self.way.add_normed(_at(x, rows), h.at(rows), _at(gate, rows), norm.eps)
        return x


def _at(x: Tensor, rows: slice) -> Tensor:
    """These rows of x [..., S, *]; x itself where it has one row for all."""
    return x if x.shape[-2] == 1 else x[..., rows, :]


def _of_item(item: int, count: int, part: Tensor) -> Tensor:
    found = part[item % len(part)].unsqueeze(0)
    return found if found.shape[-2] == 1 else found[:, :count]


def _block(layer: nn.Module, x: Tensor) -> int:
    """How many rows of x [B, S, *] go through a linear layer at a time."""
    # rows of a whole batch would be no matrix
    blocks = len(x) == 1 and not _is_small(x) and matmul.multiplies(x.dtype) and _is_ready(layer, x.dtype)
    return MATMUL_ROWS if blocks else x.shape[-2]


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
    """x / rms(x) * gain of rows [..., S, D]; gain [..., 1 or S, D]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, result, factor in _in_cache(x, out, gain.expand(-1, x.shape[-2], -1)):
        if x.dtype == torch.float32:
            torch.mul(part, _inverse_rms(part, eps), out=result).mul_(factor)
        else:
            exact = part.float()
            result.copy_(exact.mul_(_inverse_rms(exact, eps)).mul_(factor))
    return out


def _add_normed(x: Tensor, h: Tensor, gain: Tensor, eps: float) -> None:
    """x += h / rms(h) * gain of rows [..., S, D]; h is spent."""
    for total, part, factor in _in_cache(x, h, gain.expand(-1, x.shape[-2], -1)):
        exact = part.float()
        exact.mul_(_inverse_rms(exact, eps))
        if x.dtype == torch.float32:
            total.addcmul_(exact, factor)
        else:
            total.copy_(exact.mul_(factor).add_(total))


def _gated(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b; a is overwritten."""
    return F.silu(a, inplace=True).mul_(b)


def _add_normed_compiled(x: Tensor, h: Tensor, gain: Tensor, eps: float) -> None:
    x.copy_(compiled.add_normed(x, h, gain, eps))


class Way(NamedTuple):
    """How the parts between matmuls run."""

    normed: Callable[[Tensor, Tensor, float], Tensor]
    add_normed: Callable[[Tensor, Tensor, Tensor, float], None]
    gated: Callable[[Tensor, Tensor], Tensor]


EAGER = Way(_normed, _add_normed, _gated)
COMPILED = Way(compiled.normed, _add_normed_compiled, compiled.gated)


def _norm_rotate(qkv: Tensor, gains: Tensor, eps: float, turns: Tensor) -> None:
    """RMSNorm of each head of q and k and their rotation, in place: rows [..., S, 3 * D], gains [2, 1, head_dim].

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
