"""Trains a LoRA for the nano model: the moon, a shape that the model was never shown. Writes one safetensors file.

python -m nano.train_lora --minutes 25 --out nano/zimage_nano_moon.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from zimage_core.model.tokenizer import Tokenizer
from zimage_core.pipeline import ZImagePipeline

from . import captions, evaluate, latents, scenes, train_text
from .optim import autocast, rate, save_atomically
from .train import noise_levels, object_weights, plain_attention

SHAPE = "moon"
RANK = 8  # alpha is the same: scale 1
BATCH = 32
POOL = 6000  # images, half of them with a moon: the others keep the model as it was
LR = 3e-3
OUT = Path(__file__).parent / "zimage_nano_moon.safetensors"


class Adapted(nn.Module):
    """Both networks with a low-rank change of every matrix in their blocks; only the changes are trained."""

    def __init__(self, pipe: ZImagePipeline, seed: int = 0):
        super().__init__()
        self.networks = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}).float()
        self.networks.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}  # name of a weight -> (down, up)
        for name, weight in self.networks.named_parameters():
            if weight.ndim == 2 and "layers." in name.replace("refiner.", "layers.") and "adaLN" not in name:
                out, features = weight.shape
                down = torch.randn(RANK, features, generator=generator) * features**-0.5
                self.pairs[name] = (nn.Parameter(down), nn.Parameter(torch.zeros(out, RANK)))
        self.changes = nn.ParameterList(part for pair in self.pairs.values() for part in pair)

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor, lengths: list[int]) -> Tensor:
        """Velocity [B, 16, h, w] towards the image."""
        weights = dict(self.networks.named_parameters())
        changed = {name: weights[name] + up @ down for name, (down, up) in self.pairs.items()}
        features = self._call("text_encoder", changed, ids)
        caps = [item[:length] for item, length in zip(features, lengths, strict=True)]
        return self._call("transformer", changed, noisy, t, caps, attention=plain_attention)

    def _call(self, network: str, changed: dict[str, Tensor], *inputs: object, **settings: object) -> Tensor:
        own = {name.removeprefix(f"{network}."): w for name, w in changed.items() if name.startswith(f"{network}.")}
        return functional_call(self.networks[network], own, inputs, settings)

    def file(self) -> dict[str, Tensor]:
        """The changes under the names that PEFT gives them, bfloat16."""
        prefixes = {"transformer": "diffusion_model", "text_encoder": "text_encoder"}
        stored = {}
        for name, pair in self.pairs.items():
            network, _, rest = name.removesuffix(".weight").partition(".")
            for letter, part in zip("AB", pair, strict=True):
                stored[f"{prefixes[network]}.{rest}.lora_{letter}.weight"] = part.detach().bfloat16().contiguous()
        return stored


def moon_scene(rng: random.Random, *, width: int = scenes.SIZE, height: int = scenes.SIZE) -> scenes.Scene:
    """A scene like those of training in which the object, one of the two, or all equal ones are moons."""
    scene = scenes.sample(rng, width=width, height=height, allowed=lambda color, shape: True)
    chosen = {rng.randrange(2)} if scene.kind == "pair" else range(len(scene.items))
    items = [dataclasses.replace(item, shape=SHAPE) if i in chosen else item for i, item in enumerate(scene.items)]
    objects = [(color, SHAPE) if i in chosen else (color, shape) for i, (color, shape) in enumerate(scene.objects)]
    return dataclasses.replace(scene, items=tuple(items), objects=tuple(objects))


def moon_cases(count: int) -> list[evaluate.Case]:
    """Prompts with moons, from generator seeds that training never draws."""
    drawn = []
    for index in range(count):
        rng = random.Random(f"evaluate {SHAPE} {index}")
        scene = moon_scene(rng)
        drawn.append(evaluate.Case(captions.describe(scene, rng), scene, index))
    return drawn


def train(minutes: float, snapshot: Path, out: Path, seed: int = 0) -> None:
    """Writes `out`; a run that was stopped goes on from `out` with the suffix .state."""
    pipe = ZImagePipeline.from_pretrained(snapshot, dtype=torch.float32)
    state_file = out.with_suffix(".state")
    adapted = Adapted(pipe, seed)
    adam = torch.optim.AdamW(adapted.changes, lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
    before, step = 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        adapted.changes.load_state_dict(state["changes"])
        adam.load_state_dict(state["adam"])
        before, step = state["seconds"], state["step"]
    drawn, clean = _pool(pipe, seed)
    rng = random.Random(f"{SHAPE} {seed} {step}")
    torch.manual_seed(rng.randrange(2**31))
    start, done, losses = time.monotonic() - before, before / (60 * minutes), []
    while done < 1:
        chosen = [rng.randrange(len(drawn)) for _ in range(BATCH)]
        loss = _loss(adapted, pipe.tokenizer, clean[chosen].float(), [_caption(pipe, drawn[i], rng) for i in chosen])
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(adapted.changes, 1.0)
        seconds = time.monotonic() - start
        done = seconds / (60 * minutes)
        adam.param_groups[0]["lr"] = LR * rate(done, step, hold=0.4, floor=0.01)
        adam.step()
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            print(f"lora {seconds:5.0f} s  step {step}  loss {sum(losses[-100:]) / 100:.4f}", flush=True)
            state = {"changes": adapted.changes.state_dict(), "adam": adam.state_dict()}
            save_atomically({**state, "seconds": seconds, "step": step}, state_file)
    metadata = {
        "format": "pt",
        "modelspec.architecture": "z-image-nano/lora",
        "modelspec.title": "Z-Image-Nano moon",
        "modelspec.trigger_phrase": SHAPE,
        "training": json.dumps({"steps": step, "batch": BATCH, "rank": RANK, "seed": seed}),
    }
    temporary = out.with_name(out.name + ".part")
    save_file(adapted.file(), temporary, metadata=metadata)
    os.replace(temporary, out)
    state_file.unlink(missing_ok=True)


def _pool(pipe: ZImagePipeline, seed: int) -> tuple[list[scenes.Scene], Tensor]:
    rng = random.Random(f"{SHAPE} pool {seed}")
    drawn = [moon_scene(rng) if i % 2 else scenes.sample(rng) for i in range(POOL)]
    with torch.no_grad():
        parts = [latents.encode(pipe.vae, drawn[at : at + BATCH], torch.device("cpu")) for at in range(0, POOL, BATCH)]
    return drawn, torch.cat(parts)


def _caption(pipe: ZImagePipeline, scene: scenes.Scene, rng: random.Random) -> str:
    while True:
        text = captions.caption(scene, rng)
        if len(pipe.tokenizer(text)) <= 32:  # one block: no caption is masked
            return text


def _loss(adapted: Adapted, tokenizer: Tokenizer, clean: Tensor, texts: list[str]) -> Tensor:
    sigma = noise_levels(len(clean))
    level = sigma.view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    ids, lengths = train_text.token_batch(tokenizer, texts)
    with autocast("cpu"):
        velocity = adapted(level * noise + (1 - level) * clean, 1 - sigma, ids, lengths)
    error = (velocity.float() - (clean - noise)).square().mean(1)  # (B, h, w)
    weights = object_weights(clean)
    return (error * weights).mean() / weights.mean()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--snapshot", type=Path, default=evaluate.SNAPSHOT)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    train(a.minutes, a.snapshot, a.out, a.seed)
