"""Attention by choice: the host's backends and torch's, each checked against plain attention before it is trusted.

A run with a chosen backend carries a `Choice` as the override that the host's attention functions look for. For every
model and size, the first call computes plain attention as well; a backend that differs by more than its dtype explains,
or fails, is refused with a warning, and the run goes on with plain attention.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management as mm
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

AUTO = "auto"
PLAIN = "pytorch"  # the host's name for torch's scaled_dot_product_attention, which every other one is held against
OVERRIDE = "optimized_attention_override"  # where the host's attention functions look for another one
# torch's own kernels, one at a time; plain attention takes the one that torch thinks best
TORCH_KERNELS = {"pytorch cudnn": SDPBackend.CUDNN_ATTENTION, "pytorch flash": SDPBackend.FLASH_ATTENTION}
# the host's, as it registers them where they are installed, in the order of the list
HOST_BACKENDS = ("sage3", "sage", "flash", "xformers", "sub_quad", "split")
# exact ones that `auto` compares on CUDA; elsewhere plain attention has been the fastest
CUDA_CANDIDATES = (PLAIN, "pytorch cudnn", "pytorch flash", "sage3", "sage", "flash", "xformers")
# largest ||difference|| / ||plain||. Two exact kernels differ by some roundings of their results (2^-8, 2^-11, 2^-24)
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5}
TIMED_CALLS = 3

Backend = Callable[..., Tensor]  # the host's: (q, k, v, heads, mask=None, skip_reshape=..., ...) -> [B, N, heads * D]


def choices() -> list[str]:
    """`auto`, plain attention, and what else is installed here."""
    return [AUTO, *_backends()]


def choose(name: str, model: Any, options: dict[str, Any]) -> Choice | None:
    """What to put at OVERRIDE for a run of this ModelPatcher; None where nothing is to be replaced.

    options: the run's transformer options. Raises ValueError for a backend that is not installed, or where another node
    has put its own attention there.
    """
    installed = _backends()
    if name != AUTO and name not in installed:
        raise ValueError(f"attention is {name!r}, which is not installed here; there are {', '.join(choices())}.")
    if OVERRIDE in options:
        if name == AUTO:
            return None
        raise ValueError(
            f"attention {name!r} can't be combined with a node that replaces the attention of the model. Remove that "
            f"node or set attention to {AUTO!r}."
        )
    if name != AUTO:
        names = [name]
    elif mm.is_device_cuda(model.load_device):
        names = [candidate for candidate in CUDA_CANDIDATES if candidate in installed]
    else:
        names = [PLAIN]
    return Choice({name: installed[name] for name in names}, _verdicts.setdefault(model.model, {}))


class Choice:
    """Takes the place of the host's attention function; among several backends it is for the fastest that passes."""

    steady = True  # the same at every step, unlike what other nodes may put there

    def __init__(self, candidates: dict[str, Backend], verdicts: dict[Any, Backend | None]):
        self.candidates = candidates
        self.verdicts = verdicts

    def __call__(self, _replaced: Backend, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any):
        if list(self.candidates) == [PLAIN]:
            return self.candidates[PLAIN](q, k, v, heads, *args, **kwargs)
        call = partial(_call, q=q, k=k, v=v, heads=heads, args=args, kwargs=kwargs)
        masked = kwargs.get("mask") is not None or bool(args and args[0] is not None)
        size = (*self.candidates, q.shape, k.shape, q.dtype, str(q.device), masked)
        if size not in self.verdicts:
            plain, self.verdicts[size] = self._judged(call, size)
            return plain
        return call(self.verdicts[size])

    def _judged(self, call: Callable[[Backend], Tensor], size: Any) -> tuple[Tensor, Backend]:
        """(plain attention's result, the backend for this size)."""
        safe = host_attention.get_attention_function(PLAIN)
        plain = call(safe)
        passed = {}
        for name, backend in self.candidates.items():
            reason = None if backend is safe else _refusal(call, backend, plain)
            if reason is None:
                passed[name] = backend
            elif len(self.candidates) == 1:
                logger.warning("attention %r is refused for %s: %s. %r is used.", name, _words(size), reason, PLAIN)
            else:
                logger.info("attention %r is left out for %s: %s", name, _words(size), reason)
        if len(passed) > 1:
            times = {name: _seconds(call, backend) for name, backend in passed.items()}
            name = min(times, key=lambda name: times[name])
            logger.info("attention for %s: %s, the fastest of %s", _words(size), name, times)
            return plain, passed[name]
        return plain, next(iter(passed.values()), safe)


# model -> what was found for it; a model that is gone takes its entry along
_verdicts: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _backends() -> dict[str, Backend]:
    found: dict[str, Backend] = {PLAIN: host_attention.get_attention_function(PLAIN)}
    if mm.is_device_cuda(mm.get_torch_device()):
        found |= {name: partial(_torch_kernel, kernel) for name, kernel in TORCH_KERNELS.items()}
    for name in HOST_BACKENDS:
        backend = host_attention.get_attention_function(name, None)
        if backend is not None:
            found[name] = backend
    return found


def _torch_kernel(kernel: SDPBackend, q: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    with sdpa_kernel(kernel):
        return host_attention.get_attention_function(PLAIN)(q, *arguments, **settings)


def _call(backend: Backend, *, q: Tensor, k: Tensor, v: Tensor, heads: int, args: tuple, kwargs: dict) -> Tensor:
    return backend(q, k, v, heads, *args, **kwargs)


def _refusal(call: Callable[[Backend], Tensor], backend: Backend, plain: Tensor) -> str | None:
    """Why a backend can't be used, in words; None if it can."""
    try:
        result = call(backend)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        if isinstance(error, mm.OOM_EXCEPTION):
            raise
        return f"it failed with {type(error).__name__}: {error}"
    error_norm = (result.float() - plain.float()).norm() / plain.float().norm().clamp_min(1e-30)
    tolerance = TOLERANCE.get(plain.dtype, TOLERANCE[torch.float32])
    if not error_norm <= tolerance:  # NaN, too
        return f"it errs by {float(error_norm):.2g}, expected at most {tolerance:.2g} in {plain.dtype}"
    return None


def _seconds(call: Callable[[Backend], Tensor], backend: Backend) -> float:
    mm.synchronize()
    started = time.perf_counter()
    for _ in range(TIMED_CALLS):
        call(backend)
    mm.synchronize()
    return (time.perf_counter() - started) / TIMED_CALLS


def _words(size: Any) -> str:
    *_, q, k, dtype, _device, _masked = size
    return f"{q[-2]} queries to {k[-2]} keys in {dtype}"
