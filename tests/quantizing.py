"""Quantized weights for tests, in every layout: what a file holds, and the numbers that it means."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

FP8 = ("old", "marked", "by rows", "header", "alone")


def is_layer(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith(("layers.", "noise_refiner.", "context_refiner."))


def quantize(plain: dict[str, Tensor], layout: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors of a file, the values that it means in float64)."""
    stored, meant = dict(plain), {name: value.double() for name, value in plain.items()}
    form = str(dtype).removeprefix("torch.")
    for name, tensor in plain.items():
        if not is_layer(name, tensor):
            continue
        layer = name.removesuffix(".weight")
        scale = torch.tensor(1.0)
        if layout == "by rows":
            scale = tensor.float().abs().amax(1, keepdim=True) / torch.finfo(dtype).max
        elif layout != "alone":
            scale = tensor.float().abs().max() / torch.finfo(dtype).max
        stored[name] = (tensor.float() / scale).to(dtype)
        meant[name] = stored[name].double() * scale.double()
        if layout == "old":
            stored |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(1.0)}
        elif layout in ("marked", "by rows"):
            marker = json.dumps({"format": form, "full_precision_matrix_mult": False}).encode()
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(1.0)}
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
        elif layout == "header":
            stored[f"{layer}.weight_scale"] = scale
    if layout == "old":
        stored["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return stored, meant


# Block formats by ComfyUI's own package: it quantizes, and its dequantization is the reference

BLOCKS = {
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {"scale": "recalculate"}, {}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {}, {}),
    "int8_tensorwise by rows": ("TensorWiseINT8Layout", {"per_channel": True}, {}),
    "int8_tensorwise convrot": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"convrot": True, "convrot_groupsize": 64},
    ),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}, {"convrot_groupsize": 64}),
}


def block_quantize(plain: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(the tensors of a file without markers, the values that they mean, layer -> its marker)."""
    layout, options, settings = BLOCKS[name]
    stored, meant, markers = dict(plain), {key: value.float() for key, value in plain.items()}, {}
    for key, tensor in plain.items():
        if not is_layer(key, tensor) or "adaLN" in key:
            continue
        if options.get("scale"):
            options = {**options, "scale": tensor.float().abs().max() / (448 * 6)}
        packed = QuantizedTensor.from_float(tensor.float(), layout, **options)
        stored |= packed.state_dict(key)
        meant[key] = packed.dequantize()
        markers[key.removesuffix(".weight")] = {"format": name.split()[0], **settings}
    return stored, meant, markers


def with_markers(stored: Mapping[str, Tensor], markers: Mapping[str, dict]) -> dict[str, Tensor]:
    """The tensors of a file in which each layer's format is noted beside it."""
    raw = {
        layer: torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8) for layer, marker in markers.items()
    }
    return {**stored, **{f"{layer}.comfy_quant": marker for layer, marker in raw.items()}}
