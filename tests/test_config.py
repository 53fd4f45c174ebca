"""Configurations come from the files, whole and checked."""

from __future__ import annotations

import pytest

from zimage_core.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from zimage_core.errors import CheckpointError

from .helpers import PUBLISHED

TURBO, QWEN, VAE, SCHEDULER = (PUBLISHED[part] for part in ("transformer", "text_encoder", "vae", "scheduler"))


def test_the_published_transformer():
    config = TransformerConfig.from_dict({**TURBO, "nheads": 30}, "config.json")  # published files carry nheads too
    assert (config.head_dim, config.ffn_dim, config.adaln_dim, config.patch_dim) == (128, 10240, 256, 64)


def test_rope_theta_of_either_transformers_generation():
    old = TextEncoderConfig.from_dict(QWEN, "config.json")
    raw = {key: value for key, value in QWEN.items() if key != "rope_theta"}
    raw["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    new = TextEncoderConfig.from_dict(raw, "config.json")
    assert old == new and old.rope_theta == 1e6


def test_the_published_vae():
    assert VAEConfig.from_dict(VAE, "config.json").downscale == 8


def test_dynamic_shifting_needs_its_numbers():
    assert SchedulerConfig.from_dict(SCHEDULER, "s.json").shift == 3.0
    with pytest.raises(CheckpointError, match="'base_shift' is missing"):
        SchedulerConfig.from_dict({**SCHEDULER, "use_dynamic_shifting": True}, "s.json")


UNREAD = ("axes_lens", "max_position_embeddings")


@pytest.mark.parametrize(("kind", "raw"), [(TransformerConfig, TURBO), (TextEncoderConfig, QWEN), (VAEConfig, VAE)])
def test_every_key_that_is_read_is_needed_and_named_when_missing(kind, raw):
    read = {key: value for key, value in raw.items() if key not in UNREAD}
    assert kind.from_dict(read, "some/config.json") == kind.from_dict(raw, "some/config.json")
    for key in read:
        incomplete = {k: v for k, v in read.items() if k != key}
        with pytest.raises(CheckpointError) as error:
            kind.from_dict(incomplete, "some/config.json")
        assert "some/config.json" in str(error.value) and (key in str(error.value) or key == "rope_theta")


@pytest.mark.parametrize(
    ("kind", "raw", "change", "words"),
    [
        (TransformerConfig, TURBO, {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        (TransformerConfig, TURBO, {"dim": "3840"}, "dim is '3840'"),
        (TransformerConfig, TURBO, {"n_layers": 0}, "n_layers is 0"),
        (TransformerConfig, TURBO, {"dim": 3841}, "not divisible"),
        (TransformerConfig, TURBO, {"axes_dims": [32, 48, 46]}, "add up to"),
        (TransformerConfig, TURBO, {"axes_dims": [31, 49, 48]}, "even"),
        (TransformerConfig, TURBO, {"n_kv_heads": 10}, "n_kv_heads is 10, expected 30"),
        (TransformerConfig, TURBO, {"qk_norm": False}, "qk_norm"),
        (VAEConfig, VAE, {"use_quant_conv": True}, "use_quant_conv"),
        (VAEConfig, VAE, {"norm_num_groups": 48}, "norm_num_groups 48"),
        (VAEConfig, VAE, {"block_out_channels": []}, "block_out_channels"),
        (SchedulerConfig, SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (SchedulerConfig, SCHEDULER, {"use_dynamic_shifting": "no"}, "use_dynamic_shifting"),
        (SchedulerConfig, SCHEDULER, {"shift": True}, "shift is True"),
    ],
)
def test_impossible_values_are_named(kind, raw, change, words):
    with pytest.raises(CheckpointError, match="c.json") as error:
        kind.from_dict({**raw, **change}, "c.json")
    assert words in str(error.value)
