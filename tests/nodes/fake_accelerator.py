"""A second device on a machine without one: its memory is CPU memory that mixes with nothing else.

Built on torch's Python backend for PrivateUse1 (experimental, torch >= 2.9). Each tensor of the device hides a CPU
tensor; every operator is run on those. An operator that gets tensors of both devices raises, as on a GPU, so a weight
that a partial load leaves behind is found. Limits: to who asks, every tensor is contiguous.

`live` and `peak` count bytes as a real device would have them: a view takes none and keeps what it looks at alive, a
reshape that can't be a view takes its own, attention keeps no scores. Not counted: `contiguous()` of a view, workspaces
inside kernels, what the allocator rounds up. `moved` and `waits` count what the CPU would have to wait for.

Importing this registers the device for the rest of the process: use it in a process of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

moved = {"to device": 0, "from device": 0}  # bytes copied so far

waits = {"to device": 0, "from device": 0, "values": 0}  # copies so far, and values asked for, as by item()

_bytes = {"live": 0, "peak": 0}

capacity: int | None = None  # bytes; an allocation beyond them is torch.OutOfMemoryError, as on a GPU


class _Block:
    """Memory of the device; free again when the last tensor in it is gone."""

    def __init__(self, size: int):
        self.size = size
        _bytes["live"] += size
        _bytes["peak"] = max(_bytes["peak"], _bytes["live"])

    def __del__(self):
        _bytes["live"] -= self.size


class _Hidden(NamedTuple):
    """What stands behind a storage of the device; a Parameter shares its tensor's storage."""

    cpu: torch.Tensor
    block: _Block


_hidden: dict[int, _Hidden] = {}  # by storage
_RESHAPES = ("view", "_unsafe_view", "_reshape_alias")
# composite operators that are one kernel on a real device
_WHOLE = ("repeat", "constant_pad_nd", "_pad_circular", "stack", "roll", "flip", "scaled_dot_product_attention")
# views that torch would work out from strides
_STRIDED = (
    "slice.Tensor select.int transpose.int permute t expand unsqueeze squeeze squeeze.dim squeeze.dims split.Tensor "
    "split_with_sizes unbind.int unfold diagonal view.dtype"
).split()
_VALUES = (
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
)  # what they return can't be told without the tensor's values
_VIEWS = set(
    "view _unsafe_view _reshape_alias as_strided slice select narrow transpose permute t expand unsqueeze squeeze "
    "split split_with_sizes unbind chunk alias detach unfold diagonal movedim".split()
)


def is_fake(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def live() -> int:
    """Bytes that are allocated on the device."""
    return _bytes["live"]


def peak() -> int:
    """The most bytes that were allocated at a time, since the start or `reset_peak`."""
    return _bytes["peak"]


def reset_peak() -> None:
    _bytes["peak"] = _bytes["live"]


def _wrap(cpu: torch.Tensor, view_of: torch.Tensor | None = None) -> torch.Tensor:
    """view_of: the tensor whose memory it shares."""
    if view_of is None:
        cpu = cpu.contiguous().clone() if cpu.storage_offset() else cpu.contiguous()
    tensor = torch._C._acc.create_empty_tensor(tuple(cpu.shape), cpu.dtype)
    tensor._behind = cpu
    storage = tensor.untyped_storage()
    if view_of is None and capacity is not None and _bytes["live"] + cpu.nbytes > capacity:
        raise torch.OutOfMemoryError(f"{NAME}: no room for {cpu.nbytes} bytes beside {_bytes['live']}")
    _hidden[storage._cdata] = _Hidden(cpu, _Block(cpu.nbytes) if view_of is None else _hidden_of(view_of).block)
    weakref.finalize(storage, _hidden.pop, storage._cdata).atexit = False
    return tensor


def _hidden_of(tensor: torch.Tensor) -> _Hidden:
    return _hidden[tensor.untyped_storage()._cdata]


def _behind(tensor: torch.Tensor) -> torch.Tensor:
    cpu = getattr(tensor, "_behind", None)
    if cpu is None:
        cpu = _hidden_of(tensor).cpu
        if cpu.shape != tensor.shape or tensor.storage_offset():
            cpu = cpu.contiguous().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return cpu


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator: on the hidden tensors, its result wrapped again."""
    values = list(_leaves((args, kwargs)))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    name = op._schema.name.split("::")[1]
    fake = [is_fake(tensor) for tensor in tensors]
    if any(fake) and not all(one or tensor.ndim == 0 for one, tensor in zip(fake, tensors, strict=True)):
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {NAME} and cpu")
    if name in _VALUES or name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:]):
        waits["values"] += 1
    args_behind, kwargs_behind = _mapped(_unwrap, args), _mapped(_unwrap, kwargs)
    if name in _RESHAPES and not isinstance(args_behind[1], torch.dtype):
        out = args_behind[0].reshape(args_behind[1])
    else:
        out = op(*args_behind, **kwargs_behind)
    behind = _leaves((args_behind, kwargs_behind))
    pairs = zip(values, behind, strict=True)
    given = {id(cpu): value for value, cpu in pairs if value is not cpu and isinstance(value, torch.Tensor)}
    return _mapped(lambda value: _rewrap(value, given, args[0] if name in _VIEWS else None), out)


def _leaves(value: Any) -> Iterator[Any]:
    """As torch's tree_flatten has them, in half of the time; what operators are given is simple."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for part in value:
        yield from _leaves(part)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(change, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, part) for part in value])
    return change(value)


