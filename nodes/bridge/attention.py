"""Attention by choice: ComfyUI's backends and torch's kernels, checked before the first step of a run.

A run carries a `Choice` as the override that ComfyUI's attention functions look for. Before its first step the chosen
backend computes random tensors of the run's sizes; one that fails, or errs by more than its kind explains, is refused
with a warning, and the run takes plain attention. So do calls of sizes that were not foreseen, calls with a mask, and
whatever is not the transformer's own. Inside the steps nothing is judged, and ComfyUI never waits for the device.

Plain attention is what ComfyUI itself took for the device, so that torch's is not forced on those where ComfyUI
avoids it. Only on a CPU torch's takes the place of ComfyUI's, which is slower there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import comfy.model_management as mm
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from comfy.cli_args import args as flags
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .sizes import Size, example_of, key_of, sizes_of, words_of

logger = logging.getLogger(__name__)

AUTO = "auto"
PYTORCH = "pytorch"  # ComfyUI's name for torch's scaled_dot_product_attention
OVERRIDE = "optimized_attention_override"  # where ComfyUI's attention functions look for another one
KEY = "zimage_attention"  # of our wrapper among ComfyUI's
# torch's own kernels, one at a time; for "pytorch" torch takes the first of ComfyUI's list that can
TORCH_KERNELS = {"pytorch cudnn": SDPBackend.CUDNN_ATTENTION, "pytorch flash": SDPBackend.FLASH_ATTENTION}
FIRST = ("sage3", "sage", "flash", "xformers", "sub_quad", "split")  # in the order of the list, before newer ones
EXACT = (PYTORCH, *TORCH_KERNELS, "flash", "xformers", "sub_quad", "split")
# what `auto` compares with plain attention on an NVIDIA GPU
CANDIDATES = (PYTORCH, "pytorch cudnn", "flash", "xformers")

# largest ||error|| / ||exact||. A kernel rounds its weights and its result (2^-8, 2^-11, 2^-24)
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5}
# of all others, which quantize q and k to 8 or 4 bits: whoever names one wants that, but nothing broken
QUANTIZED_TOLERANCE = 2**-3
ROWS = 64  # of the queries that are computed exactly, in float32 and without any backend
# On a GPU a trial takes tens of calls, and cuDNN builds a plan for every length (43 ms on an H100, where 8 steps at
# 1024x1024 then take 0.85 s in place of 0.94): `auto` tries others where attention takes so many seconds of a run, and
# changes where that much of it is gained.
WORTH_SECONDS = 0.1
WORTH_SHARE = 0.05
CUDNN_FROM = 9  # major compute capability
TIMED_CALLS = 3
# of a call of the transformer's own; one with more to it takes plain attention
USUAL = ("skip_reshape", "transformer_options", "_inside_attn_wrapper")

Backend = Callable[..., Tensor]  # ComfyUI's: (q, k, v, heads, mask=None, skip_reshape=..., ...) -> [B, N, heads * D]


def choices() -> list[str]:
    """`auto`, torch's attention, and what else is installed here."""
    return [AUTO, *_backends()]


def choose(name: str, model: Any, options: dict[str, Any]) -> Choice | None:
    """Puts a choice of attention into the transformer options of a run of this ModelPatcher.

    None where nothing is to be replaced, because another node has put its own attention there. Raises ValueError for a
    backend that is not installed, or one by name where another node has.
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
    tried = _tried(model.load_device) if name == AUTO else (name,)
    return _install(Choice(name, tried, model.load_device), options)


def _install(choice: Choice, options: dict[str, Any]) -> Choice:
    options[OVERRIDE] = choice
    kind = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE
    options.setdefault("wrappers", {}).setdefault(kind, {}).pop(KEY, None)
    comfy.patcher_extension.add_wrapper_with_key(kind, KEY, choice.around_run, options)
    return choice


def ran(options: dict[str, Any]) -> str:
    """In words, which attention the last run with these transformer options took, or the next one is to take."""
    override = options.get(OVERRIDE)
    if isinstance(override, Choice):
        return f"attention {override.ran!r}"
    if override is None:
        return f"attention {_name(comfy_attention.optimized_attention)!r}"
    name = getattr(override, "__qualname__", type(override).__qualname__)
    return f"the attention of another node ({getattr(override, '__module__', '')}.{name}), which has to stay"


def force_plain(options: dict[str, Any]) -> bool:
    """Has further runs with these options take plain attention; False where the last one did, or another node's."""
    override = options.get(OVERRIDE)
    if not isinstance(override, Choice) or override.ran == override.plain:
        return False
    _install(Choice(override.name, (), override.device), options)
    return True


