"""What the prompt cache knows our encoder by: files and our LoRA; what other nodes have changed is not kept."""

from __future__ import annotations

import importlib
import shutil

import pytest
import torch

from ..poisoning import poison
from .prompts import TEXT, encode, entries, random, restart, write_lora

LAYER = "qwen3_4b.transformer.model.layers.1.self_attn.q_proj.weight"

# LoRA


def test_our_loras_are_known_by_content_and_strength(pack, comfy, user, model, loras):
    write_lora(loras / "l.safetensors")
    patcher = pack.bridge.model.load_model(model)

    def with_lora(strength: float, name: str = "l.safetensors"):
        clip = pack.bridge.clip.load_clip(model)
        return pack.lora.ZImageLoraLoader.execute(patcher, name, 1.0, clip=clip, strength_clip=strength).args[1]

    plain = encode(pack, pack.bridge.clip.load_clip(model))
    changed = encode(pack, with_lora(0.8))
    assert entries(user) == 2 and not torch.allclose(changed, plain, atol=1e-3)
    assert not torch.equal(encode(pack, with_lora(0.7)), changed)
    assert entries(user) == 3
    shutil.copy(loras / "l.safetensors", loras / "same.safetensors")
    poison(model / "text_encoder" / "model.safetensors")
    restart(pack, comfy)
    for name in ("l.safetensors", "same.safetensors"):
        assert torch.equal(encode(pack, with_lora(0.8, name)), changed)
    assert torch.equal(encode(pack, with_lora(0.0)), plain)
    write_lora(loras / "l.safetensors", seed=2)
    with pytest.raises(ValueError, match="not finite"):
        encode(pack, with_lora(0.8))
    assert entries(user) == 3


def test_one_lora_on_another_is_known(pack, user, model, loras):
    write_lora(loras / "a.safetensors")
    write_lora(loras / "b.safetensors", seed=2)
    patcher = pack.bridge.model.load_model(model)

    def with_loras(*names: str):
        clip = pack.bridge.clip.load_clip(model)
        for name in names:
            clip = pack.lora.ZImageLoraLoader.execute(patcher, f"{name}.safetensors", 1.0, clip=clip).args[1]
        return encode(pack, clip)

    a, ab = with_loras("a"), with_loras("a", "b")
    assert entries(user) == 2 and not torch.allclose(a, ab, atol=1e-3)
    assert torch.equal(with_loras("a", "b"), ab) and torch.equal(with_loras("a"), a) and entries(user) == 2
    assert not torch.equal(with_loras("a", "a"), a) and entries(user) == 3


# What other nodes have changed is not kept


def test_our_lora_put_on_again_by_another_node_is_not_known(pack, user, model, loras):
    write_lora(loras / "l.safetensors")
    clip = pack.bridge.clip.load_clip(model)
    ours = pack.lora.ZImageLoraLoader.execute(
        pack.bridge.model.load_model(model), "l.safetensors", 1.0, clip=clip
    ).args[1]
    ((_, adapter, *_),) = ours.patcher.patches[LAYER]
    plain, half = encode(pack, clip), encode(pack, patched(clip, adapter, strength=0.5))
    assert not torch.equal(half, plain) and not torch.equal(half, encode(pack, ours))
    assert entries(user) == 2


def stock_lora(comfy, clip):
    name = "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj"
    lora = {f"{name}.lora_up.weight": random(128, 2, seed=1), f"{name}.lora_down.weight": random(2, 128)}
    return comfy.sd.load_lora_for_models(None, clip, lora, 0.0, 0.8)[1]


def patched(clip, value, strength: float = 1.0, strength_model: float = 1.0, key=LAYER):
    clip = clip.clone()
    assert clip.add_patches({key: value}, strength, strength_model)
    return clip


def attached(clip, name: str, value):
    getattr(clip.patcher, name)["other"] = value
    return clip


def with_attribute(clip, name: str, value):
    setattr(clip, name, value)
    return clip


def bypass(comfy, clip):
    name = "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj"
    lora = {f"{name}.lora_up.weight": random(128, 2), f"{name}.lora_down.weight": random(2, 128)}
    return comfy.sd.load_bypass_lora_for_models(None, clip, lora, 0.0, 1.0)[1]


