"""ComfyUI's layers, with the core's matmuls where they compute on a CPU."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from torch import Tensor

from ...zimage_core.backends import matmul


class CPUOperations(comfy.ops.manual_cast):
    """ComfyUI's casting layers. Without patches that are added on the way, a Linear needs no copy of its weight."""

    class Linear(comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            if self.weight_function or self.bias_function or input.device.type != "cpu":  # a clone may have moved
                return super().forward_comfy_cast_weights(input)
            return matmul.linear(input, self.weight, self.bias)


def for_device(device: torch.device, otherwise: Any = None) -> Any:
    """The layers for a device that computes: these on a CPU, elsewhere `otherwise`."""
    return CPUOperations if device.type == "cpu" else otherwise
