"""A GPU's work without a GPU: what a computation on fake CUDA tensors launches, moves and waits for.

Under torch's FakeTensorMode every operator tells the shapes, dtypes and devices of its results and computes nothing, so
published sizes cost nothing, and tensors of two devices in one operator raise as on a GPU. What can't be seen so: how
long something takes, which kernel a library picks, and anything that follows from values.

    with torch.no_grad(), FakeTensorMode():
        model, x = build(device="cuda"), torch.empty(..., device="cuda")
        with Work() as work:
            model(x)
    assert not work.copies and not work.waits

Not in inference mode: there operators come before they are taken apart, and views of several steps count as kernels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators that launch nothing: views, and memory that nobody fills
NOTHING = set(
    "view _unsafe_view reshape alias as_strided slice select narrow transpose permute t expand unsqueeze squeeze split "
    "split_with_sizes unbind chunk detach unfold diagonal movedim view_as_complex view_as_real lift_fresh set_ device "
    "_reshape_alias empty empty_like empty_strided new_empty new_empty_strided".split()
)
# what they return is read from the device before the CPU can go on
WAITS = set("_local_scalar_dense item is_nonzero equal nonzero masked_select _unique2 unique_consecutive".split())


class Work(TorchDispatchMode):
    """Counts, while it is entered, what would reach a CUDA device.

    launches: kernels by operator. traffic: bytes of what they read and write. copies: operators that carry data between
    the device and the CPU. waits: operators for whose results the CPU would wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.traffic = 0
        self.copies: list[str] = []
        self.waits: list[str] = []
        self._inside = 0  # of something that counts as a whole

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = function._schema.name.split("::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in WAITS and any(tensor.is_cuda for tensor in tensors):
            self.waits.append(name)  # before the call: fake tensors have no values, and some raise
        out = function(*args, **(kwargs or {}))
        tensors += [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1 and name in ("_to_copy", "copy_"):
            self.copies.append(name)
        if not self._inside and space != "prim" and name not in NOTHING:
            self._count(name, tensors)
        return out

    def _count(self, name: str, tensors: list[Tensor]) -> None:
        tensors = [tensor for tensor in tensors if tensor.is_cuda]
        if tensors:
            self.launches[name] += 1
            self.traffic += sum(_bytes(tensor) for tensor in tensors)

    @contextmanager
    def whole(self, compiled: type) -> Iterator[None]:
        """While it is entered, what a `Compiled` of the core does counts as one kernel, as torch.compile makes it."""
        call = compiled.__call__

        def counted(function: Any, *arguments: Any) -> Any:
            self._inside += 1
            try:
                out = function.function(*arguments)
            finally:
                self._inside -= 1
            self._count(function.function.__name__, [leaf for leaf in (*arguments, out) if isinstance(leaf, Tensor)])
            return out

        compiled.__call__ = counted
        try:
            yield
        finally:
            compiled.__call__ = call


def attention(_replaced: Callable, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """As an override of ComfyUI's attention: one kernel."""
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out.transpose(1, 2).flatten(2)


def _bytes(tensor: Tensor) -> int:
    """What is read of it at least: each element once, however often a broadcast repeats it."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in strides if stride or size == 0)
