"""The autoencoder: ours, as a whole and in bands, diffusers' and ComfyUI's, on the same random weights.

    python -m benchmarks.vae                              # 512² and 1024²
    python -m benchmarks.vae --size 2048 --decode-only --repeats 1 --without diffusers --without native

Everything in float32 on a CPU, as all three do there; `benchmarks.gpu` has them in bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nano.export import published_vae
from zimage_core.config import VAEConfig
from zimage_core.model import vae_bands
from zimage_core.model.vae import AutoencoderKL

from . import memory, models, results, timing

PUBLISHED = json.loads((models.ROOT / "tests" / "published_configs.json").read_text())["vae"]
SIZES = (512, 1024)
BLOCKS = {"Down": "Encoder", "Up": "Decoder"}  # as diffusers names them


def core(toy: bool, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """Ours, with random weights."""
    config = {**PUBLISHED, **({"block_out_channels": [32, 64, 64, 64]} if toy else {})}
    torch.manual_seed(0)
    return AutoencoderKL(VAEConfig.from_dict(config, "here"), device=device, dtype=dtype).requires_grad_(False).eval()


def diffusers(ours: AutoencoderKL) -> nn.Module:
    """diffusers' AutoencoderKL on these weights."""
    config = {name: value for name, value in PUBLISHED.items() if not name.startswith("_")}
    channels = ours.config.block_out_channels
    kinds = {f"{kind.lower()}_block_types": [f"{kind}{name}Block2D"] * len(channels) for kind, name in BLOCKS.items()}
    config |= {"block_out_channels": channels, **kinds}
    with torch.device("meta"):
        model = importlib.import_module("diffusers").AutoencoderKL(**config)
    model.load_state_dict(published_vae(ours.state_dict()), strict=True, assign=True)
    return model.requires_grad_(False).eval()


def native(ours: AutoencoderKL) -> nn.Module:
    """ComfyUI's own module on these weights, as its VAE loader makes it."""
    models.pack(cpu=next(ours.parameters()).device.type == "cpu")
    channels = ours.config.block_out_channels
    numbers = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": channels[0]}
    numbers |= {"ch_mult": [width // channels[0] for width in channels], "num_res_blocks": 2, "attn_resolutions": []}
    module = importlib.import_module("comfy.ldm.models.autoencoder").AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": numbers},
        decoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Decoder", "params": numbers},
    )
    module.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return module.requires_grad_(False).eval()


def inputs(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Raw latents [1, 16, size/8, size/8] and an image [1, 3, size, size] in -1..1."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(1, 16, size // 8, size // 8, generator=generator)
    image = torch.rand(1, 3, size, size, generator=generator).mul(2).sub(1)
    return raw.to(device, dtype), image.to(device, dtype)


def calls(vae: AutoencoderKL, raw: Tensor, image: Tensor) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Direction -> implementation -> call."""
    decode = {"core": lambda: vae.decode(raw), "core in bands": lambda: vae_bands.decode(vae, raw)}
    encode = {"core": lambda: vae.encode(image), "core in bands": lambda: vae_bands.encode(vae, image)}
    theirs, stock = diffusers(vae), native(vae)
    decode |= {"diffusers": lambda: theirs.decode(raw).sample, "native": lambda: stock.decode(raw)}
    encode |= {"diffusers": lambda: theirs.encode(image).latent_dist.mode(), "native": lambda: stock.encode(image)}
    return {"decode": decode, "encode": encode}


@torch.inference_mode()
def main(a: argparse.Namespace) -> None:
    device, dtype = torch.device("cpu"), torch.float32
    vae = core(a.toy, device, dtype)
    table: list[list[str]] = []
    for size in a.size or ([64] if a.toy else SIZES):
        for direction, found in calls(vae, *inputs(size, device, dtype)).items():
            if direction == "encode" and a.decode_only:
                continue
            chosen = {name: call for name, call in found.items() if name not in a.without}
            table += rows(f"{direction} {size}²", chosen, a.repeats, device, dtype)
    text = f"{dtype}, medians of {a.repeats} in seconds. Memory is what a call needs beside the weights.\n\n".replace(
        "torch.", ""
    )
    text += timing.table(COLUMNS, table)
    print(text)
    if not a.toy:
        results.write("vae, cpu" if not a.size else f"vae of {a.size[0]}, cpu", "vae", text)


COLUMNS = ["", "implementation", ">seconds", ">to the first (range)", ">MB", ">differs from it"]


def rows(
    name: str, found: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device, dtype: torch.dtype
) -> list[list[str]]:
    peaks, off, first, times = {}, {}, None, {}
    for label, call in found.items():
        kept: list[Tensor] = []
        with memory.peak(device) as peak:
            times[label] = [timing.seconds(lambda call=call, kept=kept: kept.append(call()), device)]
        result = kept.pop().float()
        first = result if first is None else first
        peaks[label], off[label] = peak[0], (result - first).abs().max().item()
        tolerance = 1e-3 if dtype == torch.float32 else 0.2
        if not off[label] <= tolerance * max(1.0, first.abs().max().item()):
            raise AssertionError(f"{name}: {label} differs by {off[label]:.2g}")
    if repeats > 1:  # else the first call counts, as what takes minutes needs no warm-up
        times = timing.alternating(found, repeats, device)
    base = next(iter(found))
    table = []
    for label in found:
        to = timing.ratio(times, label, base) if label != base else ""
        table.append([name, label, f"{statistics.median(times[label]):.3g}", to, f"{peaks[label] / 1e6:,.0f}"])
        table[-1].append(f"{off[label]:.1e}" if label != base else "")
        print("|", " | ".join(table[-1]), "|", flush=True)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, action="append", help="only this size, in a section of its own; repeatable")
    parser.add_argument("--without", action="append", default=[], help="an implementation to leave out; repeatable")
    parser.add_argument("--decode-only", action="store_true")
    parser.add_argument("--toy", action="store_true", help="tiny and not written down: does the script work?")
    main(parser.parse_args())
