"""What operations would do on a GPU: bytes moved, memory taken, copies over the bus and waits. No GPU is needed.

`with FakeTensorMode(), Traffic() as seen:` and tensors with `device="cuda"`; CPU tensors are counted as well.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = set(
    "view _unsafe_view _reshape_alias alias as_strided slice select narrow transpose permute t expand unsqueeze "
    "squeeze split split_with_sizes unbind chunk detach unfold diagonal movedim lift_fresh tensor_split".split()
)
EMPTY = set("empty empty_like empty_strided new_empty new_empty_strided".split())
WAITS = set("_local_scalar_dense item nonzero equal masked_select is_nonzero _unique2".split())


class Traffic(TorchDispatchMode):
    """Counts from its entry on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0  # of all arguments and results
        self.launches = 0
        self.copies: list[str] = []  # over the bus
        self.waits: list[str] = []
        self.live = self.peak = 0  # bytes of what is made here
        self._known: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, name = op._schema.name.split("::")
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self._known.update(map(_storage, given))
        out = op(*args, **kwargs)
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        for tensor in made:
            self._add(tensor)
        if name in WAITS:
            self.waits.append(name)
        devices = {value.device.type for value in [*given, *made] if value.ndim or name in ("_to_copy", "copy_")}
        if len(devices) > 1:
            self.copies.append(name)
        if space != "prim" and name not in VIEWS | EMPTY:
            self.launches += 1
            written = made if not any(value is kept for value in made for kept in given) else []
            self.bytes += sum(map(_bytes, given)) + sum(map(_bytes, written))
            self.bytes += sum(_bytes(value) for value in made) if name.endswith("_") else 0
        return out

    def _add(self, tensor: Tensor) -> None:
        if (key := _storage(tensor)) in self._known:
            return
        self._known.add(key)
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Those that it really has: what is repeated by a stride of 0 counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
