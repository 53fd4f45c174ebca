"""Loads tiny models under ComfyUI's command line flags, ours beside the stock loaders'; prints what it saw as JSON.

python tests/nodes/flags.py [FLAG ...]

Each row of flags is read by ComfyUI's own modules anew, in a process forked for it: most of them read flags when they
are imported. "gpu" is a simulated Ampere card whose memory is the fake accelerator's. Stock models are of ComfyUI's
own classes and as small as can be; ours are the nano model's, stored in the same dtypes.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import peak_memory
import two_devices
from fake_accelerator import DEVICE
from inside import load_pack
from safetensors.torch import load_file, save_file

NANO = two_devices.NANO
# Flags for one kind of model say nothing of the others, so that a row tests several.
ROWS: list[list[str]] = [
    [],
    ["--force-fp32"],
    ["--fp32-unet", "--fp16-vae", "--fp8_e4m3fn-text-enc"],
    ["--fp64-unet", "--fp32-vae", "--fp8_e5m2-text-enc"],
    ["--fp16-unet", "--cpu-vae", "--fp32-text-enc", "--fp16-intermediates"],
    ["--fp8_e4m3fn-unet", "--bf16-text-enc", "--force-channels-last"],
    ["--disable-mmap", "--deterministic"],
]
GPU_ROWS: list[list[str]] = [
    ["--force-fp16"],
    ["--bf16-unet", "--bf16-vae", "--fp16-text-enc"],
    ["--fp8_e5m2-unet", "--supports-fp8-compute", "--fast"],
    ["--fp8_e8m0fnu-unet"],
    ["--force-fp32", "--bf16-unet"],
    ["--gpu-only"],
    ["--highvram"],
    ["--lowvram", "--disable-dynamic-vram", "--force-non-blocking", "--async-offload"],
    ["--novram", "--disable-pinned-memory", "--disable-async-offload", "--disable-smart-memory", "--reserve-vram", "1"],
]


def main() -> None:
    pack = load_pack()
    import comfy.text_encoders.z_image as z_image

    tokenizer = pack.bridge.clip._tokenizer(NANO)  # takes a second, and no flag is for it
    pack.bridge.clip._tokenizer = lambda _path: tokenizer
    z_image.ZImageTokenizer = lambda **_: None
    rows = [("cpu", ["--cpu", *row]) for row in ROWS] + [("gpu", row) for row in ROWS + GPU_ROWS]
    if sys.argv[1:]:  # one row alone
        rows = [("cpu" if "--cpu" in sys.argv else "gpu", sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        report = [{"device": device, "flags": row, **in_a_fork(pack, Path(folder), row)} for device, row in rows]
    print(json.dumps(report))


def in_a_fork(pack: Any, folder: Path, flags: list[str]) -> dict[str, Any]:
    """What a process of its own reports, or how it ended."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        logging.disable(logging.CRITICAL)
        try:
            said = look(pack, folder, flags)
        except BaseException:
            said = {"error": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(process, 0)
    return json.loads(said) if said and status == 0 else {"ended": status}


def start(flags: list[str]) -> None:
    """ComfyUI's modules as they are under these flags."""
    import comfy.cli_args
    import comfy.model_management as mm
    import comfy.options
    import comfy.utils

    args = comfy.cli_args.args
    sys.argv = ["main.py", *flags]
    comfy.options.enable_args_parsing()
    importlib.reload(comfy.cli_args)
    vars(args).clear()
    vars(args).update(vars(comfy.cli_args.args))  # the others have the old one
    comfy.cli_args.args = args
    if not args.cpu:
        card = SimpleNamespace(major=8, minor=0, name="A100", total_memory=8 << 30, multi_processor_count=108)
        torch.cuda.current_device = lambda: 0
        torch.cuda.get_device_name = lambda *_: card.name
        torch.cuda.get_device_properties = lambda *_: card
        torch.cuda.memory_stats = lambda *_: defaultdict(int)
        torch.cuda.mem_get_info = lambda *_: (card.total_memory, card.total_memory)
        torch.cuda.get_allocator_backend = lambda: "native"
    importlib.reload(mm)
    importlib.reload(comfy.utils)
    if not args.cpu:
        mm.get_torch_device = lambda: DEVICE
        mm.get_free_memory = lambda *_: two_devices.PLENTY
        mm.supports_fp8_compute = lambda device=None: args.supports_fp8_compute
    mm.load_models_gpu = lambda *_, **__: None


def look(pack: Any, folder: Path, flags: list[str]) -> dict[str, Any]:
    start(flags)
    import comfy.sd

    found: dict[str, Any] = {}
    with torch.inference_mode():
        for kind in ("transformer", "scaled"):
            ours = pack.bridge.model.load_model(NANO if kind == "transformer" else folder / "our_scaled.safetensors")
            with detected(kind):
                stock = comfy.sd.load_diffusion_model(str(folder / f"stock_{kind}.safetensors"))
            found[kind] = [model(ours), model(stock)]
        found["encoder"] = [encoder(pack.bridge.clip.load_clip(NANO)), encoder(stock_clip(folder))]
        weights = load_file(folder / "stock_vae.safetensors")
        found["vae"] = [vae(pack.bridge.vae.ZImageVAE(NANO)), vae(comfy.sd.VAE(sd=weights, config=vae_config()))]
        if "--cpu" in flags:
            found["sampled"] = sampled(pack)
        if "--disable-mmap" in flags:
            with tempfile.TemporaryDirectory() as place:
                found["survives"] = survives(pack, folder, Path(place))
    return found


@contextmanager
def detected(kind: str) -> Iterator[None]:
    """ComfyUI knows Z-Image by a width that these files don't have, and Turbo's weights to bear float16."""
    import comfy.model_detection
    import comfy.supported_models

    with peak_memory.detected_as_z_image():
        by_width = comfy.model_detection.model_config_from_unet

        def with_format(*arguments: Any, **settings: Any) -> Any:
            config = comfy.supported_models.ZImage({**by_width(*arguments, **settings).unet_config, "allow_fp16": True})
            config.quant_config = {"mixed_ops": True} if kind == "scaled" else None
            return config

        comfy.model_detection.model_config_from_unet = with_format
        yield


def model(patcher: Any) -> dict[str, str]:
    network = patcher.model.diffusion_model
    weights = dict(network.named_parameters())
    return {
        "stored": described(weights["layers.0.feed_forward.w1.weight"]),
        "plain": described(weights["x_embedder.weight"]),
        "dtype": str(patcher.model.get_dtype()),
        "computed": str(patcher.model.get_dtype_inference()),
        **devices(patcher),
    }


def encoder(clip: Any) -> dict[str, str]:
    network = clip.cond_stage_model.qwen3_4b.transformer
    weight = dict(network.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    computed = clip.patcher.object_patches.get("manual_cast_dtype")
    return {"stored": described(weight), "computed": str(computed), **devices(clip.patcher)}


def vae(loaded: Any) -> dict[str, str]:
    weight = dict(loaded.first_stage_model.named_parameters())["decoder.conv_in.weight"]
    output = getattr(loaded, "vae_output_dtype", lambda: None)()
    said = {"stored": described(weight), "dtype": str(loaded.vae_dtype), "output": f"{output} {loaded.output_device}"}
    return {**said, **devices(loaded.patcher)}


def described(weight: torch.Tensor) -> str:
    return f"{weight.dtype} {weight.device.type} {getattr(weight, '_layout_cls', '')}".strip()


def devices(patcher: Any) -> dict[str, str]:
    return {"load": str(patcher.load_device), "offload": str(patcher.offload_device)}


def sampled(pack: Any) -> list[str]:
    """Type and place of latents: our sampler's and the stock one's, on our model."""
    import nodes

    loaded = pack.bridge.model.load_model(NANO)
    cond = [[torch.randn(1, 9, 128), {}]]
    ours = two_devices.sample(pack, loaded, cond)
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    stock = nodes.common_ksampler(loaded, 3, 1, 1.0, "euler", "simple", cond, cond, latent)[0]["samples"]
    return [f"{latents.dtype} {latents.device} {bool(latents.isfinite().all())}" for latents in (ours, stock)]


def survives(pack: Any, folder: Path, place: Path) -> bool:
    """Everything that was loaded is still there when all files have been emptied in place."""
    snapshot = Path(shutil.copytree(NANO, place / "mine"))
    lora = place / "lora.safetensors"
    name = "diffusion_model.layers.1.attention.to_q"
    te = "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 192), f"{name}.lora_B.weight": torch.ones(192, 2)}
    factors |= {f"{te}.lora_A.weight": torch.ones(2, 128), f"{te}.lora_B.weight": torch.ones(128, 2)}
    save_file(factors, lora)
    pack.bridge.folders.lora_path = lambda _name: lora
    scaled = Path(shutil.copy(folder / "our_scaled.safetensors", place / "mine.safetensors"))
    clip, loaded = pack.bridge.clip.load_clip(snapshot), pack.bridge.model.load_model(snapshot)
    packed = pack.bridge.model.load_model(scaled)
    autoencoder = pack.bridge.vae.ZImageVAE(snapshot)
    patched = pack.bridge.lora.add_lora(loaded, clip, "lora", 1.0, 1.0)
    for file in [lora, scaled, *snapshot.rglob("*.safetensors")]:
        file.write_bytes(b"")
    parts = [packed.model, loaded.model, clip.cond_stage_model, autoencoder.first_stage_model]
    parts_finite = all(bool(p.float().isfinite().all()) for part in parts for p in part.parameters())
    patchers = [patched[0], patched[1].patcher]
    tensors = [t for one in patchers for keys in one.patches.values() for e in keys[0][1].weights for t in e[2]]
    return parts_finite and len(tensors) == 4 and all(bool((t == 1).all()) for t in tensors)


# Files


def vae_config() -> dict[str, Any]:
    size = {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "resolution": 64}
    channels = {"z_channels": 16, "in_channels": 3, "out_ch": 3, "double_z": True}
    return {"params": {"ddconfig": {**channels, **size}, "embed_dim": 16}}


def stock_clip(folder: Path) -> Any:
    import comfy.sd

    return comfy.sd.load_clip([str(folder / "stock_encoder.safetensors")], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


def make_files(folder: Path) -> None:
    import comfy.ldm.models.autoencoder
    import comfy.ops
    import comfy.text_encoders.llama as llama

    peak_memory.TOY = {"dim": 256, "n_heads": 2, "n_layers": 1, "n_refiner_layers": 1, "cap_feat_dim": 128}
    with peak_memory.detected_as_z_image():
        import comfy.model_detection

        config = comfy.model_detection.model_config_from_unet({}, "")
    config.set_inference_dtype(torch.bfloat16, None)
    network = config.get_model({}, "").diffusion_model
    weights = {name: torch.full_like(weight, 0.01) for name, weight in network.state_dict().items()}
    save_file(weights, folder / "stock_transformer.safetensors")
    save_file(scaled(weights), folder / "stock_scaled.safetensors")
    (ours,) = (NANO / "transformer").glob("*.safetensors")
    text = {"zimage.transformer.config": (NANO / "transformer" / "config.json").read_text()}
    save_file(scaled(load_file(ours)), folder / "our_scaled.safetensors", text)

    sizes = {"vocab_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
    llama.Qwen3_4BConfig = functools.partial(llama.Qwen3_4BConfig, **sizes, num_key_value_heads=1)
    qwen = llama.Qwen3_4B({}, torch.bfloat16, torch.device("cpu"), comfy.ops.disable_weight_init)
    save_file({k: torch.zeros_like(v) for k, v in qwen.state_dict().items()}, folder / "stock_encoder.safetensors")
    autoencoder = comfy.ldm.models.autoencoder.AutoencoderKL(**vae_config()["params"])
    save_file({k: v.clone() for k, v in autoencoder.state_dict().items()}, folder / "stock_vae.safetensors")


def scaled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The feed-forwards in fp8 with scales."""
    found = dict(weights)
    for name in [name for name in weights if ".feed_forward." in name]:
        found[name] = weights[name].to(torch.float8_e4m3fn)
        found[name.removesuffix("weight") + "weight_scale"] = torch.tensor(1.0)
        marker = json.dumps({"format": "float8_e4m3fn"}).encode()
        found[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
    return found


if __name__ == "__main__":
    main()
