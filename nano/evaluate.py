"""Measures a nano snapshot against its bars; writes nano/scores.json and the table of the model card.

python -m nano.evaluate
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zimage_core.pipeline import ZImagePipeline

from . import captions, export, judge, scenes
from .optim import psnr

HERE = Path(__file__).parent
SNAPSHOT = HERE / "snapshot"
STEPS = 8
BATCH = 20  # prompts per call
# what must hold, as shares of the prompts that say it: (set, guidance) -> attribute -> lowest share
_ALWAYS = {"background": 0.97, "color": 0.97, "place": 0.97, "relation": 0.97, "count": 0.95}
BARS: dict[tuple[str, float], dict[str, float]] = {
    ("seen", 0.0): {**_ALWAYS, "shape": 0.85},
    ("seen", 2.0): {**_ALWAYS, "shape": 0.92},
    ("held out", 2.0): {"color": 0.97, "shape": 0.75},
}
VAE_BAR = 36.0  # dB, mean PSNR
SIZE_BAR = 16e6  # bytes, the whole snapshot
SECONDS_BAR = 1.0  # a 128x128 image in 8 steps on two CPU cores
ATTRIBUTES = ("background", "color", "shape", "count", "place", "relation", "size", "all")
BEGIN, END = "<!-- scores: written by nano/evaluate.py -->", "<!-- end of scores -->"


@dataclass(frozen=True)
class Case:
    """One prompt of an evaluation, the scene that it describes and the seed of its image."""

    prompt: str
    scene: scenes.Scene
    seed: int


def cases(count: int, *, held_out: bool = False, width: int = scenes.SIZE, height: int = scenes.SIZE) -> list[Case]:
    """Prompts from generator seeds that training never draws; `held_out` ones name only pairs it never showed."""
    drawn = []
    for index in range(count):
        rng = random.Random(f"evaluate {'held out' if held_out else 'seen'} {width}x{height} {index}")
        scene = scenes.sample(
            rng, width=width, height=height, allowed=lambda color, shape: scenes.held_out(color, shape) == held_out
        )
        drawn.append(Case(captions.describe(scene, rng), scene, index))
    return drawn


def images(
    pipe: ZImagePipeline, chosen: Sequence[Case], guidance: float, progress: Callable[[int], None] | None = None
) -> Tensor:
    """The model's images for cases of one size: [len(chosen), 3, H, W] in 0..1."""
    made = []
    for at in range(0, len(chosen), BATCH):
        part = chosen[at : at + BATCH]
        scene = part[0].scene
        latents = pipe.generate(
            [case.prompt for case in part],
            width=scene.width,
            height=scene.height,
            steps=STEPS,
            guidance_scale=guidance,
            seed=[case.seed for case in part],
            output="latents",
        )
        made.append(pipe.decode(latents))
        if progress is not None:
            progress(at + len(part))
    return torch.cat(made)


def shares(images: Tensor, chosen: Sequence[Case]) -> dict[str, float]:
    """Of each attribute, the share of the prompts saying it whose image has it right."""
    marks = [judge.mark(image, case.scene) for image, case in zip(images, chosen, strict=True)]
    said = {name: [mark[name] for mark in marks if name in mark] for name in ATTRIBUTES}
    return {name: sum(right) / len(right) for name, right in said.items() if right}


def failures(found: dict[str, float], bars: dict[str, float]) -> list[str]:
    """The bars that are missed, in words."""
    return [f"{name} {found[name]:.3f} < {bar}" for name, bar in bars.items() if found[name] < bar]


@torch.inference_mode()
def reconstruction(pipe: ZImagePipeline, count: int = 100) -> float:
    """Mean PSNR in dB of new scenes through encoder and decoder."""
    rng = random.Random("evaluate vae")
    image = scenes.draw([scenes.sample(rng, allowed=lambda color, shape: True) for _ in range(count)])
    decoded = torch.cat([pipe.vae.decode(pipe.vae.encode(part)) for part in image.split(10)])
    return psnr(decoded.clamp(-1, 1), image).mean().item()


def seconds_per_image(pipe: ZImagePipeline) -> float:
    """The median wall time of one 128x128 image, as the machine is."""
    times = []
    for seed in range(5):
        start = time.monotonic()
        pipe.generate(
            "a red circle on a blue background", width=scenes.SIZE, height=scenes.SIZE, steps=STEPS, seed=seed
        )
        times.append(time.monotonic() - start)
    return sorted(times)[2]


def measure(snapshot: Path, count: int) -> dict[str, object]:
    """All scores of a snapshot, each set with `count` prompts (other sizes with a fifth of it)."""
    pipe = ZImagePipeline.from_pretrained(snapshot)
    sets: dict[str, dict[str, float]] = {}
    for held_out, guidance in ((False, 0.0), (False, 2.0), (True, 0.0), (True, 2.0)):
        chosen = cases(count, held_out=held_out)
        found = shares(images(pipe, chosen, guidance), chosen)
        sets[f"{'held-out' if held_out else 'seen'} pairs, guidance {guidance:g}"] = found
        print(guidance, "held out" if held_out else "seen", found, flush=True)
    for width, height in ((96, 128), (192, 128), (64, 64), (256, 256)):
        chosen = cases(max(1, count // 5), width=width, height=height)
        found = shares(images(pipe, chosen, 0.0), chosen)
        sets[f"{width}x{height} pixels, guidance 0"] = found
        print(width, height, found, flush=True)
    return {
        "prompts": count,
        "steps": STEPS,
        "sets": {name: {key: round(share, 4) for key, share in found.items()} for name, found in sets.items()},
        "vae_psnr_db": round(reconstruction(pipe), 2),
        "megabytes": round(export.size(snapshot) / 1e6, 2),
        "seconds_per_image": round(seconds_per_image(pipe), 3),
    }


def table(scores: dict) -> str:
    """The scores as Markdown."""
    lines = [
        f"| {scores['prompts']} prompts a set ({scores['prompts'] // 5} for other sizes), {scores['steps']} steps | "
        + " | ".join(ATTRIBUTES)
        + " |",
        "|---|" + "---:|" * len(ATTRIBUTES),
    ]
    for name, found in scores["sets"].items():
        cells = [f"{100 * found[key]:.1f} %" if key in found else "" for key in ATTRIBUTES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"VAE reconstruction {scores['vae_psnr_db']:.1f} dB PSNR on average; the snapshot is "
        f"{scores['megabytes']:.1f} MB; a 128x128 image took {scores['seconds_per_image']:.2f} s on two CPU cores.",
    ]
    return "\n".join(lines)


def write_card(scores: dict, card: Path) -> None:
    """Puts the table between the two marks of the model card."""
    text = card.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{card}: the marks {BEGIN!r} and {END!r} are missing; the scores belong between them")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    card.write_text(f"{head}{BEGIN}\n{table(scores)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshot", type=Path, default=SNAPSHOT)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    arguments = parser.parse_args()
    measured = measure(arguments.snapshot, arguments.count)
    print(table(measured))
    if not arguments.dry:
        (HERE / "scores.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        write_card(measured, HERE / "README.md")
