"""What PyTorch needs two passes over the tokens for, in one: kernels in Triton, for GPUs without torch.compile.

Triton comes with PyTorch for GPUs on Linux. It compiles a kernel in some seconds for the dtypes of a model and keeps it
on the disk. Where it is missing or can't (no C compiler, no place to write, a GPU that it doesn't know), PyTorch's own
functions go on, as they do wherever these functions return None.

Letters: B batch, S tokens, D width.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Operators, so that whatever looks at PyTorch's operators (FakeTensorMode, profilers) sees a kernel. This module may be
# loaded several times, as the pack and as `zimage_core`: each has its own.
SPACE = f"zimage_{uuid.uuid4().hex}"
SCHEMAS = (
    "gated_(Tensor(a!) a, Tensor b, float factor) -> Tensor(a!)",
    "add_normed(Tensor x, Tensor h, Tensor gain, Tensor? gate, float eps) -> Tensor",
)
# Of fewer tokens a fast GPU is done before Python has asked for more, and starting a kernel of Triton's takes it longer
FEWEST = 2048

FAILED = "Triton does not work here (%s: %s); steps run on PyTorch's own functions and take some percent longer."
enabled = True  # until Triton fails; a host may have it off
_library = torch.library.Library(SPACE, "FRAGMENT")


def gated_(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor | None:
    """a * sigmoid(factor * a) * b, which overwrites a; None where this can't be."""
    if not may_run(a, b) or not (a.is_contiguous() and b.is_contiguous() and a.shape == b.shape):
        return None
    return _called(_GATED, a, b, factor)


def add_normed(x: Tensor, h: Tensor, gain: Tensor, gate: Tensor | None, eps: float) -> Tensor | None:
    """x [B, S, D] + h [B, S, D] / rms(h) * gain [D] * gate [1 or B, 1 or S, D], in x's dtype; None where not."""
    given = (x, h, gain) if gate is None else (x, h, gain, gate)
    if not may_run(*given) or h.ndim != 3 or x.shape != h.shape or any(part.stride(-1) != 1 for part in given):
        return None
    return _called(_ADD_NORMED, x, h, gain, None if gate is None else gate.expand(h.shape), eps)


def may_run(*given: Tensor) -> bool:
    """On one GPU, many tokens, without gradients, and where nobody compiles these passes in a way of their own."""
    if not enabled or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    first = given[0]
    return (
        first.is_cuda
        and first.numel() >= FEWEST * first.shape[-1]
        and all(part.device == first.device for part in given)
    )


def _called(operator: Any, *arguments: Any) -> Tensor | None:
    global enabled
    try:
        found: Tensor = operator(*arguments)
        return found
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, a linker, a driver, a file system: nothing has been computed yet
        first = (str(error).strip().splitlines() or [""])[0]
        if "out of memory" not in first:  # which Triton says when it loads a kernel on a full GPU; that passes
            enabled = False
            level = logging.INFO if isinstance(error, ImportError) else logging.WARNING
            logger.log(level, FAILED, type(error).__name__, first)
        return None


def _gated_(a: Tensor, b: Tensor, factor: float) -> Tensor:
    from . import triton_kernels

    with torch.cuda.device_of(a):
        triton_kernels.gated_(a, b, factor)
    return a


def _add_normed(x: Tensor, h: Tensor, gain: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    from . import triton_kernels

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        triton_kernels.add_normed(out, x, h, gain, gate, eps)
    return out


def _register() -> None:
    kernels: tuple[Callable[..., Tensor], ...] = (_gated_, _add_normed)
    shapes: tuple[Callable[..., Tensor], ...] = (
        lambda a, b, factor: a,
        lambda x, h, gain, gate, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
    )
    for schema, kernel, shape in zip(SCHEMAS, kernels, shapes, strict=True):
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, kernel, "CUDA")  # AMD's GPUs, too
        torch.library.register_fake(f"{SPACE}::{name}", shape, lib=_library)


_register()
_GATED, _ADD_NORMED = (getattr(getattr(torch.ops, SPACE), name).default for name in ("gated_", "add_normed"))
