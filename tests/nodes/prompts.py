"""What tests of prompts and LoRA share: features of a prompt, what is loaded and kept, LoRA files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

TEXT = "two green stars on a white background"


def restart(pack, comfy) -> None:
    """Forgets what is in memory."""
    pack.bridge.prompts._cache.cache_clear()
    comfy.model_management.unload_all_models()


def encode(pack, clip, text: str = TEXT, **settings) -> torch.Tensor:
    """Features that the node puts out."""
    ((conditioning,),) = [pack.conditioning.ZImageTextEncode.execute(clip, text, **settings).args]
    ((features, _extra),) = conditioning
    return features


def is_loaded(comfy, clip) -> bool:
    return any(loaded.model is clip.patcher for loaded in comfy.model_management.current_loaded_models)


def entries(user: Path) -> int:
    return len(list(user.glob("*.safetensors")))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_lora(file: Path, seed: int = 1) -> None:
    third, name = "lora_unet_layers_2_attention_to_k", "lora_te_layers_1_self_attn_q_proj"
    tensors = {
        f"{third}.lora_down.weight": random(4, 192),
        f"{third}.lora_up.weight": random(192, 4),
        f"{name}.lora_down.weight": random(4, 128),
        f"{name}.lora_up.weight": random(128, 4, seed=seed),
    }
    save_file(tensors, file)
