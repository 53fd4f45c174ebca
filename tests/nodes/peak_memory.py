"""Memory of a fake accelerator under ComfyUI's real memory manager, ours beside ComfyUI's own; prints it as JSON.

python tests/nodes/peak_memory.py

Native: ComfyUI's Z-Image (`comfy.supported_models.ZImage`, NextDiT, loaded by `comfy.sd.load_diffusion_model`) and the
stock nodes KSampler and VAEDecode. Shared by both sides: the weights, from one file of random numbers as narrow as the
ComfyUI's own network can be; encoder and VAE of the nano model, whose widths ComfyUI's own classes can't have.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]
import two_devices  # noqa: E402
from fake_accelerator import live, peak, reset_peak, waits  # noqa: E402
from inside import load_pack  # noqa: E402

from tests.nodes import test_packed  # noqa: E402

SHARES = (None, 0.5, 0.2)  # room for so much of the transformer; None: for everything
# heads of 128, time embeddings of 1024, and an MLP of a multiple of 256 that both compute alike from the width
TOY = {"dim": 1152, "n_heads": 9, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 128}
PROMPT = "a red circle on a blue background"
OF_SAME_LENGTH = "a blue circle on a red background"  # runs in one batch with it
STEPS = 2  # a divisor of 1000: for others ComfyUI's `simple` takes the nearest of its 1000 noise levels
SIDE = 24  # tokens: 144 of the image, padded to 160


def main() -> dict[str, Any]:
    pack = load_pack("use_pytorch_cross_attention")
    import comfy.model_management as mm

    two_devices.take_over(mm)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "toy.safetensors"
        make_checkpoint(pack, file)
        use_folder(folder)
        report: dict[str, Any] = {"peaks": [compare(pack, mm, file, share) for share in SHARES]}
        two_devices.free_on_device = two_devices.PLENTY
        report["leaving"] = leaving(pack, mm, Path(folder))
        report["left over"] = left_over(pack, mm)
        report["waits"] = waits_in_steps(pack, mm)
        report["waits of files"] = waits_of_files(pack, mm, Path(folder))
    return report


def use_folder(folder: str) -> None:
    """Keeps prompts there, not in the user directory of the ComfyUI that is tested."""
    import folder_paths

    folder_paths.set_user_directory(folder)


def make_checkpoint(pack: Any, file: Path) -> None:
    from safetensors.torch import save_file

    from zimage_core.config import TransformerConfig
    from zimage_core.model.transformer import ZImageTransformer
    from zimage_core.weights.specs import PUBLISHED_TRANSFORMER

    config = TransformerConfig(**{**PUBLISHED_TRANSFORMER, **TOY}, in_channels=16, patch_size=2)
    model = ZImageTransformer(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in model.state_dict().items():
        if weight.ndim < 2:
            weights[name] = torch.full_like(weight, 1.0 if name.endswith("weight") else 0.0)
        else:
            weights[name] = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1])
    save_file(weights, file)


def load_ours(pack: Any, file: Path) -> Any:
    return pack.bridge.model.load_model(file, torch.float32)


def load_native(_pack: Any, file: Path) -> Any:
    import comfy.sd

    with detected_as_z_image():
        return comfy.sd.load_diffusion_model(str(file), {"dtype": torch.float32})


@contextmanager
def detected_as_z_image() -> Iterator[None]:
    """ComfyUI knows Z-Image by its width of 3840, and gives other widths none of its numbers."""
    import comfy.model_detection
    import comfy.supported_models

    detect = comfy.model_detection.model_config_from_unet
    numbers = {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "qk_norm": True,
        "n_kv_heads": TOY["n_heads"],
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
        **TOY,
    }
    comfy.model_detection.model_config_from_unet = lambda *_, **__: comfy.supported_models.ZImage(numbers)
    try:
        yield
    finally:
        comfy.model_detection.model_config_from_unet = detect


def sample_ours(pack: Any, model: Any, cond: Any, side: int = SIDE, batch: int = 1, **other: Any) -> torch.Tensor:
    inputs = {
        "latent_image": {"samples": torch.zeros(batch, 16, side, side)},
        "seed": 3,
        "steps": STEPS,
        "guidance_scale": 0.0,
        "cfg_normalization": 0.0,
        "cfg_truncation": 1.0,
        "denoise": 1.0,
    }
    out = pack.sampling.ZImageSampler.execute(model=model, positive=cond, **{**inputs, **other})
    return out.args[0]["samples"]


def sample_native(_pack: Any, model: Any, cond: Any) -> torch.Tensor:
    import nodes

    latent = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
    return nodes.common_ksampler(model, 3, STEPS, 1.0, "euler", "simple", cond, cond, latent)[0]["samples"]


def decode_ours(pack: Any, vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return pack.vae.ZImageVAEDecode.execute(vae, {"samples": latents}).args[0]


def decode_native(_pack: Any, vae: Any, latents: torch.Tensor) -> torch.Tensor:
    import nodes

    return nodes.VAEDecode().decode(vae, {"samples": latents})[0]


def encode_ours(pack: Any, clip: Any, text: str = PROMPT, cache: bool = False) -> Any:
    return pack.conditioning.ZImageTextEncode.execute(clip, text, cache=cache).args[0]


def encode_native(_pack: Any, clip: Any) -> Any:
    import nodes

    return nodes.CLIPTextEncode().encode(clip, PROMPT)[0]


OURS = (load_ours, encode_ours, sample_ours, decode_ours)
NATIVE = (load_native, encode_native, sample_native, decode_native)


def compare(pack: Any, mm: Any, file: Path, share: float | None) -> dict[str, Any]:
    ours, ours_latents, ours_image = graph(pack, mm, file, share, OURS)
    native, native_latents, native_image = graph(pack, mm, file, share, NATIVE)
    return {
        "ours": ours,
        "native": native,
        "latents differ": two_devices.relative(ours_latents, native_latents),
        "images differ": two_devices.relative(ours_image, native_image),
    }


def graph(
    pack: Any, mm: Any, file: Path, share: float | None, side: tuple[Any, ...]
) -> tuple[dict[str, int], torch.Tensor, torch.Tensor]:
    """Peaks of one run from encoder to image with fresh models, by step, and what came out."""
    load, encode, sample, decode = side
    clear(mm)
    clip, _nano, vae = two_devices.load(pack)
    model = load(pack, file)
    model.model.memory_usage_factor = 0  # the budget is for weights
    two_devices.free_on_device = two_devices.PLENTY if share is None else int(model.model_size() * share)
    peaks: dict[str, int] = {"before": live()}

    def measured(name: str, call: Any, *arguments: Any) -> Any:
        reset_peak()
        result = call(pack, *arguments)
        peaks[name] = peak()
        return result

    cond = measured("encode", encode, clip)
    latents = measured("sample", sample, model, cond)
    peaks["loaded"] = model.loaded_size()
    image = measured("decode", decode, vae, latents)
    return peaks, latents, image


def leaving(pack: Any, mm: Any, folder: Path) -> dict[str, Any]:
    """After a run with room for everything: who loses weights, in order, as ever a little more room is asked for."""
    clear(mm)
    # each model is held once, as the outputs of its loader are in ComfyUI's cache
    clip, model, vae = two_devices.load(pack)
    clip = pack.bridge.clip.load_clip(larger_encoder(folder), torch.float32)
    loaded = {"clip": clip, "model": model, "vae": vae}
    del clip, model, vae
    decode_ours(
        pack, loaded["vae"], sample_ours(pack, loaded["model"], encode_ours(pack, loaded["clip"]), side=16, steps=1)
    )

    def sizes() -> dict[str, int]:
        return {name: getattr(item, "patcher", item).loaded_size() for name, item in loaded.items()}

    whole, order = sizes(), []
    while any(sizes().values()) and len(order) < len(whole):
        before = sizes()
        mm.free_memory(mm.get_free_memory(two_devices.DEVICE) + 1000, two_devices.DEVICE)
        after = sizes()
        order += [name for name in before if after[name] < before[name] and name not in order]
    return {"sizes": whole, "order": order}


def larger_encoder(folder: Path) -> Path:
    """The nano snapshot with more layers of text encoder: between VAE and transformer in size, as the published one."""
    from safetensors.torch import save_file

    from zimage_core.config import TextEncoderConfig
    from zimage_core.model.text_encoder import TextEncoder

    snapshot = Path(shutil.copytree(two_devices.NANO, folder / "larger"))
    config = snapshot / "text_encoder" / "config.json"
    raw = {**json.loads(config.read_text()), "num_hidden_layers": 12}
    config.write_text(json.dumps(raw))
    encoder = TextEncoder(TextEncoderConfig.from_dict(raw, "config.json"), dtype=torch.bfloat16)
    for file in config.parent.glob("*.safetensors*"):
        file.unlink()
    weights = {name: torch.randn(weight.shape).mul_(0.02).bfloat16() for name, weight in encoder.state_dict().items()}
    save_file(weights, config.with_name("model.safetensors"))
    return snapshot


def left_over(pack: Any, mm: Any) -> dict[str, int]:
    """Bytes on the device when everything has been unloaded, with models and results still held, by what was used."""
    clear(mm)
    clip, model, vae = two_devices.load(pack)
    held: list[Any] = []
    left = {"before": live()}

    def measured(name: str, call: Any, *arguments: Any, **settings: Any) -> None:
        held.append(call(pack, *arguments, **settings))
        assert live() > 0, f"{name} was not on the device"
        mm.unload_all_models()
        left[name] = live()

    measured("encoder", encode_ours, clip)
    cond = held[-1]
    measured("prompt cache", encode_ours, clip, "a blue star", cache=True)
    known = pack.bridge.prompts.cache()
    assert known.get(pack.bridge.prompts.key(clip, clip.tokenize("a blue star"))) is not None
    for attention in ("auto", "pytorch", "split"):
        measured(f"attention {attention}", sample_ours, model, cond, side=16, steps=1, attention=attention)
    other = encode_ours(pack, clip, "a green heart")
    measured("guidance", sample_ours, model, cond, side=16, steps=1, guidance_scale=2.0, negative=other)
    measured("decoder", decode_ours, vae, held[-1])
    captions = model.model.diffusion_model.run_captions
    left["captions of the run"] = len(captions.known) + (captions.patcher is not None)
    return left


def waits_in_steps(pack: Any, mm: Any) -> dict[str, Any]:
    """How often each call of the transformer makes the CPU wait, as ComfyUI calls it, with all weights loaded."""
    clear(mm)
    clip, model, _vae = two_devices.load(pack)
    cond, other = encode_ours(pack, clip), encode_ours(pack, clip, OF_SAME_LENGTH)
    network = model.model.diffusion_model
    forward = network.forward
    counted, counts = counting(forward)

    def looking(*arguments: Any, **settings: Any) -> torch.Tensor:
        out = counted(*arguments, **settings)
        counts[-1] = {name: -waits[name] for name in waits}
        out.sum().item()
        out.to("cpu").to(out)
        counts[-1] = {name: waits[name] + counts[-1][name] for name in waits}
        return out

    registry = pack.bridge.attention.comfy_attention.REGISTERED_ATTENTION_FUNCTIONS
    chosen: list[int] = []
    registry["flash"] = lambda *given, **more: chosen.append(len(counts)) or registry["pytorch"](*given, **more)
    found = {}
    for name, function, settings in (
        ("one", counted, {}),
        ("batch", counted, {"batch": 2, "side": 20}),  # with image padding
        ("guidance", counted, {"guidance_scale": 2.0, "negative": other}),
        ("chosen attention", counted, {"attention": "flash"}),
        ("one that looks", looking, {}),
    ):
        counts.clear()
        network.forward = function
        sample_ours(pack, model, cond, **{"side": 16, **settings})
        assert model.loaded_size() == model.model_size()
        found[name] = list(counts)
    network.forward = forward
    del registry["flash"]
    found["calls of the chosen attention by step"] = [chosen.count(step) for step in range(STEPS)]
    found |= between_steps(pack, model, cond)
    return found


def between_steps(pack: Any, model: Any, cond: Any) -> dict[str, Any]:
    """Waits from one call of the transformer to the next, that call included; with and without a look for overflow."""
    network, steps, found = model.model.diffusion_model, pack.bridge.sampler.finite.Steps, {}
    forward, saw, at = network.forward, steps.saw, []

    def noting(*arguments: Any, **settings: Any) -> torch.Tensor:
        at.append(dict(waits))
        return forward(*arguments, **settings)

    network.forward = noting
    for name, look in (("between steps", saw), ("unwatched", lambda *_: None)):
        at.clear()
        steps.saw = look
        sample_ours(pack, model, cond, side=16)
        found[name] = {kind: at[-1][kind] - at[0][kind] for kind in waits}
    network.forward, steps.saw = forward, saw
    return found


def waits_of_files(pack: Any, mm: Any, folder: Path) -> dict[str, Any]:
    """The same of plain and quantized weights, each as the file has them and with the nano LoRA on top."""
    with torch.inference_mode(False):
        files = {form: test_packed.file_of(folder, form) for form in ("gguf", "marked")}
    clip = two_devices.load(pack)[0]
    cond, found = encode_ours(pack, clip), {}
    for form, path in {"plain": two_devices.NANO, **files}.items():
        for lora in (False, True) if path in files.values() else (True,):
            clear(mm)
            model = pack.bridge.model.load_model(path)
            model.model.memory_usage_factor = 0
            if lora:
                model = pack.lora.ZImageLoraLoader.execute(model, pack.bridge.folders.NANO_LORA, 1.0).args[0]
            network = model.model.diffusion_model
            network.forward, counts = counting(network.forward)
            sample_ours(pack, model, cond, side=16)
            assert model.loaded_size() == model.model_size()
            found[f"{form}, LoRA" if lora else form] = counts
    return found


def counting(forward: Any) -> tuple[Any, list[dict[str, int]]]:
    """A forward of the transformer that notes how often each of its calls makes the CPU wait, and its notes."""
    counts: list[dict[str, int]] = []

    def counted(*arguments: Any, **settings: Any) -> torch.Tensor:
        before = dict(waits)
        out = forward(*arguments, **settings)
        counts.append({name: waits[name] - before[name] for name in waits} | {"batch": len(out)})
        return out

    return counted, counts


def clear(mm: Any) -> None:
    mm.unload_all_models()
    gc.collect()


if __name__ == "__main__":
    print(json.dumps(main()))
