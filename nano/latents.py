"""Encodes training scenes once: the transformer's training then reads latents instead of drawing images.

python -m nano.latents --vae runs/vae.pt --out runs/latents --part 0 --parts 2
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from zimage_core.model.vae import AutoencoderKL

from . import scenes
from .optim import autocast, save_atomically
from .train_vae import CONFIG

MAIN = (scenes.SIZE, scenes.SIZE)
# width, height: token counts that are multiples of 32 and not, from 64 to 256 pixels
OTHERS = (
    (64, 64),
    (96, 96),
    (96, 128),
    (128, 96),
    (128, 160),
    (160, 128),
    (128, 192),
    (192, 128),
    (192, 192),
    (256, 192),
    (256, 256),
)
BLURRED = 0.03  # share of scenes that are out of focus and captioned so


def training_scene(seed: int, width: int, height: int, index: int) -> scenes.Scene:
    """Scene `index` of the training set; evaluation draws from seeds of other names."""
    rng = random.Random(f"train {seed} {width}x{height} {index}")
    scene = scenes.sample(rng, width=width, height=height)
    return dataclasses.replace(scene, blurred=True) if rng.random() < BLURRED else scene


@torch.no_grad()
def encode(vae: AutoencoderKL, drawn: list[scenes.Scene], device: torch.device) -> Tensor:
    """Scaled latents [B, 16, h, w] float16 of scenes of one size."""
    image = scenes.draw(drawn).to(device)
    if device.type == "cpu":
        image = image.contiguous(memory_format=torch.channels_last)
    with autocast(device.type):
        raw = vae.encode(image)
    return vae.scale(raw.float()).half().cpu()


def make(vae_file: Path, folder: Path, *, count: int, count_other: int, seed: int, part: int, parts: int) -> None:
    """Writes one file per size with every `parts`-th scene, the first being `part`; files that exist are kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    vae = AutoencoderKL(CONFIG)
    vae.load_state_dict(torch.load(vae_file, weights_only=True))
    vae.to(device, memory_format=torch.channels_last).eval()
    folder.mkdir(parents=True, exist_ok=True)
    for width, height in (MAIN, *OTHERS):
        path = folder / f"{width}x{height}.{part}.pt"
        if path.exists():
            continue
        start = time.monotonic()
        indices = list(range(part, count if (width, height) == MAIN else count_other, parts))
        batch = max(1, 32 * scenes.SIZE**2 // (width * height))
        encoded = [
            encode(vae, [training_scene(seed, width, height, i) for i in indices[at : at + batch]], device)
            for at in range(0, len(indices), batch)
        ]
        save_atomically(
            {"seed": seed, "size": (width, height), "indices": indices, "latents": torch.cat(encoded)}, path
        )
        print(f"latents {width}x{height}: {len(indices)} in {time.monotonic() - start:.0f} s", flush=True)


def load(folder: Path) -> dict[tuple[int, int], tuple[Tensor, list[scenes.Scene]]]:
    """(width, height) -> latents [n, 16, h, w] float16 and their scenes, of all parts."""
    pools: dict[tuple[int, int], tuple[list[Tensor], list[scenes.Scene]]] = {}
    for path in sorted(folder.glob("*.pt")):
        stored = torch.load(path, weights_only=True)
        width, height = stored["size"]
        latents, drawn = pools.setdefault((width, height), ([], []))
        latents.append(stored["latents"])
        drawn += [training_scene(stored["seed"], width, height, index) for index in stored["indices"]]
    return {size: (torch.cat(latents), drawn) for size, (latents, drawn) in pools.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24000)
    parser.add_argument("--count-other", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    a = parser.parse_args()
    make(a.vae, a.out, count=a.count, count_other=a.count_other, seed=a.seed, part=a.part, parts=a.parts)
