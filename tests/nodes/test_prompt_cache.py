"""The prompt cache behind ComfyUI's text encoders: what is known is not loaded, what differs is not known."""

from __future__ import annotations

import functools
import importlib
import logging
import os

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.weights.snapshot import Snapshot

from ..helpers import NANO
from ..poisoning import poison
from .prompts import TEXT, encode, entries, is_loaded, random, restart

# Known prompts


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
def test_a_known_prompt_neither_loads_nor_reads_the_encoder(pack, comfy, user, model, dtype):
    clip = pack.bridge.clip.load_clip(model, dtype)
    assert not is_loaded(comfy, clip)
    features = encode(pack, clip)
    assert is_loaded(comfy, clip) and entries(user) == 1

    poison(model / "text_encoder" / "model.safetensors")
    restart(pack, comfy)
    clip = pack.bridge.clip.load_clip(model, dtype)
    for _ in range(2):  # from disk, then from memory
        assert torch.equal(encode(pack, clip), features)
    assert not is_loaded(comfy, clip)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight of the text encoder has values that are not finite"):
        encode(pack, clip, "another prompt")
    assert is_loaded(comfy, clip) and entries(user) == 1
    with pytest.raises(ValueError, match="not finite"):
        encode(pack, clip, cache=False)


def test_hit_miss_and_no_cache_give_the_same_conditioning(pack, model):
    clip = pack.bridge.clip.load_clip(model)
    stock = clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))
    for cache in (False, True, True):
        (conditioning,) = pack.conditioning.ZImageTextEncode.execute(clip, TEXT, cache).args
        ((features, extra),), ((expected, expected_extra),) = conditioning, stock
        assert type(conditioning) is list and type(conditioning[0]) is list
        assert features.dtype == expected.dtype == torch.float32 and torch.equal(features, expected)
        assert list(extra) == list(expected_extra) and extra["pooled_output"] is None
        mask, expected_mask = extra["attention_mask"], expected_extra["attention_mask"]
        assert mask.dtype == expected_mask.dtype and torch.equal(mask, expected_mask)


def test_the_switch_bypasses_it(pack, comfy, user, model):
    clip = pack.bridge.clip.load_clip(model)
    encode(pack, clip, cache=False)
    assert entries(user) == 0
    encode(pack, clip)
    comfy.model_management.unload_all_models()
    encode(pack, clip, cache=False)
    assert is_loaded(comfy, clip)


def test_what_other_nodes_write_into_a_conditioning_stays_there(pack, comfy, model):
    clip = pack.bridge.clip.load_clip(model)
    expected = encode(pack, clip, cache=False)
    for _ in range(3):
        features = encode(pack, clip)
        assert torch.equal(features, expected)
        features.mul_(0)
    restart(pack, comfy)
    features = encode(pack, clip)
    features.mul_(0)
    assert torch.equal(encode(pack, clip), expected)


def test_a_long_prompt_is_told_each_time(pack, model, caplog):
    clip = pack.bridge.clip.load_clip(model)
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            encode(pack, clip, "a red circle, " * 300)
        assert "the limit is 512" in caplog.text
        caplog.clear()


def test_a_changed_file_and_another_encoder_miss(pack, user, model):
    file = model / "text_encoder" / "model.safetensors"
    encode(pack, pack.bridge.clip.load_clip(model))
    encode(pack, pack.bridge.clip.load_clip(model))
    assert entries(user) == 1
    os.utime(file, ns=(1, 1))
    encode(pack, pack.bridge.clip.load_clip(model))
    assert entries(user) == 2
    encode(pack, pack.bridge.clip.load_clip(model, torch.float16))
    assert entries(user) == 3
    encode(pack, pack.bridge.clip.load_clip(NANO))
    assert entries(user) == 4
    clip = pack.bridge.clip.load_clip(model)
    clip.clip_layer(-3)
    encode(pack, clip)
    assert entries(user) == 5
    clip.tokenizer = pack.bridge.clip.ZImageTokenizer(Snapshot(model).tokenizer())
    clip.tokenizer.zimage.inner.add_prefix_space = True  # changes no ids
    encode(pack, clip)
    assert entries(user) == 5


# ComfyUI's own text encoders


def test_a_stock_clip_is_encoded_each_time(pack, comfy, user, tmp_path, monkeypatch):
    """One of Qwen3-4B's width, but only three layers and the nano model's vocabulary."""
    llama = importlib.import_module("comfy.text_encoders.llama")
    sizes = {"vocab_size": 640, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    small = functools.partial(llama.Qwen3_4BConfig, **sizes, num_key_value_heads=1)
    monkeypatch.setattr(llama, "Qwen3_4BConfig", small)
    with torch.device("meta"):
        network = llama.Qwen3_4B({}, torch.float16, "meta", torch.nn)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    path = tmp_path / "qwen.safetensors"
    save_file({name: random(*shape, seed=i).half() for i, (name, shape) in enumerate(shapes.items())}, path)
    clip = comfy.sd.load_clip([str(path)])
    clip.tokenizer = pack.bridge.clip.ZImageTokenizer(Snapshot(NANO).tokenizer())  # of ids in that vocabulary

    assert type(clip.cond_stage_model).__name__.startswith("ZImageTEModel")
    ((expected, expected_extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))
    monkeypatch.setattr(pack.bridge.prompts, "cache_dtype", lambda: torch.bfloat16)  # of what is kept
    for _ in range(2):
        comfy.model_management.unload_all_models()
        (((features, extra),),) = pack.conditioning.ZImageTextEncode.execute(clip, TEXT).args
        assert features.shape[-1] == 2560 and torch.equal(features, expected) and is_loaded(comfy, clip)
        assert extra.keys() == expected_extra.keys() and entries(user) == 0


# Settings


def test_the_size_comes_from_the_environment(pack, user, model, monkeypatch, caplog):
    variable, mega = "ZIMAGE_PROMPT_CACHE_MB", 2**20
    assert pack.bridge.prompts.cache().disk_bytes == 512 * mega and pack.bridge.prompts.cache().folder == user
    monkeypatch.setenv(variable, "7")
    assert pack.bridge.prompts.cache().disk_bytes == 7 * mega
    monkeypatch.setenv(variable, "lots")
    for _ in range(2):
        assert pack.bridge.prompts.cache().disk_bytes == 512 * mega
    (record,) = caplog.records
    assert "ZIMAGE_PROMPT_CACHE_MB is 'lots', expected a whole number of MB from 0" in record.getMessage()
    monkeypatch.setenv(variable, "0")
    clip = pack.bridge.clip.load_clip(model)
    features = encode(pack, clip)
    poison(model / "text_encoder" / "model.safetensors")
    assert torch.equal(encode(pack, clip), features) and not user.exists()
