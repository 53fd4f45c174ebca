"""ComfyUI's own Z-Image network for weights of any format that we read, for packs that reach inside of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.ldm.lumina.model
import comfy.model_base
import torch
from torch import nn

from ...zimage_core.weights.component import Component

FITS_HALF = 0.42  # of the norm that ComfyUI judges by whether this network would overflow in float16


class Lumina2(comfy.model_base.Lumina2):
    """ComfyUI's class of that name, with the widths of these weights."""

    def __init__(self, model_config: Any, shapes: dict[str, tuple[int, ...]], device: torch.device):
        """shapes: of the parameters."""
        comfy.model_base.BaseModel.__init__(
            self,
            model_config,
            comfy.model_base.ModelType.FLOW,
            device=device,
            unet_model=partial(_network, shapes),
        )
        self.memory_usage_factor_conds = ("ref_latents",)


def _network(shapes: dict[str, tuple[int, ...]], *, operations: Any, device: Any, dtype: Any, **config: Any) -> Any:
    network = comfy.ldm.lumina.model.NextDiT(**config, operations=operations, device=device, dtype=dtype)
    # It makes some widths of `dim` by another rule than Z-Image, with the same result at the published size
    for name, layer in list(network.named_modules()):
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) == 2 and (layer.out_features, layer.in_features) != shape:
            bias, (width_out, width_in) = f"{name}.bias" in shapes, shape
            own: nn.Module = operations.Linear(width_in, width_out, bias=bias, device=device, dtype=dtype)
            network.set_submodule(name, own)
    return network


def fits_half(component: Component) -> bool:
    """Whether ComfyUI lets this network compute in float16 where there is no bfloat16."""
    name = f"layers.{component.config.n_layers - 2}.ffn_norm1.weight"
    if name not in component.shapes:
        return False
    norm = component.tensor(name, component.shapes[name], dtype=torch.float32)
    return norm.std(unbiased=False).item() < FITS_HALF
