"""Quantized weights in ComfyUI: its own quantized tensors and operations, and one more kind of them for GGUF.

Where a file's format is known to ComfyUI, its mixed-precision layers hold the weights as the file has them. GGUF's
weights become quantized tensors of a layout of ours, which every layer of ComfyUI can move, offload and expand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import comfy.ops
import comfy.quant_ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...zimage_core.weights import gguf_dequant
from ...zimage_core.weights.component import Component
from ...zimage_core.weights.quantized import Packed

try:  # ComfyUI logs it and goes on without, and so do we: weights are then expanded when they are loaded
    from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_class
except ImportError:
    BaseLayoutParams = QuantizedLayout = object
    QuantizedTensor = None

GGUF = "ZImageGGUFLayout"


def keeps(component: Component) -> bool:
    """Whether weights of this component stay quantized in ComfyUI."""
    return QuantizedTensor is not None and any(
        _kept(component, name, shape) for name, shape in component.shapes.items()
    )


def is_gguf(component: Component) -> bool:
    """Whether any of its weights is quantized as GGUF has it."""
    return any(part.is_gguf for name in component.shapes for part in component.packed(name))


def operations(
    component: Component, compute_dtype: torch.dtype, device: torch.device, *, exact: bool = False
) -> tuple[Any, torch.device]:
    """ComfyUI's layers for it, and the device to build them on.

    compute_dtype: that weights are expanded to. device: that computes. exact: no matmuls in the quantized
    format itself.
    """
    if is_gguf(component):
        return GGUFOperations, torch.device("meta")
    # these layers hold nothing before they are loaded, and then move it to the device that they were built on
    if exact:
        layers = comfy.ops.mixed_precision_ops({"mixed_ops": True}, compute_dtype, full_precision_mm=True)
    else:  # ComfyUI knows in which formats the device computes; others are expanded layer by layer
        marked = SimpleNamespace(quant_config={"mixed_ops": True})
        layers = comfy.ops.pick_operations(None, compute_dtype, load_device=device, model_config=marked)
    return layers, torch.device("cpu")


def state_dict(component: Component, dtype: torch.dtype | None, compute_dtype: torch.dtype) -> dict[str, Tensor]:
    """What such layers load. dtype: of the weights that are not quantized; None is the file's."""
    state: dict[str, Tensor] = {}
    for name, shape in component.shapes.items():
        found = quantized_tensors(component, name, shape, compute_dtype)
        state |= found or {name: component.tensor(name, shape, dtype=dtype)}
    return state


def quantized_tensors(
    component: Component, name: str, shape: tuple[int, ...], compute_dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a layer loads for a weight that stays as the file has it; nothing where it can't."""
    parts = _kept(component, name, shape)
    if not parts:
        return {}
    if parts[0].is_gguf:
        return {name: _gguf_tensor(parts, shape, compute_dtype)}
    layer = name.removesuffix("weight")
    marker = json.dumps({**parts[0].settings, "format": parts[0].format}).encode()
    tensors = {f"{layer}{part}": tensor for part, tensor in parts[0].tensors.items()}
    return {**tensors, f"{layer}comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)}


def _kept(component: Component, name: str, shape: tuple[int, ...]) -> list[Packed]:
    """The parts of a weight that can stay as they are: GGUF's always, others where ComfyUI has their very form."""
    parts = component.packed(name) if len(shape) == 2 and name.endswith(".weight") else []
    if not parts or all(part.is_gguf for part in parts):
        return parts
    known = parts[0].format in comfy.quant_ops.QUANT_ALGOS and "embed_tokens" not in name
    by_rows = parts[0].format.startswith("float8") and parts[0].tensors["weight_scale"].numel() > 1
    unread = by_rows or "weight_correction" in parts[0].tensors  # some ComfyUI have these, and leave them out
    return parts if known and len(parts) == 1 and not unread else []


# GGUF as a layout of ComfyUI's quantized tensors


class GGUFLayout(QuantizedLayout):
    """Bytes of one or several GGUF tensors that are stacked by rows."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        parts: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (type, shape) of each

        def _tensor_fields(self) -> list[str]:
            return []  # scales lie among the bytes

    @classmethod
    def quantize(cls, tensor, **_settings):
        raise NotImplementedError("GGUF weights can't be made anew; patches are added when they are expanded")

    @classmethod
    def dequantize(cls, qdata, params):
        return gguf_dequant.expand_stacked(params.parts, qdata, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata}


if QuantizedTensor is not None:
    register_layout_class(GGUF, GGUFLayout)


def _gguf_tensor(parts: list[Packed], shape: tuple[int, ...], compute_dtype: torch.dtype) -> Tensor:
    stacked = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if stacked != shape:
        raise ValueError(f"The GGUF weight has shape {list(stacked)}, expected {list(shape)}.")
    raws = [part.tensors["weight"] for part in parts]
    forms = tuple((part.format, part.shape) for part in parts)
    params = GGUFLayout.Params(scale=None, orig_dtype=compute_dtype, orig_shape=shape, parts=forms)
    return QuantizedTensor(torch.cat(raws) if len(raws) > 1 else raws[0], GGUF, params)


class _Quantized:
    """What layers with quantized weights need besides ComfyUI's own class."""

    _parameters: dict[str, Any]

    def _apply(self, fn, recurse=True):
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(fn(parameter), requires_grad=False)
        return self

    def convert_weight(self, weight, inplace=False, **_settings):
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


class GGUFOperations(comfy.ops.manual_cast):
    """ComfyUI's casting layers, which expand a quantized weight as they cast it."""

    class Linear(_Quantized, comfy.ops.manual_cast.Linear):
        pass

    class Embedding(_Quantized, comfy.ops.manual_cast.Embedding):
        def forward_comfy_cast_weights(self, input, out_dtype=None):
            weight = self.weight
            if self.weight_function or not isinstance(weight, QuantizedTensor) or len(weight._params.parts) > 1:
                table = weight.to(input.device)
                table = table.dequantize() if isinstance(table, QuantizedTensor) else table
                for function in self.weight_function:
                    table = function(table)
                rows = F.embedding(input, table)
            else:  # a vocabulary is large: only the rows that are asked for are moved and expanded
                ((name, (count, width)),) = weight._params.parts
                raw = weight._qdata.view(count, -1)[input.flatten().to(weight._qdata.device)].to(input.device)
                rows = gguf_dequant.expand(name, raw, (*input.shape, width), weight.dtype)
            return rows if out_dtype is None else rows.to(out_dtype)
