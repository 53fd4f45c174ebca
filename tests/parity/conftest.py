"""Tiny models of the published packages, with random weights, saved the way those packages save them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import provision
import pytest
import torch

from ..helpers import NANO

diffusers = pytest.importorskip("diffusers", reason="the parity tests compare with diffusers; pip install '.[dev]'")
transformers = pytest.importorskip("transformers")


# name -> (dim, heads, axes_dims, layers, refiner layers, cap_feat_dim)
TRANSFORMERS = {
    "narrow": (64, 2, [8, 12, 12], 3, 1, 48),
    "wide": (288, 6, [16, 16, 16], 2, 2, 80),  # wider than the 256 of the time embedding
}
# name -> (block_out_channels, layers_per_block, groups)
VAES = {"three levels": ((8, 16, 16), 1, 4), "four levels": ((8, 8, 16, 24), 2, 8)}


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights with which every part matters: linear maps keep the scale, norms and biases are not at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "pad_token" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI of the environment, for the tokenizer files it ships."""
    path = provision.newest()
    if not path.is_dir():
        pytest.skip(f"there is no ComfyUI in {path}; `make setup` provisions one")
    return path


@pytest.fixture(scope="session")
def make_transformer():
    def make(name: str, seed: int, **settings):
        dim, heads, axes_dims, layers, refiners, cap_feat_dim = TRANSFORMERS[name]
        model = diffusers.ZImageTransformer2DModel(
            dim=dim,
            n_heads=heads,
            n_kv_heads=heads,
            axes_dims=axes_dims,
            axes_lens=[1536, 512, 512],
            n_layers=layers,
            n_refiner_layers=refiners,
            cap_feat_dim=cap_feat_dim,
            **settings,
        )
        return randomize(model, seed)

    return make


@pytest.fixture(scope="session")
def make_vae():
    def make(name: str, seed: int):
        channels, layers, groups = VAES[name]
        model = diffusers.AutoencoderKL(
            block_out_channels=channels,
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
            layers_per_block=layers,
            latent_channels=16,
            norm_num_groups=groups,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=64,
        )
        return randomize(model, seed)

    return make


@pytest.fixture(scope="session")
def make_text_encoder():
    def make(seed: int, *, hidden: int = 48, layers: int = 4, vocab: int = 1024):
        config = transformers.Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,  # 4 x 24 is not the hidden width, as in the published model
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=True,
        )
        return randomize(transformers.Qwen3Model(config), seed)

    return make


@pytest.fixture(scope="session")
def make_snapshot(make_transformer, make_vae, make_text_encoder, tmp_path_factory):
    """A whole snapshot, saved part by part with `save_pretrained`; returns its folder."""

    def make(name: str, seed: int, **scheduler) -> Path:
        folder = tmp_path_factory.mktemp("snapshot")
        make_transformer(name, seed).save_pretrained(folder / "transformer")
        make_text_encoder(seed, hidden=TRANSFORMERS[name][-1]).save_pretrained(folder / "text_encoder")
        make_vae("four levels", seed).save_pretrained(folder / "vae")
        diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}).save_pretrained(folder / "scheduler")
        shutil.copytree(NANO / "tokenizer", folder / "tokenizer")
        index = json.loads((NANO / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make
