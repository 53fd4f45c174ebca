"""Matmuls on a CPU by the fastest exact way that the processor has; on every other device torch's own.

What torch does is not always the best there is:
  - Without bfloat16 instructions (AVX2, that is most desktops) it multiplies bfloat16 at a fifth of the float32 rate.
    Here the weight is cast to float32 in panels that stay in the cache, and the product is float32's.
  - A float32 product goes to MKL, which runs below its best on processors of other makers. There oneDNN takes it.
  - A weight in another dtype than the activations would be cast as a whole, into new memory; panels spare that.

What is chosen follows from the processor alone, not from a measurement, so equal seeds give equal images.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PANEL = 5 * 2**20  # weights cast at a time: 20 MB in float32. A quarter or four times of it is up to a tenth slower
WHOLE = 64  # rows of a panel are a multiple of it, as kernels work on blocks
LEAST = 2**22  # multiplications; for fewer, asking costs more than is gained
SHORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias: [..., out] in the dtype of x, whatever that of the weight."""
    # while it is being compiled, sizes are not to be asked for
    if torch.compiler.is_compiling() or x.numel() * weight.shape[0] < LEAST or not _is_ours(x, weight):
        if weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias)
    if x.dtype == weight.dtype == torch.float32:
        return _onednn(x, weight, bias)
    return _in_panels(x, weight, bias)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has fast products of bfloat16 or float16."""
    return dtype in SHORT and _supports(SHORT[dtype])


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or weight.device.type != "cpu" or type(weight) not in (Tensor, nn.Parameter):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if x.dtype == weight.dtype == torch.float32:
        return _onednn_is_faster()
    if x.dtype == torch.float32:
        return weight.dtype.is_floating_point and weight.dtype.itemsize < x.dtype.itemsize
    return x.dtype == weight.dtype and x.dtype in SHORT and not multiplies(x.dtype)


def _in_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in float32, the weight cast to it a few rows at a time."""
    rows, width = weight.shape
    flat = x.reshape(-1, width).float()
    out = x.new_empty(len(flat), rows)
    step = max(WHOLE, PANEL // width // WHOLE * WHOLE)
    panel = torch.empty(min(step, rows), width, dtype=torch.float32)
    product = _onednn if _onednn_is_faster() else F.linear
    for start in range(0, rows, step):
        part = weight[start : start + step]
        exact = panel[: len(part)].copy_(part)
        added = None if bias is None else bias[start : start + step].float()
        out[:, start : start + step] = product(flat, exact, added)
    return out.view(*x.shape[:-1], rows)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether a float32 product of oneDNN beats the one that torch takes: where that is MKL's, not on Intel's chips."""
    here = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return here and hasattr(torch.ops.mkldnn, "_linear_pointwise") and "AuthenticAMD" in _processor()


def _processor() -> str:
    told = Path("/proc/cpuinfo")  # Linux; Windows says it in platform.processor()
    return told.read_text(encoding="utf-8", errors="replace") if told.exists() else platform.processor()


@functools.cache
def _supports(name: str) -> bool:
    asked = getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None
    return asked is not None and bool(asked())


class Linear(nn.Linear):
    """nn.Linear by `linear`; its weight may have another dtype than what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


# what a transformer block may be built of; other classes in it mean that somebody has changed it
LINEAR_KINDS: set[type[nn.Module]] = {Linear}


class Embedding(nn.Embedding):
    """nn.Embedding that draws no first values on the meta device: there, torch imports its whole compiler for it."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm whose weight may have another dtype than its input; torch has a single kernel for equal ones only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Layers:
    """The layers of `torch.nn` that the networks here are made of, as their `ops`."""

    Linear = Linear
    RMSNorm = RMSNorm
    LayerNorm = nn.LayerNorm
    Embedding = Embedding
