"""The LoRA node on ComfyUI's patchers: the core's image, whole or partly loaded, and no trace when it is gone."""

from __future__ import annotations

import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.pipeline import ZImagePipeline

from ..helpers import NANO, ROOT, relative
from .prompts import random

CPU = torch.device("cpu")
WIDTH = 192


@pytest.fixture(scope="module")
def parts(pack) -> SimpleNamespace:
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    return SimpleNamespace(model=pack.bridge.model.load_model(NANO, torch.float32), clip=clip)


@pytest.fixture
def folder(loras):
    """LoRA files that ComfyUI finds: one per family, one with a part for the text encoder."""
    out, wide = "diffusion_model.layers.1.attention.out", "lora_unet_layers_0_feed_forward_w1"
    third = "transformer.layers.2.attention.to_k"
    files = {
        "plain": {f"{third}.lora_A.weight": random(4, WIDTH), f"{third}.lora_B.weight": random(WIDTH, 4, seed=1)},
        "lokr": {f"{wide}.lokr_w1": random(4, 4), f"{wide}.lokr_w2": random(128, 48)},
        "oft": {f"{third}.oft_blocks": random(8, 24, 24)},
        "dora": {
            f"{out}.lora_A.weight": random(4, WIDTH),
            f"{out}.lora_B.weight": random(WIDTH, 4, seed=1),
            f"{out}.dora_scale": random(WIDTH, 1).abs() + 1,
        },
        "both": {
            f"{third}.lora_A.weight": random(4, WIDTH),
            f"{third}.lora_B.weight": random(WIDTH, 4, seed=1),
            "lora_te_layers_1_self_attn_q_proj.lora_down.weight": random(4, 128),
            "lora_te_layers_1_self_attn_q_proj.lora_up.weight": random(128, 4, seed=1),
            "lora_te_layers_1_self_attn_q_proj.alpha": torch.tensor(8.0),
        },
        "flux": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": random(4, 4)},
    }
    for name, tensors in files.items():
        save_file(tensors, loras / f"{name}.safetensors")
    return loras


def load(pack, model, name: str, strength: float, clip=None, **settings):
    return pack.lora.ZImageLoraLoader.execute(model, f"{name}.safetensors", strength, clip=clip, **settings).args


def latents(pack, model, clip) -> torch.Tensor:
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle on a blue background"))
    empty = {"samples": torch.zeros(1, 16, 8, 8)}
    (latent,) = pack.sampling.ZImageSampler.execute(
        model=model,
        positive=positive,
        latent_image=empty,
        seed=3,
        steps=2,
        guidance_scale=0.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        denoise=1.0,
    ).args
    return latent["samples"]


def predict(patcher) -> torch.Tensor:
    """One evaluation of the model as it is loaded now; the sampler would load it whole first."""
    context = random(1, 21, 128, seed=9)
    return patcher.model.apply_model(
        random(1, 16, 8, 8, seed=8), torch.tensor([0.7]), c_crossattn=context, num_tokens=21, transformer_options={}
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["plain", "lokr", "oft", "dora", "both"])
def test_same_latents_as_the_core(pack, parts, folder, name):
    model, clip, report = load(pack, parts.model, name, 0.7, parts.clip, strength_clip=0.7)
    assert "keys matched" in report and "WARNING" not in report
    ours = latents(pack, model, clip)
    pipe = ZImagePipeline.from_pretrained(NANO)
    settings = {"width": 64, "height": 64, "steps": 2, "seed": 3, "output": "latents"}
    text = "a red circle on a blue background"
    plain = pipe.generate(text, **settings)
    (opened,) = pipe.set_loras((folder / f"{name}.safetensors", 0.7))
    core = pipe.generate(text, **settings)
    assert opened.report() in report
    assert relative(pipe.vae.scale(ours), core) <= 1e-4
    assert relative(plain, core) > 1e-3
    pipe.set_loras()
    assert torch.equal(pipe.generate(text, **settings), plain)


def test_gone_without_a_trace(pack, parts, folder):
    plain = latents(pack, parts.model, parts.clip)
    before = {name: tensor.clone() for name, tensor in parts.model.model.state_dict().items()}
    model, clip, _ = load(pack, parts.model, "both", 1.0, parts.clip)
    assert relative(latents(pack, model, clip), plain) > 1e-3
    assert torch.equal(latents(pack, parts.model, parts.clip), plain)
    after = parts.model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(latents(pack, load(pack, parts.model, "plain", 0.0)[0], parts.clip), plain)


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("name", ["plain", "oft"])
def test_on_a_partly_loaded_model(pack, parts, folder, name, share):
    model = load(pack, parts.model, name, 0.8)[0]
    management = importlib.import_module("comfy.model_management")
    management.load_models_gpu([parts.model])
    plain = predict(parts.model)
    management.load_models_gpu([model])
    whole = predict(model)
    assert relative(whole, plain) > 1e-3
    model.detach()
    model.load(CPU, lowvram_model_memory=int(model.model_size() * share))
    assert model.model.model_lowvram
    assert relative(predict(model), whole) <= 1e-5
    model.detach()


