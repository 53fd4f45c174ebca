"""Writes a nano snapshot in the published Hugging Face layout, bfloat16, from the trained parts.

python -m nano.export --runs runs --out nano/snapshot
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage_core.model.tokenizer import WORDS
from zimage_core.weights.snapshot import Snapshot

from . import captions, train, train_text, train_vae

DIFFUSERS = "0.42.1"  # the release whose configs these are, and that the parity tests load them with
# our names -> the published ones; the first row that matches wins
TRANSFORMER_NAMES = (
    (r"^x_embedder\.", "all_x_embedder.2-1."),
    (r"^final_layer\.", "all_final_layer.2-1."),
    (r"\.attention\.out\.", ".attention.to_out.0."),
    (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
)
VAE_NAMES = (
    (r"norm_out\.", "conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
)


def write(folder: Path, tokenizer: Path, vae: dict[str, Tensor], learned: dict[str, Tensor]) -> None:
    """Builds the snapshot beside `folder`, loads it once, and puts it in its place.

    vae: parameters of an AutoencoderKL. learned: parameters of a train.Learner.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    _weights(new / "transformer" / "diffusion_pytorch_model.safetensors", _transformer(_part(learned, "transformer.")))
    _weights(new / "text_encoder" / "model.safetensors", _text_encoder(_part(learned, "text_encoder.")))
    _weights(new / "vae" / "diffusion_pytorch_model.safetensors", published_vae(vae))
    shutil.copytree(tokenizer, new / "tokenizer")
    (new / "tokenizer" / WORDS).write_text("\n".join(captions.words()) + "\n", encoding="utf-8")
    _json(new / "transformer" / "config.json", _transformer_config())
    _json(new / "text_encoder" / "config.json", _text_encoder_config(new / "tokenizer"))
    _json(new / "vae" / "config.json", _vae_config())
    _json(new / "scheduler" / "scheduler_config.json", _scheduler_config())
    _json(new / "model_index.json", _model_index())
    snapshot = Snapshot(new)
    for load in (snapshot.transformer, snapshot.text_encoder, snapshot.vae, snapshot.tokenizer):
        load()  # raises if anything is missing, left over or misshapen
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def size(folder: Path) -> int:
    """Bytes of all files of a snapshot."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Weights


def _transformer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    published = {}
    for name, value in weights.items():
        if name.endswith("attention.qkv.weight"):
            stem = name.removesuffix("qkv.weight")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                published[f"{stem}to_{letter}.weight"] = part
        else:
            published[renamed(name, TRANSFORMER_NAMES)] = value
    return published


def _text_encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's layers, and what the published files hold besides and nobody runs: a last layer and a norm."""
    published = {name: value for name, value in weights.items() if not name.endswith("inv_freq")}
    layers = train_text.CONFIG.num_hidden_layers
    first = {name: value for name, value in published.items() if name.startswith("model.layers.0.")}
    for name, value in first.items():
        filler = torch.ones_like(value) if value.ndim == 1 else torch.zeros_like(value)
        published[name.replace("layers.0.", f"layers.{layers - 1}.")] = filler  # zero matrices: it changes nothing
    published["model.norm.weight"] = torch.ones(train_text.CONFIG.hidden_size)
    return published


def published_vae(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our autoencoder's weights under diffusers' names."""
    published = {}
    levels = len({name.split(".")[2] for name in weights if name.startswith("decoder.up.")})
    for name, value in weights.items():
        # diffusers counts the decoder's levels as they run, the original by resolution
        name = re.sub(r"\.up\.(\d)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
        linear = ".attn_1." in name and value.ndim == 4
        published[renamed(name, VAE_NAMES)] = value[:, :, 0, 0] if linear else value
    return {
        re.sub(r"(resnets\.\d\.)nin_shortcut\.", r"\1conv_shortcut.", name): value for name, value in published.items()
    }


def renamed(name: str, rows: tuple[tuple[str, str], ...]) -> str:
    """A parameter's published name, by the first row of (pattern, replacement) that fits."""
    for pattern, published in rows:
        if re.search(pattern, name):
            return re.sub(pattern, published, name)
    return name


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _weights(path: Path, weights: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in sorted(weights.items())}
    save_file(plain, path, metadata={"format": "pt"})


# Configurations


def _transformer_config() -> dict[str, Any]:
    config = train.CONFIG
    return {
        "_class_name": "ZImageTransformer2DModel",
        "_diffusers_version": DIFFUSERS,
        "all_f_patch_size": [1],
        "all_patch_size": [config.patch_size],
        "axes_dims": list(config.axes_dims),
        "axes_lens": [1024, 512, 512],
        "cap_feat_dim": config.cap_feat_dim,
        "dim": config.dim,
        "in_channels": config.in_channels,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_heads,
        "n_layers": config.n_layers,
        "n_refiner_layers": config.n_refiner_layers,
        "norm_eps": config.norm_eps,
        "qk_norm": True,
        "rope_theta": config.rope_theta,
        "t_scale": config.t_scale,
    }


def _text_encoder_config(tokenizer: Path) -> dict[str, Any]:
    config = train_text.CONFIG
    added = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    ids = {token["content"]: int(number) for number, token in added.items()}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": 2048,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen3",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def _vae_config() -> dict[str, Any]:
    config = train_vae.CONFIG
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": True,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def _scheduler_config() -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "invert_sigmas": False,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": train.SHIFT,
        "shift_terminal": None,
        "stochastic_sampling": False,
        "time_shift_type": "exponential",
        "use_beta_sigmas": False,
        "use_dynamic_shifting": False,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
    }


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": DIFFUSERS,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--model", default="model.pt", help="file in runs with the transformer and text encoder")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    write(
        a.out,
        a.runs / "tokenizer",
        torch.load(a.runs / "vae.pt", weights_only=True),
        torch.load(a.runs / a.model, weights_only=True),
    )
    print(f"{a.out}: {size(a.out) / 1e6:.2f} MB")
