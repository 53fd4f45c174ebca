"""Runs the pack in ComfyUI's real memory manager between the CPU and a fake accelerator; prints what it saw as JSON.

python tests/nodes/two_devices.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from fake_accelerator import DEVICE, live, moved  # noqa: E402
from inside import load_pack  # noqa: E402

from tests.helpers import NANO, relative  # noqa: E402

PLENTY = 10**9
free_on_device = PLENTY


def main() -> dict[str, Any]:
    pack = load_pack("use_pytorch_cross_attention")
    import comfy.model_management as mm

    with torch.inference_mode():
        # on the CPU alone, as the reference
        clip, model, vae = load(pack)
        cond = encode(clip)
        latents = sample(pack, model, cond)
        image = vae.decode(latents)
        mm.unload_all_models()

        take_over(mm)
        report: dict[str, Any] = {"size": model.model_size(), "budgets": []}
        for share in (None, 0.75, 0.5, 0.2):
            report["budgets"].append(budget(pack, mm, share, cond, latents))
        expected = with_lora(pack, mm, cond, PLENTY)[1]
        report["LoRA"] = {share: lora(pack, mm, share, cond, expected) for share in (1.0, 0.5, 0.2)}
        report["eviction"] = evict(pack, mm, cond, latents, image)
        report["out of memory"] = out_of_memory(pack, mm, latents, image)
    return report


def load(pack):
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    model = pack.bridge.model.load_model(NANO, torch.float32)
    model.model.memory_usage_factor = 0  # activations are tiny here; the budget is for weights
    return clip, model, pack.bridge.vae.ZImageVAE(NANO)


def encode(clip):
    return clip.encode_from_tokens_scheduled(clip.tokenize("a red circle on a blue background"))


def sample(pack, model, cond) -> torch.Tensor:
    out = pack.sampling.ZImageSampler.execute(
        model=model,
        positive=cond,
        latent_image={"samples": torch.zeros(1, 16, 16, 16)},
        seed=3,
        steps=2,
        guidance_scale=0.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        denoise=1.0,
    )
    return out.args[0]["samples"]


def take_over(mm) -> None:
    """Makes the fake accelerator ComfyUI's device, with `free_on_device` bytes for weights."""
    real = mm.get_free_memory

    def free_memory(dev=None, torch_free_too=False):
        if dev is not None and dev.type == "cpu":
            return real(dev, torch_free_too)
        used = sum(m.model_loaded_memory() for m in mm.current_loaded_models if m.device == DEVICE)
        free = free_on_device - used
        return (free, 0) if torch_free_too else free

    mm.get_free_memory = free_memory
    mm.get_torch_device = mm.text_encoder_device = mm.vae_device = lambda: DEVICE
    mm.vram_state = mm.VRAMState.NORMAL_VRAM
    mm.minimum_inference_memory = lambda: 0
    mm.EXTRA_RESERVED_VRAM = 0
    mm.soft_empty_cache = lambda *_: None


def budget(pack, mm, share: float | None, cond, expected: torch.Tensor) -> dict[str, Any]:
    """One run of the sampler with room for this share of the transformer's weights (None: for all)."""
    global free_on_device
    mm.unload_all_models()
    model = load(pack)[1]
    free_on_device = PLENTY if share is None else int(model.model_size() * share)
    before = moved["to device"]
    result = sample(pack, model, cond)
    return {
        "loaded": model.loaded_size(),
        "moved": moved["to device"] - before,
        "difference": relative(result, expected),
    }


def with_lora(pack, mm, cond, free: int) -> tuple[Any, torch.Tensor]:
    """A fresh transformer with the moon's LoRA, and what it samples with so many bytes for weights."""
    global free_on_device
    mm.unload_all_models()
    free_on_device = free
    model = pack.bridge.lora.add_lora(load(pack)[1], None, pack.bridge.folders.NANO_LORA, 0.8, 0.0)[0]
    return model, sample(pack, model, cond)


def lora(pack, mm, share: float, cond, expected: torch.Tensor) -> dict[str, Any]:
    """A step with the moon's LoRA, and what lies where, with room for this share of the transformer's weights."""
    model, result = with_lora(pack, mm, cond, int(load(pack)[1].model_size() * share))
    left = sum(weight.nbytes for weight in model.model.parameters() if weight.device != DEVICE)
    given = torch.zeros(1, 16, 16, 16).to(DEVICE), torch.tensor([0.7]).to(DEVICE), torch.zeros(1, 21, 128).to(DEVICE)
    entered = moved["to device"]
    model.model.apply_model(*given[:2], c_crossattn=given[2], num_tokens=21, transformer_options={})
    sent = moved["to device"] - entered
    loaded, adapters = model.loaded_size(), list(pack.bridge.lora._adapters(model).values())
    adapters[0].bring(torch.device(DEVICE.type))  # as some devices are named, without a number
    near = sorted({str(device) for adapter in adapters for device in adapter.near})
    mm.unload_all_models()
    return {
        "difference": relative(result, expected),
        "weights left": left,
        "moved in a step": sent,
        "loaded": loaded,
        "allowed": free_on_device,
        "near": near,
        "live afterwards": live() - sum(tensor.nbytes for tensor in given),
    }


def evict(pack, mm, cond, latents: torch.Tensor, image: torch.Tensor) -> dict[str, Any]:
    """Encoder, transformer and VAE in turn on a device that holds one of them: what is loaded after each."""
    global free_on_device
    mm.unload_all_models()
    clip, model, vae = load(pack)
    sizes = {"clip": clip.patcher.model_size(), "model": model.model_size(), "vae": vae.patcher.model_size()}
    free_on_device = max(sizes.values()) + 1000
    patchers = {"clip": clip.patcher, "model": model, "vae": vae.patcher}

    def loaded() -> list[str]:
        return [name for name, patcher in patchers.items() if patcher.loaded_size() > 0]

    vae.memory_used_decode = lambda *_: free_on_device - sizes["vae"]
    steps = {}
    again = encode(clip)
    steps["encode"] = loaded()
    result = sample(pack, model, again)
    steps["sample"] = loaded()
    image = vae.decode(result)
    steps["decode"] = loaded()
    pairs = [(again[0][0], cond[0][0]), (result, latents), (image, image)]
    return {"loaded": steps, "differences": [relative(*pair) for pair in pairs]}


def out_of_memory(pack, mm, latents: torch.Tensor, image: torch.Tensor) -> dict[str, Any]:
    """A decode that runs out of memory on the whole image: ComfyUI falls back to tiles."""
    global free_on_device
    mm.unload_all_models()
    free_on_device = PLENTY
    vae = load(pack)[2]
    decode, tiles = vae.first_stage_model.decode, []

    def decode_if_small(z: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tiles.append(list(z.shape[-2:]))
        if z.shape[-2] * z.shape[-1] > 64:
            raise torch.cuda.OutOfMemoryError("no room for a whole image")
        return decode(z, **kwargs)

    vae.first_stage_model.decode = decode_if_small
    in_tiles = vae.decode_tiled_
    vae.decode_tiled_ = lambda samples, **_: in_tiles(samples, 8, 8, 2)
    image = vae.decode(latents)
    return {"tiles": tiles, "mean difference": (image - image).abs().mean().item()}


if __name__ == "__main__":
    print(json.dumps(main()))
