"""LoRA under every name that the installed ComfyUI maps, and what would be blamed on the model."""

from __future__ import annotations

import math

import pytest

from zimage_core.lora import files as lora_files

from ..helpers import NANO


def test_every_name_that_comfyui_maps_has_its_place(pack):
    import comfy.lora

    clip, model = pack.bridge.clip.load_clip(NANO), pack.bridge.model.load_model(NANO)
    shapes = {
        kind: {key.removeprefix(start): tuple(value.shape) for key, value in patcher.model.named_parameters()}
        for kind, patcher, start in (
            ("transformer", model, "diffusion_model."),
            ("text_encoder", clip.patcher, "qwen3_4b.transformer."),
        )
    }
    places = lora_files._places(shapes)
    names = comfy.lora.model_lora_keys_unet(model.model, {}) | comfy.lora.model_lora_keys_clip(
        clip.cond_stage_model, {}
    )
    weights = {**dict(model.model.named_parameters()), **dict(clip.patcher.model.named_parameters())}
    tried = 0
    for name, value in names.items():
        key = value if isinstance(value, str) else value[0]
        if key.endswith(".weight") and not name.endswith(".weight") and key in weights:  # else it is no adapter's
            assert key.endswith(f".{places[lora_files._normalized(name)].name}.weight"), name
            tried += 1
    assert tried > 200


@pytest.mark.parametrize("which", ["strength", "strength_clip"])
def test_a_strength_that_is_not_finite_is_named(pack, which):
    given = {"strength": 1.0, "strength_clip": 1.0, which: math.nan}
    with pytest.raises(ValueError, match=f"^`{which}` is nan, expected a finite number"):
        pack.lora.ZImageLoraLoader.execute(None, "any", **given)
