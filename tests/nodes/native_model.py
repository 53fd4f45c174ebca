"""ComfyUI's own Z-Image at the size of the nano model, which its loader can't make."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer


def like(comfy: Any, patcher: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A ModelPatcher of it, with the weights of ours."""
    ours = patcher.model.diffusion_model
    config = ours.config
    values = {  # written out, as a reference of its own: not the pack's
        "image_model": "lumina2",
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "dim": config.dim,
        "cap_feat_dim": config.cap_feat_dim,
        "n_layers": config.n_layers,
        "n_refiner_layers": config.n_refiner_layers,
        "qk_norm": True,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_heads,
        "axes_dims": list(config.axes_dims),
        "axes_lens": [1536, 512, 512],
        "rope_theta": config.rope_theta,
        "ffn_dim_multiplier": 8 / 3,
        "z_image_modulation": True,
        "time_scale": config.t_scale,
        "pad_tokens_multiple": 32,
    }
    if config.siglip_feat_dim is not None:
        values["siglip_feat_dim"] = config.siglip_feat_dim
    model_config = comfy.supported_models.ZImage(values)
    model_config.set_inference_dtype(dtype, None)
    model = model_config.get_model({}, "")
    model.latent_format = patcher.model.latent_format
    net = model.diffusion_model

    def linear(width_in: int, width_out: int, bias: bool):
        return comfy.ops.disable_weight_init.Linear(width_in, width_out, bias=bias, dtype=dtype)

    # The native class derives two widths from dim, which Z-Image fixes; at the published size they are the same.
    net.t_embedder.mlp[0], net.t_embedder.mlp[2] = linear(256, 1024, True), linear(1024, config.adaln_dim, True)
    for block in [*net.layers, *net.noise_refiner, *net.context_refiner, *(net.siglip_refiner or ())]:
        block.feed_forward.w1 = linear(config.dim, config.ffn_dim, False)
        block.feed_forward.w3 = linear(config.dim, config.ffn_dim, False)
        block.feed_forward.w2 = linear(config.ffn_dim, config.dim, False)
        block.attention.q_norm.eps = block.attention.k_norm.eps = config.norm_eps  # left unset natively
    net.load_state_dict(ours.state_dict(), strict=True)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def clip_like(comfy: Any, clip: Any, folder: Path) -> Any:
    """A CLIP of ComfyUI's own Z-Image text encoder, with the weights of ours and the tokenizer of this snapshot."""
    llama, native = (importlib.import_module(f"comfy.text_encoders.{name}") for name in ("llama", "z_image"))
    tokenizers = importlib.import_module("comfy.sd1_clip")
    config, pad = clip.cond_stage_model.encoder_config, clip.cond_stage_model.pad

    class Config(llama.Qwen3_4BConfig):
        head_dim = config.head_dim

    numbers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(config, name) for name in (*numbers, "num_key_value_heads", "rms_norm_eps", "rope_theta")}
    published = llama.Qwen3_4BConfig
    llama.Qwen3_4BConfig = functools.partial(Config, **sizes)
    try:
        model = native.ZImageTEModel(device="cpu", dtype=torch.float32)
    finally:
        llama.Qwen3_4BConfig = published
    model.qwen3_4b.special_tokens = {"pad": pad}
    with torch.no_grad():
        model.qwen3_4b.transformer.load_state_dict(clip.cond_stage_model.encoder.state_dict(), strict=True)

    def tokenizer(embedding_directory: Any = None, tokenizer_data: Any = None):
        settings = {"embedding_size": config.hidden_size, "embedding_key": "qwen3_4b", "pad_token": pad}
        settings |= {name: False for name in ("pad_with_end", "has_start_token", "has_end_token", "pad_to_max_length")}
        path = str(folder / "tokenizer")
        settings |= {"max_length": 99999999, "min_length": 1, "tokenizer_class": AutoTokenizer}
        return tokenizers.SDTokenizer(path, embedding_directory=embedding_directory, **settings)

    return comfy.sd.CLIP(
        comfy.supported_models.supported_models_base.ClipTarget(native.ZImageTokenizer, lambda **_: model),
        embedding_directory=importlib.import_module("folder_paths").get_folder_paths("embeddings"),
        tokenizer_data={"qwen3_4b_tokenizer_class": tokenizer},
        model_options={"dtype": torch.float32},
    )
