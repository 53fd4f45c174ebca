"""Prompts are encoded once behind the pipeline, too, whose encoder stays unread for those that are known."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.__main__ import main
from zimage_core.errors import CheckpointError
from zimage_core.model import tokenizer
from zimage_core.pipeline import ZImagePipeline
from zimage_core.prompts.cache import PromptCache
from zimage_core.weights.snapshot import open_component, open_tokenizer, schedule_of

from .helpers import NANO
from .poisoning import poison

SMALL = {"width": 64, "height": 32, "steps": 2}
PROMPT = "a red circle"


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the nano snapshot, whose files may be changed."""
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def opened(model: Path, folder: Path, **settings) -> ZImagePipeline:
    """A pipeline as after a restart: nothing in memory."""
    return ZImagePipeline.from_pretrained(model, prompt_cache=PromptCache(folder), **settings)


def encoder_file(model: Path) -> Path:
    return model / "text_encoder" / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_known_prompt_needs_no_weight_of_the_encoder(model, tmp_path, dtype):
    folder = tmp_path / "prompts"
    before = opened(model, folder, dtype=dtype).generate(PROMPT, "a star", guidance_scale=2.0, seed=1, **SMALL)
    assert len(entries(folder)) == 2  # positive and negative
    poison(encoder_file(model))
    pipe = opened(model, folder, dtype=dtype)
    assert torch.equal(pipe.generate(PROMPT, "a star", guidance_scale=2.0, seed=1, **SMALL), before)
    assert pipe.generate(PROMPT, seed=2, **SMALL).isfinite().all()
    words = r"model\.embed_tokens\.weight of the text encoder has values that are not finite"
    with pytest.raises(CheckpointError, match=words):
        pipe.generate("a blue square", seed=1, **SMALL)
    assert len(entries(folder)) == 2  # what was wrong was not kept
    with pytest.raises(CheckpointError, match=words):
        ZImagePipeline.from_pretrained(model, dtype=dtype).generate(PROMPT, **SMALL)


def test_the_cache_changes_no_features(model, tmp_path):
    prompts = [PROMPT, "two green stars on a white background, and a ring", PROMPT, ""]
    plain = ZImagePipeline.from_pretrained(model).encode_prompts(prompts)
    pipe = opened(model, tmp_path / "prompts")
    pipe.encode_prompts([prompts[1]])
    for again in (pipe, pipe, opened(model, tmp_path / "prompts")):  # partly known, known, known from disk
        found = again.encode_prompts(prompts)
        assert [one.shape for one in found] == [one.shape for one in plain]
        for one, other in zip(found, plain, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
    assert len(entries(tmp_path / "prompts")) == 3


def lora_file(path: Path, component: str = "text_encoder", scale: float = 0.1) -> Path:
    weight = {
        "text_encoder": ("lora_te_layers_1_self_attn_q_proj", 128, 128),
        "transformer": ("lora_unet_layers_1_attention_to_q", 192, 192),
    }[component]
    name, out, width = weight
    generator = torch.Generator().manual_seed(1)
    save_file(
        {
            f"{name}.lora_down.weight": scale * torch.randn(4, width, generator=generator),
            f"{name}.lora_up.weight": scale * torch.randn(out, 4, generator=generator),
        },
        path,
    )
    return path


def changed_time(model: Path) -> None:
    os.utime(encoder_file(model), ns=(1, 1))


def changed_content(model: Path) -> None:
    weights = {name: weight * 1.1 for name, weight in load_file(encoder_file(model)).items()}
    save_file(weights, encoder_file(model))


def changed_config(model: Path) -> None:
    config = model / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 1000000.0', '"rope_theta": 10000.0'))


@pytest.mark.parametrize("change", [changed_time, changed_content, changed_config])
def test_a_changed_encoder_misses(model, tmp_path, change):
    first = opened(model, tmp_path / "prompts").encode_prompts([PROMPT])[0]
    change(model)
    again = opened(model, tmp_path / "prompts").encode_prompts([PROMPT])[0]
    assert torch.equal(first, again) == (change is changed_time)
    assert len(entries(tmp_path / "prompts")) == 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("settings", "misses"),
    [
        ({"prompt": "a red circle."}, True),
        ({"limit": 4}, True),  # cuts the prompt
        ({"limit": 1000}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"template": "<|im_start|>user\n{}!<|im_end|>\n<|im_start|>assistant\n"}, True),
        ({"lora": ("text_encoder", 1.0)}, True),
        ({"lora": ("text_encoder", 0.0)}, False),
        ({"lora": ("transformer", 1.0)}, False),
        ({}, False),
    ],
    ids=str,
)
def test_what_makes_a_prompt_another(model, tmp_path, settings, misses):
    opened(model, tmp_path / "prompts").encode_prompts([PROMPT])
    pipe = opened(model, tmp_path / "prompts", dtype=settings.get("dtype", torch.float32))
    if "lora" in settings:
        kind, strength = settings["lora"]
        pipe.set_loras((lora_file(tmp_path / "l.safetensors", kind), strength))
    limit, template = settings.get("limit", tokenizer.MAX_LENGTH), settings.get("template", tokenizer.PROMPT_TEMPLATE)
    pipe.encode_prompts([settings.get("prompt", PROMPT)], limit, template)
    assert len(entries(tmp_path / "prompts")) == 1 + misses


