"""What our nodes give on ComfyUI is what the core gives, and what stock nodes give in their place."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import workflow
from host import Client, Server
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_core.pipeline import ZImagePipeline

from ..helpers import NANO, relative

PROMPT = "a red circle on a blue background"
SAMPLER, TEXT, NEGATIVE, VAE, MODEL, LATENT = "7", "4", "5", "3", "1", "6"  # node ids of the nano workflow


def latent_prompt(**sampler: Any) -> dict[str, Any]:
    """The nano workflow in float32 with settings of the sampler, ending in a saved latent instead of an image."""
    prompt = workflow.load("zimage_nano_txt2img")
    workflow.set_text(prompt, PROMPT)
    prompt[SAMPLER]["inputs"].update(seed=5, steps=4, **sampler)
    prompt[MODEL]["inputs"]["weight_dtype"] = "fp32"
    prompt["2"]["inputs"]["weight_dtype"] = "fp32"
    del prompt["8"]
    prompt["9"] = {"class_type": "SaveLatent", "inputs": {"samples": [SAMPLER, 0], "filename_prefix": "test/latent"}}
    return prompt


def latents(client: Client, prompt: dict[str, Any]) -> torch.Tensor:
    """Runs a prompt that saves a latent; the raw latents [B, 16, h, w]."""
    entry = client.run(prompt)
    (saved,) = entry["outputs"]["9"]["latents"]
    return load_file(client.server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(NANO)


@pytest.mark.parametrize(
    ("host_settings", "core_settings"),
    [
        ({"guidance_scale": 0.0}, {}),
        ({"guidance_scale": 2.0}, {"guidance_scale": 2.0}),
        ({"guidance_scale": 4.0, "cfg_normalization": 0.9}, {"guidance_scale": 4.0, "cfg_normalization": 0.9}),
        ({"guidance_scale": 3.0, "cfg_truncation": 0.3}, {"guidance_scale": 3.0, "cfg_truncation": 0.3}),
    ],
    ids=["plain", "guidance", "normalization", "truncation"],
)
def test_same_seed_same_settings_same_latents_as_the_core(pipe, each_client, host_settings, core_settings):
    raw = latents(each_client, latent_prompt(**host_settings))
    core = pipe.generate(PROMPT, "", width=128, height=128, seed=5, steps=4, output="latents", **core_settings)
    assert relative(pipe.vae.scale(raw), core) <= 1e-4


def test_a_batch_and_another_size_are_the_cores_too(pipe, client):
    prompt = latent_prompt(guidance_scale=0.0)
    prompt[LATENT]["inputs"].update(width=160, height=96, batch_size=3)
    raw = latents(client, prompt)
    core = pipe.generate(PROMPT, width=160, height=96, batch_size=3, seed=5, steps=4, output="latents")
    assert raw.shape == (3, 16, 12, 20)
    assert relative(pipe.vae.scale(raw), core) <= 1e-4


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_stock_ksampler_on_our_model(client, guidance):
    """Our guidance g is its CFG g + 1; its `simple` schedule is the exact one where the steps divide 1000."""
    ours = latents(client, latent_prompt(guidance_scale=guidance))
    prompt = latent_prompt()
    inputs = prompt[SAMPLER]["inputs"]
    stock = {"cfg": guidance + 1, "sampler_name": "euler", "scheduler": "simple", "seed": 5, "steps": 4, "denoise": 1.0}
    wires = {name: inputs[name] for name in ("model", "positive", "negative", "latent_image")}
    prompt[SAMPLER] = {"class_type": "KSampler", "inputs": {**wires, **stock}}
    assert relative(latents(client, prompt), ours) <= 1e-5


def test_stock_text_encode_on_our_clip(client):
    ours = latents(client, latent_prompt())
    prompt = latent_prompt()
    prompt[TEXT]["class_type"] = prompt[NEGATIVE]["class_type"] = "CLIPTextEncode"
    assert torch.equal(latents(client, prompt), ours)


def test_stock_decode_plain_and_tiled_on_our_vae(client):
    prompt = workflow.load("zimage_nano_txt2img")
    plain, tiled = {**prompt["8"], "class_type": "VAEDecode"}, {**prompt["8"], "class_type": "VAEDecodeTiled"}
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    tiled = {**tiled, "inputs": {**tiled["inputs"], **tiles}}
    save = {"class_type": "SaveImage"}
    prompt |= {"20": plain, "21": {**save, "inputs": {"images": ["20", 0], "filename_prefix": "plain"}}}
    prompt |= {"22": tiled, "23": {**save, "inputs": {"images": ["22", 0], "filename_prefix": "tiled"}}}
    entry = client.run(prompt)
    ours, stock, in_tiles = (_pixels(client.images(entry, node)[0]) for node in ("9", "21", "23"))
    assert torch.equal(ours, stock)
    assert (in_tiles - ours).abs().mean() < 4  # of 255: tiles see their own statistics, the image is the same


def test_our_vae_encodes_what_it_decodes(client):
    """Image to latents and back: stock VAEEncode and ours agree, and the image survives."""
    prompt = workflow.load("zimage_nano_txt2img")
    save = {"class_type": "SaveImage"}
    for number, encoder in ((30, "ZImageVAEEncode"), (40, "VAEEncode")):
        prompt[str(number)] = {"class_type": encoder, "inputs": {"pixels": ["8", 0], "vae": [VAE, 0]}}
        samples = {"samples": [str(number), 0], "vae": [VAE, 0]}
        prompt[str(number + 1)] = {"class_type": "ZImageVAEDecode", "inputs": samples}
        images = {"images": [str(number + 1), 0], "filename_prefix": "again"}
        prompt[str(number + 2)] = {**save, "inputs": images}
    entry = client.run(prompt)
    before, ours, stock = (_pixels(client.images(entry, node)[0]) for node in ("9", "32", "42"))
    assert torch.equal(ours, stock)
    assert (ours - before).abs().mean() < 6


@pytest.fixture(scope="module")
def lora_files(host: Server) -> list[str]:
    """One and the same LoRA in three formats: native, kohya on the native tree, diffusers."""
    generator = torch.Generator().manual_seed(0)
    weights = load_file(next((NANO / "transformer").glob("*.safetensors")))
    dim = weights["layers.0.attention.to_q.weight"].shape[0]
    rank, alpha = 4, 2.0
    down = 0.3 * torch.randn(rank, dim, generator=generator)
    up = 0.3 * torch.randn(3 * dim, rank, generator=generator)
    files: dict[str, dict[str, torch.Tensor]] = {"native": {}, "kohya": {}, "diffusers": {}}
    for layer in (0, 1):
        stem = f"layers.{layer}.attention"
        flat = stem.replace(".", "_")
        a = torch.tensor(alpha)
        files["native"] |= {
            f"diffusion_model.{stem}.qkv.lora_A.weight": down,
            f"diffusion_model.{stem}.qkv.lora_B.weight": up,
            f"diffusion_model.{stem}.qkv.alpha": a,
        }
        files["kohya"] |= {
            f"lora_unet_{flat}_qkv.lora_down.weight": down,
            f"lora_unet_{flat}_qkv.lora_up.weight": up,
            f"lora_unet_{flat}_qkv.alpha": a,
        }
        for part, rows in zip("qkv", up.chunk(3), strict=True):
            files["diffusers"] |= {
                f"transformer.{stem}.to_{part}.lora_A.weight": down,
                f"transformer.{stem}.to_{part}.lora_B.weight": rows,
                f"transformer.{stem}.to_{part}.alpha": a,
            }
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file({key: value.clone() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return [f"{name}.safetensors" for name in files]


@pytest.mark.slow
def test_stock_and_own_lora_loader_with_three_formats(client, lora_files):
    without = latents(client, latent_prompt())
    results = []
    for name in lora_files:
        prompt = latent_prompt()
        inputs = {"model": [MODEL, 0], "lora_name": name, "strength_model": 0.8}
        prompt["50"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        prompt[SAMPLER]["inputs"]["model"] = ["50", 0]
        results.append(latents(client, prompt))
        prompt["50"] = {
            "class_type": "ZImageLoraLoader",
            "inputs": {"model": [MODEL, 0], "lora": name, "strength": 0.8},
        }
        assert relative(latents(client, prompt), results[0]) <= 1e-5
    assert "lora key not loaded" not in client.server.log_text()
    assert relative(results[0], without) > 1e-2
    assert relative(results[1], results[0]) <= 1e-5
    assert relative(results[2], results[0]) <= 1e-5
    assert torch.equal(latents(client, latent_prompt()), without)  # and the LoRA is gone again


@pytest.mark.slow
def test_stock_compile_on_our_model(client):
    ours = latents(client, latent_prompt(guidance_scale=0.0))
    prompt = latent_prompt(guidance_scale=0.0)
    prompt["50"] = {"class_type": "TorchCompileModel", "inputs": {"model": [MODEL, 0], "backend": "inductor"}}
    prompt[SAMPLER]["inputs"]["model"] = ["50", 0]
    assert relative(latents(client, prompt), ours) <= 1e-3


def test_stock_easy_cache_on_our_model(client):
    prompt = latent_prompt(guidance_scale=0.0)
    prompt[SAMPLER]["inputs"]["steps"] = 20
    exact = latents(client, prompt)
    cache = {"model": [MODEL, 0], "reuse_threshold": 0.5, "start_percent": 0.7, "end_percent": 1.0, "verbose": False}
    prompt["50"] = {"class_type": "EasyCache", "inputs": cache}
    prompt[SAMPLER]["inputs"]["model"] = ["50", 0]
    cached = latents(client, prompt)
    skipped = re.findall(r"EasyCache - skipped (\d+)/20 steps", client.server.log_text())
    assert skipped and int(skipped[-1]) >= 1, skipped
    assert 1e-6 < relative(cached, exact) < 0.3


def test_shift_of_the_stock_node_is_followed(pipe, client):
    prompt = latent_prompt(guidance_scale=0.0)
    prompt["50"] = {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": [MODEL, 0], "shift": 6.0}}
    prompt[SAMPLER]["inputs"]["model"] = ["50", 0]
    raw = latents(client, prompt)
    other = ZImagePipeline.from_pretrained(NANO)
    other.scheduler = replace(other.scheduler, shift=6.0)
    core = other.generate(PROMPT, width=128, height=128, seed=5, steps=4, output="latents")
    assert relative(pipe.vae.scale(raw), core) <= 1e-4


def test_a_noise_mask_keeps_what_it_does_not_cover(client):
    """Left half repainted, right half kept: the kept latents are the encoded image's."""
    prompt = latent_prompt(guidance_scale=0.0)
    prompt["60"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 128, "height": 128, "batch_size": 1, "color": 0x28A53C},
    }
    prompt["61"] = {"class_type": "ZImageVAEEncode", "inputs": {"pixels": ["60", 0], "vae": [VAE, 0]}}
    solid = {"width": 128, "height": 128, "value": 0.0}
    prompt["62"] = {"class_type": "SolidMask", "inputs": solid}
    prompt["63"] = {"class_type": "SolidMask", "inputs": {**solid, "width": 64, "value": 1.0}}
    paste = {"destination": ["62", 0], "source": ["63", 0], "x": 0, "y": 0, "operation": "add"}
    prompt["64"] = {"class_type": "MaskComposite", "inputs": paste}
    prompt["65"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["61", 0], "mask": ["64", 0]}}
    prompt[SAMPLER]["inputs"]["latent_image"] = ["65", 0]
    painted = latents(client, prompt)
    prompt["9"]["inputs"]["samples"] = ["61", 0]
    clean = latents(client, prompt)
    assert torch.allclose(painted[..., 8:], clean[..., 8:], atol=1e-4)
    assert (painted[..., :7] - clean[..., :7]).abs().mean() > 0.1


def test_denoise_decides_how_much_of_the_image_stays(client):
    def distance(denoise: float) -> float:
        prompt = workflow.load("zimage_nano_img2img")
        prompt["12"]["inputs"]["denoise"] = denoise
        entry = client.run(prompt)
        before, after = (_pixels(client.images(entry, node)[0]) for node in ("9", "14"))
        return (after - before).abs().mean().item()

    little, much = distance(0.2), distance(0.95)
    assert little < 12 and much > 40


def _pixels(png: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).float()