def _unwrap(value: Any) -> Any:
    if is_fake(value):
        return _behind(value)
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _rewrap(value: Any, given: dict[int, torch.Tensor], viewed: torch.Tensor | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in given:
        return given[id(value)]
    shares = viewed is not None and value.untyped_storage()._cdata == _behind(viewed).untyped_storage()._cdata
    return _wrap(value, viewed if shares else None)  # a reshape may have had to copy


def _empty(size: Any, *_args: Any, dtype: torch.dtype | None = None, **_kwargs: Any) -> torch.Tensor:
    return _wrap(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def _as_strided(tensor: torch.Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> torch.Tensor:
    cpu = _behind(tensor)
    if not cpu.is_contiguous():
        raise NotImplementedError(f"{NAME}: as_strided of a view whose strides it does not know")
    return _wrap(cpu.as_strided(size, stride, cpu.storage_offset() + (storage_offset or 0)), view_of=tensor)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if not is_fake(source):
        moved["to device"] += source.nbytes
        waits["to device"] += 1
    if not is_fake(target):
        moved["from device"] += target.nbytes
        waits["from device"] += 1
    _unwrap(target).copy_(_unwrap(source))
    return target


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    if not all(is_fake(tensor) for tensor in (x, weight, bias) if tensor is not None):
        raise RuntimeError("Expected all tensors to be on the same device: convolution")
    return _wrap(torch.ops.aten.convolution(_behind(x), _behind(weight), _unwrap(bias), *rest))


def _item(tensor: torch.Tensor) -> Any:
    waits["values"] += 1
    return _behind(tensor).item()


def _factory(name: str) -> Any:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "layout")}
        return _wrap(op(*args, **kwargs, device=torch.device("cpu")))

    return make


def _direct(name: str) -> Any:
    """An operator that torch would take apart, run whole on the hidden tensors."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return lambda *args, **kwargs: _run(op, *args, **kwargs)


_everything = torch.library.Library("_", "IMPL")
_everything.fallback(_run, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
for _name, _kernel in {
    "empty.memory_format": _empty,
    "empty_strided": _empty,
    "as_strided": _as_strided,
    "_copy_from": _copy_from,
    "_local_scalar_dense": _item,
    "convolution_overrideable": _convolution,
    **{name: _factory(name) for name in ("arange", "arange.start", "arange.start_step", "linspace")},
    **{name: _direct(name) for name in (*_WHOLE, *_STRIDED)},
}.items():
    _aten.impl(_name, _kernel, "PrivateUse1")