def test_loras_are_known_by_file_and_strength_and_leave_the_encoder_unread(model, tmp_path):
    folder, file = tmp_path / "prompts", lora_file(tmp_path / "l.safetensors")
    pipe = opened(model, folder)
    pipe.set_loras((file, 0.8))  # before the encoder is read
    (with_lora,) = pipe.encode_prompts([PROMPT])
    pipe.set_loras()
    (plain,) = pipe.encode_prompts([PROMPT])
    pipe.set_loras((file, 0.8))  # after it was
    (from_memory,) = pipe.encode_prompts([PROMPT])
    assert torch.equal(from_memory, with_lora) and not torch.allclose(with_lora, plain, atol=1e-3)
    uncached = ZImagePipeline.from_pretrained(model)
    uncached.set_loras((file, 0.8))
    assert torch.allclose(uncached.encode_prompts([PROMPT])[0], with_lora, atol=1e-5)
    uncached.text_encoder  # noqa: B018 - it is read by now, so LoRA is taken off the weights themselves
    uncached.set_loras()
    assert torch.allclose(uncached.encode_prompts([PROMPT])[0], plain, atol=1e-5)

    poison(encoder_file(model))
    pipe = opened(model, folder)
    pipe.set_loras((file, 0.8))
    assert torch.equal(pipe.encode_prompts([PROMPT])[0], with_lora)
    pipe.set_loras((file, 0.7))
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight of the text encoder has values that are not"):
        pipe.encode_prompts([PROMPT])
    pipe.set_loras((lora_file(file, scale=0.2), 0.8))  # the same name, another content
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight of the text encoder has values that are not"):
        pipe.encode_prompts([PROMPT])


def test_a_refused_lora_changes_nothing(model, tmp_path):
    pipe = opened(model, tmp_path / "prompts")
    pipe.set_loras((lora_file(tmp_path / "l.safetensors"), 1.0))
    (before,) = pipe.encode_prompts([PROMPT])
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 4)}, tmp_path / "flux")
    with pytest.raises(CheckpointError, match="this is a LoRA for Flux"):
        pipe.set_loras((tmp_path / "flux", 1.0))
    assert torch.equal(pipe.encode_prompts([PROMPT])[0], before)
    assert len(entries(tmp_path / "prompts")) == 1


def test_networks_that_were_made_elsewhere_are_not_cached(model, tmp_path):
    parts = {
        kind: open_component(model, kind).build(dtype=torch.float32) for kind in ("text_encoder", "transformer", "vae")
    }
    pipe = ZImagePipeline(
        open_tokenizer(model),
        parts["text_encoder"],
        parts["transformer"],
        parts["vae"],
        schedule_of(model),
        prompt_cache=PromptCache(tmp_path / "prompts"),
    )
    (mine,) = pipe.encode_prompts([PROMPT])
    assert not (tmp_path / "prompts").exists()
    pipe = opened(model, tmp_path / "prompts")
    pipe.encode_prompts([PROMPT])
    with torch.no_grad():
        parts["text_encoder"].model.layers[0].mlp.down_proj.weight.mul_(2)
    pipe.text_encoder = parts["text_encoder"]
    assert not torch.allclose(pipe.encode_prompts([PROMPT])[0], mine, atol=1e-3)
    assert len(entries(tmp_path / "prompts")) == 1


def test_damage_that_headers_show_is_told_when_the_pipeline_is_opened(model):
    whole = encoder_file(model).read_bytes()
    encoder_file(model).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"truncated.*model\.safetensors"):
        ZImagePipeline.from_pretrained(model)
    encoder_file(model).write_bytes(whole)
    config = model / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 384', '"intermediate_size": 320'))
    with pytest.raises(CheckpointError, match=r"has shape \[.*\], expected \[.*\] by text_encoder/config.json"):
        ZImagePipeline.from_pretrained(model)


def test_a_file_that_changes_before_it_is_read_is_refused(model):
    pipe = ZImagePipeline.from_pretrained(model)
    changed_content(model)
    with pytest.raises(CheckpointError, match=r"the file has changed since it was opened.*model\.safetensors"):
        pipe.generate(PROMPT, **SMALL)


def test_for_a_known_prompt_the_encoder_is_not_even_built(model, tmp_path):
    opened(model, tmp_path / "prompts").encode_prompts([PROMPT])
    pipe = opened(model, tmp_path / "prompts")
    pipe.generate(PROMPT, **SMALL)
    encoder_file(model).unlink()
    pipe.set_loras((lora_file(tmp_path / "l.safetensors", "transformer"), 1.0))
    pipe.generate(PROMPT, **SMALL)
    with torch.no_grad():
        pipe.transformer.layers[0].attention.out.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="of the transformer has values that are not finite"):
        pipe.generate(PROMPT, **SMALL)
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        pipe.generate("a blue square", **SMALL)


def test_an_encoder_that_was_read_for_an_image_can_be_trained(model):
    pipe = ZImagePipeline.from_pretrained(model)
    pipe.generate(PROMPT, **SMALL)
    ids = torch.tensor([pipe.tokenizer(PROMPT)])
    weight = pipe.text_encoder.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    pipe.text_encoder(ids).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_the_command_line_keeps_prompts_in_a_folder(model, tmp_path, capsys):
    command = [
        "generate",
        PROMPT,
        "-m",
        str(model),
        "--cpu",
        "--seed",
        "1",
        "--width",
        "64",
        "--height",
        "64",
        "-s",
        "1",
    ]
    cached = [*command, "--prompt-cache", str(tmp_path / "prompts")]
    assert main([*cached, "-o", str(tmp_path / "a.png")]) == 0
    assert len(entries(tmp_path / "prompts")) == 1
    poison(encoder_file(model))
    assert main([*cached, "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main([*command, "-o", str(tmp_path / "c.png")]) == 2
    assert "of the text encoder has values that are not finite" in capsys.readouterr().err