@pytest.mark.parametrize("other", ["lokr", "oft", "dora"])
def test_two_agree_in_either_order_and_with_the_core(pack, parts, folder, other):
    """`plain` and `oft` change the same rows, one by adding, one by turning."""
    first = load(pack, load(pack, parts.model, "plain", 0.5)[0], other, 0.5)[0]
    second = load(pack, load(pack, parts.model, other, 0.5)[0], "plain", 0.5)[0]
    found = latents(pack, first, parts.clip)
    assert relative(latents(pack, second, parts.clip), found) <= 1e-5
    pipe = ZImagePipeline.from_pretrained(NANO)
    pipe.set_loras((folder / "plain.safetensors", 0.5), (folder / f"{other}.safetensors", 0.5))
    settings = {"width": 64, "height": 64, "steps": 2, "seed": 3, "output": "latents"}
    assert relative(pipe.vae.scale(found), pipe.generate("a red circle on a blue background", **settings)) <= 1e-4


def test_overlap_is_told(pack, parts, folder):
    first = load(pack, load(pack, parts.model, "plain", 0.5)[0], "lokr", 0.5)
    assert "with plain.safetensors: cosine +0.00, norm relative to the weights" in first[2]
    again = load(pack, load(pack, parts.model, "plain", 0.5)[0], "plain", 0.5)
    assert "with plain.safetensors: cosine +1.00" in again[2]


def test_a_part_for_the_encoder_waits_for_a_clip(pack, parts, folder):
    model, clip, report = load(pack, parts.model, "both", 1.0)
    assert clip is None and "WARNING" not in report
    assert report.endswith("3 keys are for the text encoder: connect `clip` to use them")


def test_the_workflows_preview_has_room_for_the_whole_report(pack, parts):
    graph = json.loads((ROOT / "workflows" / "LoRA (Z-Image Nano).json").read_text(encoding="utf-8"))
    (width, height) = next(node["size"] for node in graph["nodes"] if node["type"] == "PreviewAny")
    report = pack.lora.ZImageLoraLoader.execute(parts.model, pack.bridge.folders.NANO_LORA, 1.0, parts.clip).args[2]
    letter, line, margin, other = 7, 18, 40, 110  # pixels, in the larger of the two renderers; other widgets and title
    rows = sum(math.ceil(len(text) * letter / (width - margin)) for text in report.splitlines())
    assert rows >= 7 and height >= other + rows * line


def test_the_second_strength_is_the_encoders(pack, parts, folder):
    text = parts.clip.tokenize("a red circle")
    plain = parts.clip.encode_from_tokens_scheduled(text)[0][0]
    _, off, _ = load(pack, parts.model, "both", 1.0, parts.clip, strength_clip=0.0)
    _, on, _ = load(pack, parts.model, "both", 0.0, parts.clip, strength_clip=1.0)
    _, same, _ = load(pack, parts.model, "both", 1.0, parts.clip)
    assert torch.equal(off.encode_from_tokens_scheduled(text)[0][0], plain)
    changed = on.encode_from_tokens_scheduled(text)[0][0]
    assert relative(changed, plain) > 1e-4
    assert relative(same.encode_from_tokens_scheduled(text)[0][0], changed) <= 1e-6


def test_comfyuis_own_adapter_agrees(pack, comfy, parts, folder):
    """Where ComfyUI reads the file too, it draws the same image."""
    from safetensors.torch import load_file

    ours = load(pack, parts.model, "plain", 0.8)[0]
    theirs, _ = comfy.sd.load_lora_for_models(parts.model, None, load_file(folder / "plain.safetensors"), 0.8, 0.0)
    assert relative(latents(pack, ours, parts.clip), latents(pack, theirs, parts.clip)) <= 1e-5


def test_other_models_loras_are_refused(pack, parts, folder):
    with pytest.raises(ValueError, match=r"this is a LoRA for Flux, not for Z-Image.*flux\.safetensors"):
        load(pack, parts.model, "flux", 1.0)


def test_a_changed_file_is_read_again(pack, folder):
    node = pack.lora.ZImageLoraLoader
    before = node.fingerprint_inputs(lora="plain.safetensors", strength=1.0)
    save_file({"a": random(1)}, folder / "plain.safetensors")
    assert node.fingerprint_inputs(lora="plain.safetensors", strength=1.0) != before
    assert "plain.safetensors" in pack.bridge.folders.lora_choices()