class Choice:
    """Takes the place of ComfyUI's attention function. Before the first step of a run it settles on a backend."""

    def __init__(self, name: str, tried: tuple[str, ...], device: torch.device):
        self.name = name  # as the user chose
        self.tried = tried  # backends that may take the place of plain attention
        self.device = device
        self.backend = _plain(device)
        self.plain = _name(self.backend)
        self.ran = name if tried == (name,) else self.plain  # by the last run, or to be by the first

    def __call__(self, _replaced: Backend, q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None, *rest, **more):
        usual = mask is None and not rest and more.get("skip_reshape") and all(key in USUAL for key in more)
        if usual and _run is not None:
            # Torch's own is left to the compiler. Into most others it can't look, and the sizes that were checked would
            # become constants of its graph: they are one operator to it, which has the name to tell graphs apart.
            if torch.compiler.is_compiling() and not (_run.name == PYTORCH and self.plain == PYTORCH):
                return torch.ops.zimage.attention(q, k, v, _run.name)
            backend = None if torch.compiler.is_compiling() else _run.backend_for(q, k)
            if backend is not None:
                return backend(q, k, v, heads, skip_reshape=True)
        return self.backend(q, k, v, heads, mask, *rest, **more)

    def around_run(self, executor: Any, guider: Any, sigmas: Tensor, extra: Any, callback: Any, noise: Tensor, *rest):
        """ComfyUI's wrapper of a run: model and noise are on the device by now, prompts and areas are resolved."""
        global _run
        before = _run
        _run = self._settled(guider, noise, len(sigmas) - 1)
        self.ran = _run.name
        try:
            return executor(guider, sigmas, extra, callback, noise, *rest)
        finally:
            if _run.backend is not None and not _run.used:
                logger.warning("attention %r was asked for nothing that it was checked for.", _run.name)
                self.ran = self.plain
            _run = before

    def _settled(self, guider: Any, noise: Tensor, steps: int) -> _Run:
        installed = _backends()
        tried = {name: installed[name] for name in self.tried if installed[name] is not self.backend}
        sizes = sizes_of(guider, noise, joint=self.name == AUTO) if tried else []
        name = None
        if sizes and self.name == AUTO:
            calls = steps * len(guider.inner_model.diffusion_model.layers) * len(sizes)
            name = self._fastest(tried, sizes, calls)
        elif sizes:
            (name,) = tried
            refusal = _refusal(name, tried[name], sizes)
            if refusal is not None:
                logger.warning("attention %r is refused for %s. %r is used.", name, refusal, self.plain)
                name = None
        if name is None:
            return _Run(self.plain, None, self.backend)
        return _Run(name, tried[name], self.backend, frozenset(map(key_of, sizes)))

    def _fastest(self, tried: dict[str, Backend], sizes: list[Size], calls: int) -> str | None:
        """The backend that is so much faster than plain attention that it is worth a change."""
        largest = max(sizes, key=lambda size: size.queries)
        plain = _seconds(self.backend, largest)
        if plain is None or plain * calls < WORTH_SECONDS:
            return None
        times = {}
        for name, backend in tried.items():
            refusal = _refusal(name, backend, sizes)
            if refusal is not None:
                logger.info("attention %r is left out for %s", name, refusal)
            elif (seconds := _seconds(backend, largest)) is not None:
                times[name] = seconds
        best = min(times, key=lambda name: times[name], default=None)
        if best is None or times[best] > (1 - WORTH_SHARE) * plain:
            best = None
        logger.info("attention for %s: %s, of %s", words_of(largest), best or self.plain, {self.plain: plain, **times})
        return best


@dataclass
class _Run:
    """What was settled for the run that is under way."""

    name: str
    backend: Backend | None  # None for plain attention
    plain: Backend
    sizes: frozenset[Any] = frozenset()  # for which `backend` was checked
    used: bool = False

    def backend_for(self, q: Tensor, k: Tensor) -> Backend | None:
        if (q.shape[-2], k.shape[-2], q.shape[-1], q.dtype, q.device) not in self.sizes:
            return None
        self.used = True
        return self.backend


# One run is under way at a time, on all of its devices. A graph of torch.compile looks for it here: what is in the
# transformer options ComfyUI's compile node takes for constant.
_run: _Run | None = None