def merged(comfy, clip):
    """What CLIPMergeSimple makes of two encoders."""
    other = clip.clone()
    patches = other.get_key_patches()
    clip.add_patches({LAYER: patches[LAYER]}, 0.5, 0.5)
    return clip


def with_callback(clip):
    clip.patcher.add_callback("on_load", lambda *_: None)
    return clip


def with_wrapper(clip):
    clip.patcher.add_wrapper("calc_cond_batch", lambda executor, *a, **k: executor(*a, **k))
    return clip


def with_weight_wrapper(clip):
    clip.patcher.add_weight_wrapper(LAYER, lambda weight: weight)
    return clip


def with_object_patch(clip):
    clip.patcher.add_object_patch("encoder_config", clip.cond_stage_model.encoder_config)
    return clip


def with_compute_dtype(clip):
    clip.patcher.set_model_compute_dtype(torch.float16)
    return clip


def with_hooks(clip):
    """As SetClipHooks does it, without a schedule."""
    group = importlib.import_module("comfy.hooks").HookGroup()
    clip.apply_hooks_to_conds = group
    clip.patcher.forced_hooks = group
    return clip


def with_forced_hooks(clip):
    clip.patcher.forced_hooks = importlib.import_module("comfy.hooks").HookGroup()
    return clip


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "change",
    [
        lambda comfy, clip: with_hooks(clip),
        lambda comfy, clip: with_forced_hooks(clip),
        lambda comfy, clip: attached(clip, "hook_patches", {}),
        lambda comfy, clip: with_attribute(clip, "use_clip_schedule", True),
        lambda comfy, clip: with_attribute(clip, "encode_from_tokens", clip.encode_from_tokens),
        lambda comfy, clip: bypass(comfy, clip),
        lambda comfy, clip: merged(comfy, clip),
        lambda comfy, clip: with_callback(clip),
        lambda comfy, clip: with_wrapper(clip),
        lambda comfy, clip: with_weight_wrapper(clip),
        lambda comfy, clip: with_compute_dtype(clip),
        lambda comfy, clip: attached(clip, "attachments", object()),
        lambda comfy, clip: with_object_patch(clip),
        lambda comfy, clip: attached(clip, "model_options", {"something": True}),
        lambda comfy, clip: with_attribute(clip.patcher, "load", clip.patcher.load) and clip,
        lambda comfy, clip: with_attribute(clip.cond_stage_model, "load_sd", clip.cond_stage_model.load_sd) and clip,
        stock_lora,
        lambda comfy, clip: patched(clip, ("diff", (random(128, 128),))),
        lambda comfy, clip: patched(clip, (random(128, 128),), strength=0.5),
        lambda comfy, clip: patched(clip, (None,), 0.0, 0.5),  # as CLIPAttentionMultiply makes it
    ],
    ids="hooks|forced hooks|hook patches|"
    "schedule|replaced method|bypass|merge|callback|wrapper|weight wrapper|compute dtype|attachment|"
    "object patch|option|patcher's method|model's method|stock lora|difference|weight|factor".split("|"),
)
def test_what_can_not_be_known_is_encoded_each_time(pack, comfy, user, model, change):
    clip = change(comfy, pack.bridge.clip.load_clip(model))
    tokens = clip.tokenize(TEXT)
    assert pack.bridge.prompts.key(clip, tokens) is None
    expected = clip.encode_from_tokens_scheduled(tokens)[0][0]
    assert torch.equal(encode(pack, clip), expected)
    assert entries(user) == 0
    encode(pack, pack.bridge.clip.load_clip(model))
    assert entries(user) == 1


def test_tokens_that_are_no_numbers_are_not_looked_up(pack, model):
    """Embeddings in a prompt, say: tensors among its tokens."""
    clip = pack.bridge.clip.load_clip(model)
    assert pack.bridge.prompts.key(clip, {"qwen3_4b": [[(5, 1.0)]]}) is not None
    assert pack.bridge.prompts.key(clip, {"qwen3_4b": [[(5, 1.0), (torch.zeros(2, 128), 1.0)]]}) is None
