"""Every published key lands on exactly one parameter of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zimage_core.config import TextEncoderConfig, TransformerConfig, VAEConfig
from zimage_core.model.text_encoder import TextEncoder
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.model.vae import AutoencoderKL
from zimage_core.weights import key_maps

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())  # Z-Image Turbo's
TURBO, QWEN, VAE, _ = (PUBLISHED[part] for part in ("transformer", "text_encoder", "vae", "scheduler"))


def test_transformer_521_published_keys_become_453():
    diffusers = pytest.importorskip("diffusers")
    from torch import device

    with device("meta"):
        raw = {key: value for key, value in TURBO.items() if key != "_class_name"}
        theirs = diffusers.ZImageTransformer2DModel(**raw).state_dict()
    ours = ZImageTransformer(TransformerConfig.from_dict(TURBO, "config.json"), device="meta").state_dict()
    assert (len(theirs), len(ours)) == (521, 453)
    assert sum(value.numel() for value in ours.values()) == 6_154_908_736
    sources = key_maps.TRANSFORMER.sources(theirs)
    assert sources.keys() == ours.keys()
    assert sorted(key for keys in sources.values() for key in keys) == sorted(theirs)
    for name, keys in sources.items():
        assert key_maps.TRANSFORMER.is_complete(name, keys)
        assert ours[name].numel() == sum(theirs[key].numel() for key in keys)
    prefix = "layers.7.attention."
    assert sources[prefix + "qkv.weight"] == [f"{prefix}to_{part}.weight" for part in "qkv"]


def test_our_own_names_pass_unchanged():
    ours = ZImageTransformer(TransformerConfig.from_dict(TURBO, "config.json"), device="meta").state_dict()
    assert key_maps.TRANSFORMER.sources([*ours, "norm_final.weight"]) == {name: [name] for name in ours}


def test_q_without_k_and_v_is_not_a_whole():
    sources = key_maps.TRANSFORMER.sources(["layers.0.attention.to_q.weight", "layers.0.attention.to_v.weight"])
    assert not key_maps.TRANSFORMER.is_complete(
        "layers.0.attention.qkv.weight", sources["layers.0.attention.qkv.weight"]
    )


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_text_encoder_with_and_without_prefix(prefix):
    config = TextEncoderConfig.from_dict(QWEN, "config.json")
    ours = TextEncoder(config, device="meta").state_dict()
    theirs = [prefix + name.removeprefix("model.") for name in ours]
    unused = [prefix + "norm.weight", prefix + "layers.35.self_attn.q_proj.weight", "lm_head.weight"]
    sources = key_maps.text_encoder(36).sources(theirs + unused)
    assert sources.keys() == ours.keys()


def test_vae_names_are_reached_from_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from torch import device

    raw = {key: value for key, value in VAE.items() if key != "_class_name"}
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with device("meta"):
        theirs = diffusers.AutoencoderKL(**raw, **levels).state_dict()
    ours = AutoencoderKL(VAEConfig.from_dict(VAE, "config.json"), device="meta").state_dict()
    key_map = key_maps.vae(4)
    sources = key_map.sources(theirs)
    assert sources.keys() == ours.keys()
    assert all(len(keys) == 1 for keys in sources.values())
    flat = [name for name in ours if key_map.is_flat(name)]
    assert flat == [name for name, (key,) in sources.items() if theirs[key].ndim == 2]
    assert key_map.sources(ours) == {name: [name] for name in ours}
