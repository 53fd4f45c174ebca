"""A second device on a machine without one: its memory is CPU memory that mixes with nothing else.

Built on torch's Python backend for PrivateUse1 (experimental, torch >= 2.9). Each tensor of the device hides a CPU
tensor; every operator is run on those. An operator that gets tensors of both devices raises, as on a GPU, so a weight
that a partial load leaves behind is found. Limits: views are copies, so writing through a view raises.

Importing this registers the device for the rest of the process: use it in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

moved = {"to device": 0, "from device": 0}  # bytes copied so far

_hidden: dict[int, torch.Tensor] = {}  # storage -> the CPU tensor behind it: a Parameter shares its tensor's storage
_VIEWS = set(
    "view _unsafe_view _reshape_alias as_strided slice select narrow transpose permute t expand unsqueeze squeeze "
    "split split_with_sizes unbind chunk alias detach unfold diagonal movedim".split()
)


def is_fake(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _wrap(cpu: torch.Tensor, is_view: bool = False) -> torch.Tensor:
    cpu = cpu.contiguous().clone() if is_view or cpu.storage_offset() else cpu.contiguous()
    tensor = torch._C._acc.create_empty_tensor(tuple(cpu.shape), cpu.dtype)
    tensor._behind, tensor._copy_of_view = cpu, is_view
    _hidden[tensor.untyped_storage()._cdata] = cpu
    return tensor


def _behind(tensor: torch.Tensor) -> torch.Tensor:
    cpu = getattr(tensor, "_behind", None)
    if cpu is None:
        cpu = _hidden[tensor.untyped_storage()._cdata]
        if cpu.shape != tensor.shape or tensor.storage_offset():
            cpu = cpu.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return cpu


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator: on the hidden tensors, its result wrapped again."""
    values, _ = tree_flatten((args, kwargs))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    name = op._schema.name.split("::")[1]
    if any(is_fake(t) for t in tensors) and any(not is_fake(t) and t.ndim > 0 for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {NAME} and cpu")
    in_place = name.endswith("_") and not name.startswith("_")
    if in_place and getattr(args[0], "_copy_of_view", False):
        raise NotImplementedError(f"{NAME}: {name} would write into the copy of a view")
    args_behind, kwargs_behind = tree_map(_unwrap, args), tree_map(_unwrap, kwargs)
    if name in ("view", "_unsafe_view", "_reshape_alias"):
        out = args_behind[0].reshape(args_behind[1])
    else:
        out = op(*args_behind, **kwargs_behind)
    behind, _ = tree_flatten((args_behind, kwargs_behind))
    given = {id(cpu): fake for fake, cpu in zip(values, behind, strict=True) if is_fake(fake)}
    return tree_map(lambda value: _rewrap(value, given, name), out)


def _unwrap(value: Any) -> Any:
    if is_fake(value):
        return _behind(value)
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _rewrap(value: Any, given: dict[int, torch.Tensor], name: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return given[id(value)] if id(value) in given else _wrap(value, name in _VIEWS)


def _empty(size: Any, *_args: Any, dtype: torch.dtype | None = None, **_kwargs: Any) -> torch.Tensor:
    return _wrap(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def _as_strided(tensor: torch.Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> torch.Tensor:
    return _wrap(_behind(tensor).as_strided(size, stride, storage_offset or 0), is_view=True)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if is_fake(target) and getattr(target, "_copy_of_view", False):
        raise NotImplementedError(f"{NAME}: copy_ would write into the copy of a view")
    if not is_fake(source):
        moved["to device"] += source.nbytes
    if not is_fake(target):
        moved["from device"] += target.nbytes
    _unwrap(target).copy_(_unwrap(source))
    return target


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    if not all(is_fake(tensor) for tensor in (x, weight, bias) if tensor is not None):
        raise RuntimeError("Expected all tensors to be on the same device: convolution")
    return _wrap(torch.ops.aten.convolution(_behind(x), _behind(weight), _unwrap(bias), *rest))


def _factory(name: str) -> Any:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "layout")}
        return _wrap(op(*args, **kwargs, device=torch.device("cpu")))

    return make


def _direct(name: str) -> Any:
    """A composite operator whose own kernel writes through views: run whole on the hidden tensors."""
    op = getattr(torch.ops.aten, name).default
    return lambda *args, **kwargs: _run(op, *args, **kwargs)


_everything = torch.library.Library("_", "IMPL")
_everything.fallback(_run, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
for _name, _kernel in {
    "empty.memory_format": _empty,
    "empty_strided": _empty,
    "as_strided": _as_strided,
    "_copy_from": _copy_from,
    "_local_scalar_dense": lambda tensor: _behind(tensor).item(),
    "convolution_overrideable": _convolution,
    **{name: _factory(name) for name in ("arange", "arange.start", "arange.start_step", "linspace")},
    **{name: _direct(name) for name in ("repeat", "constant_pad_nd", "stack", "roll", "flip")},
}.items():
    _aten.impl(_name, _kernel, "PrivateUse1")