@torch.library.custom_op("zimage::attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    """Attention of the run that is under way, as one piece for torch.compile."""
    assert _run is not None, f"attention {name!r} outside of a run"
    backend = _run.backend_for(q, k) or _run.plain
    return backend(q, k, v, q.shape[1], skip_reshape=True).contiguous()


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * v.shape[3])


def _plain(device: torch.device) -> Backend:
    asked = flags.use_split_cross_attention or flags.use_quad_cross_attention
    if mm.is_device_cpu(device) and not asked:
        return comfy_attention.get_attention_function(PYTORCH)
    return comfy_attention.optimized_attention


def _name(backend: Backend) -> str:
    registered = comfy_attention.REGISTERED_ATTENTION_FUNCTIONS.items()
    return next((name for name, function in registered if function is backend), backend.__name__)


def _tried(device: torch.device) -> tuple[str, ...]:
    """What `auto` may prefer to ComfyUI's own: nothing where that isn't torch's attention on an NVIDIA GPU."""
    if not mm.is_nvidia() or not mm.is_device_cuda(device) or not mm.pytorch_attention_enabled():
        return ()
    # ComfyUI's own list has cuDNN last; torch prefers it from this generation on (Hopper), where it is the fastest
    left_out = () if torch.cuda.get_device_capability(device)[0] >= CUDNN_FROM else ("pytorch cudnn",)
    return tuple(name for name in _backends() if name in CANDIDATES and name not in left_out)


def _backends() -> dict[str, Backend]:
    registered = comfy_attention.REGISTERED_ATTENTION_FUNCTIONS
    found: dict[str, Backend] = {PYTORCH: registered[PYTORCH]}
    if mm.is_device_cuda(mm.get_torch_device()):
        found |= _TORCH_BACKENDS
    return found | {name: registered[name] for name in (*FIRST, *registered) if name in registered}


def _torch_kernel(
    kernel: SDPBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **more: Any,
) -> Tensor:
    """One kernel of torch's, called like ComfyUI's backends, whose own call of torch would set other kernels."""
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask  # [B or 1, heads or 1, N or 1, N]
    settings = {name: more[name] for name in ("scale", "enable_gqa") if name in more}
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)  # [B, heads, N, D]
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


_TORCH_BACKENDS = {name: partial(_torch_kernel, kernel) for name, kernel in TORCH_KERNELS.items()}


# Trials


_refusals: dict[tuple[Backend, Size], str | None] = {}  # found so far
_times: dict[tuple[Backend, Size], float] = {}


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float32, [B, N, heads * D]; a head at a time, as it is to take little memory."""
    found = []
    for head in range(q.shape[1]):
        scores = q[:, head].float() @ k[:, head].float().transpose(1, 2) / math.sqrt(q.shape[-1])
        found.append(scores.softmax(-1) @ v[:, head].float())
    return torch.cat(found, -1)


def _refusal(name: str, backend: Backend, sizes: list[Size]) -> str | None:
    """Why a backend can't be used for these sizes, in words; None if it can."""
    for size in sizes:
        if (backend, size) not in _refusals:
            try:
                _refusals[backend, size] = _error(name, backend, size)
            except mm.InterruptProcessingException:
                raise
            except Exception as error:
                if _is_oom(error):  # perhaps not the next time
                    return f"{words_of(size)}: there is not enough memory for it"
                _refusals[backend, size] = f"it failed with {type(error).__name__}: {error}"
        refusal = _refusals[backend, size]
        if refusal is not None:
            return f"{words_of(size)}: {refusal}"
    return None


def _error(name: str, backend: Backend, size: Size) -> str | None:
    q, k, v = example_of(size)
    result = backend(q, k, v, size.heads, skip_reshape=True)
    rows = torch.linspace(0, size.queries - 1, ROWS, device=q.device).long()
    exact = _exact(q.index_select(2, rows), k, v)
    error = ((result.index_select(1, rows).float() - exact).norm() / exact.norm()).item()
    tolerance = QUANTIZED_TOLERANCE
    if name in EXACT:
        tolerance = TOLERANCE.get(size.dtype, TOLERANCE[torch.float32])
    if not error <= tolerance:  # NaN, too
        return f"it errs by {error:.2g}, expected at most {tolerance:.2g} in {size.dtype}"
    finite = math.isfinite(result.sum(dtype=torch.float32).item())  # one value that is not spoils the sum
    return None if finite else "not all of its values are finite"


def _seconds(backend: Backend, size: Size) -> float | None:
    """Of a call; None where memory doesn't suffice."""
    if (backend, size) not in _times:
        try:
            q, k, v = example_of(size)
            backend(q, k, v, size.heads, skip_reshape=True)  # the first one also builds plans and loads kernels
            mm.synchronize()
            started = time.perf_counter()
            for _ in range(TIMED_CALLS):
                backend(q, k, v, size.heads, skip_reshape=True)
            mm.synchronize()
        except Exception as error:
            if not _is_oom(error):
                raise
            return None
        _times[backend, size] = (time.perf_counter() - started) / TIMED_CALLS
    return _times[backend, size]


def _is_oom(error: Exception) -> bool:
    return mm.is_oom(error) if hasattr(mm, "is_oom") else isinstance(error, mm.OOM_EXCEPTION)  # older ComfyUI
