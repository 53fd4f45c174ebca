"""Memory of the process that the tests run in, as Linux tells it (else the test is skipped), and that of tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROCESS = Path("/proc/self")


def anonymous() -> int:
    """Bytes that are not a file's: what mapping a file does not add to."""
    return _read("RssAnon")


def growth(call: Callable[[], object]) -> int:
    """Bytes by which the memory grew at its peak during the call, pages of mapped files included."""
    gc.collect()
    before = _read("VmRSS")
    (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    call()
    return _read("VmHWM") - before


def tensors(call: Callable[[], object]) -> int:
    """The most bytes that tensors made by the call took at a time: what an allocator keeps back is not among them."""
    with _Tensors() as counted:
        call()
    return counted.peak


class _Tensors(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # of storages that are alive
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, storage: int) -> None:
        self.live -= self.sizes.pop(storage)


def _read(name: str) -> int:
    if not (PROCESS / "clear_refs").exists():
        pytest.skip("this system does not tell a process's memory")
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
