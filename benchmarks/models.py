"""The transformer three times on the same random weights: ours, diffusers' and ComfyUI's own.

Nothing is copied: the weights of the others are views of ours, so that all fit into memory at once.
"""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nano.export import TRANSFORMER_NAMES, renamed
from zimage_core.config import TransformerConfig
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.weights.specs import PUBLISHED_TRANSFORMER

ROOT = Path(__file__).resolve().parents[1]
TOY = {"dim": 1536, "n_heads": 12, "cap_feat_dim": 64}  # the narrowest that ComfyUI's own model can have
FULL = {"dim": 3840, "n_heads": 30, "cap_feat_dim": 2560}


def geometry(layers: int, toy: bool = False) -> TransformerConfig:
    """The published widths and 2 + 2 refiner blocks, or toy ones and 1 + 1, with this many layers."""
    numbers: dict[str, Any] = {**PUBLISHED_TRANSFORMER, **(TOY if toy else FULL), "n_refiner_layers": 1 if toy else 2}
    return TransformerConfig(**numbers, n_layers=layers, in_channels=16, patch_size=2)


def blocks(config: TransformerConfig) -> str:
    """How many it has, as the tables tell it."""
    return f"{config.n_layers} main layers and {config.n_refiner_layers} + {config.n_refiner_layers} refiner blocks"


def core(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> ZImageTransformer:
    """Ours, with weights that keep the scale of what passes through."""
    model = ZImageTransformer(config, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "pad_token" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(generator=generator).div_(math.sqrt(parameter.shape[1]))
    return model.requires_grad_(False).eval()


def diffusers(ours: ZImageTransformer) -> nn.Module:
    """diffusers' ZImageTransformer2DModel on views of these weights."""
    config = ours.config
    with torch.device("meta"):
        model = importlib.import_module("diffusers").ZImageTransformer2DModel(
            dim=config.dim,
            n_heads=config.n_heads,
            n_kv_heads=config.n_heads,
            n_layers=config.n_layers,
            n_refiner_layers=config.n_refiner_layers,
            cap_feat_dim=config.cap_feat_dim,
            axes_dims=list(config.axes_dims),
            axes_lens=[1536, 512, 512],
        )
    weights: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        if name.endswith("attention.qkv.weight"):
            weights |= {
                name.replace("qkv", f"to_{letter}"): part for letter, part in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            weights[renamed(name, TRANSFORMER_NAMES)] = tensor
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def native(ours: ZImageTransformer) -> nn.Module:
    """ComfyUI's NextDiT on these weights."""
    pack(cpu=ours.x_embedder.weight.device.type == "cpu")
    config = ours.config
    numbers = {
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_refiner_layers": config.n_refiner_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_heads,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "multiple_of": 256,
        "norm_eps": config.norm_eps,
        "qk_norm": True,
        "cap_feat_dim": config.cap_feat_dim,
        "axes_dims": list(config.axes_dims),
        "axes_lens": [1536, 512, 512],
        "rope_theta": config.rope_theta,
        "z_image_modulation": True,
        "time_scale": config.t_scale,
        "pad_tokens_multiple": 32,
    }
    dtype = ours.x_embedder.weight.dtype
    module = importlib.import_module("comfy.ldm.lumina.model")
    operations = importlib.import_module("comfy.ops").disable_weight_init
    model = module.NextDiT(**numbers, device="meta", dtype=dtype, operations=operations)
    model.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return model.requires_grad_(False).eval()


def of_nodes(ours: ZImageTransformer, compiled: bool = False) -> nn.Module:
    """The network of our MODEL in ComfyUI, on these weights."""
    bridge = pack(cpu=ours.x_embedder.weight.device.type == "cpu").bridge
    dtype = ours.x_embedder.weight.dtype
    operations = importlib.import_module("comfy.ops").disable_weight_init
    model = bridge.model.ZImageNextDiT(ours.config, operations=operations, device="meta", dtype=dtype)
    model.load_state_dict(ours.state_dict(), strict=True, assign=True)
    model.compiled = compiled
    return model.requires_grad_(False).eval()


def pack(cpu: bool = True, **settings: Any) -> Any:
    """The pack's node modules inside a ComfyUI in this process; `settings` of its command line by name."""
    sys.path.append(str(ROOT / "tests" / "nodes"))
    return importlib.import_module("inside").load_pack(cpu=cpu, **settings)
