"""Trains a control network for the nano model: white outlines on black say what is where. Writes one safetensors file.

It is built as Fun-Controlnet-Union 2.1, with one block in the refiner and one over the layers, and repaints as well.

python -m nano.train_control --minutes 30 --out nano/zimage_nano_control.safetensors
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
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from zimage_core.config import ControlConfig
from zimage_core.model.control import ActiveControl, ControlNetwork, control_latents
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights.snapshot import open_component

from . import captions, evaluate, latents, scenes, train_text
from .optim import Average, autocast, rate, save_atomically
from .train import noise_levels, object_weights, plain_attention

BATCH = 32
POOL = 2000
LR = 1.5e-3
REPAINTED = 0.3  # share of the examples that say what to keep; half of these without outlines
OTHERWISE = 0.3  # share of the captions that speak of other shapes and places
OUT = Path(__file__).parent / "zimage_nano_control.safetensors"


def config_of(transformer: ZImageTransformer) -> ControlConfig:
    own = transformer.config
    return ControlConfig(
        own.dim, own.n_heads, own.norm_eps, in_channels=33, places=(0,), n_refiner_layers=1, refined="hints"
    )


def build(transformer: ZImageTransformer) -> ControlNetwork:
    """A network that begins with the transformer's own first blocks and steers nothing."""
    network = ControlNetwork(config_of(transformer))
    network.noise_refiner[0].load_state_dict(transformer.noise_refiner[0].state_dict(), strict=False)
    network.layers[0].load_state_dict(transformer.layers[0].state_dict(), strict=False)
    nn.init.normal_(network.x_embedder.weight, std=0.05)
    nn.init.zeros_(network.x_embedder.bias)
    for block in (network.noise_refiner[0], network.layers[0]):
        nn.init.zeros_(block.after_proj.weight)
        nn.init.zeros_(block.after_proj.bias)
        nn.init.eye_(block.before_proj.weight)
        nn.init.zeros_(block.before_proj.bias)
    return network


def outlines(drawn: list[scenes.Scene], reach: int = 1) -> Tensor:
    """White lines, 2 * reach pixels wide, on black around what is drawn: [B, 3, H, W] in 0..1."""
    inside = (scenes.cover(drawn, 1) > 0.5).float().unsqueeze(1)
    around, core = (F.max_pool2d(x, 2 * reach + 1, 1, reach) for x in (inside, 1 - inside))
    return (around + core - 1).clamp(0, 1).expand(-1, 3, -1, -1)


def holes(rng: random.Random, count: int, height: int, width: int) -> Tensor:
    """1 where to repaint: boxes of a third to all of each side, [count, 1, height, width] pixels."""
    masks = torch.zeros(count, 1, height, width)
    for mask in masks:
        tall, wide = (rng.randrange(side // 3, side + 1) for side in (height, width))
        top, left = rng.randrange(height - tall + 1), rng.randrange(width - wide + 1)
        mask[:, top : top + tall, left : left + wide] = 1
    return masks


class Pool:
    """Scenes with all that is shown of them, encoded once."""

    def __init__(self, pipe: ZImagePipeline, seed: int, count: int = POOL):
        rng = random.Random(f"control pool {seed}")
        self.scenes = [scenes.sample(rng, allowed=lambda color, shape: True) for _ in range(count)]
        parts: dict[str, list[Tensor]] = {"clean": [], "outlines": [], "masked": [], "keep": []}
        for at in range(0, count, BATCH):
            drawn = self.scenes[at : at + BATCH]
            hole = holes(rng, len(drawn), scenes.SIZE, scenes.SIZE)
            parts["clean"].append(latents.encode(pipe.vae, drawn, torch.device("cpu")))
            parts["outlines"].append(self._encode(pipe, outlines(drawn, rng.choice((1, 1, 2))) * 2 - 1))
            parts["masked"].append(self._encode(pipe, scenes.draw(drawn) * (1 - hole)))
            parts["keep"].append(F.interpolate(1 - hole, scale_factor=1 / 8, mode="nearest"))
        self.parts = {name: torch.cat(found) for name, found in parts.items()}

    @staticmethod
    @torch.no_grad()
    def _encode(pipe: ZImagePipeline, image: Tensor) -> Tensor:
        with autocast("cpu"):
            raw = pipe.vae.encode(image)
        return pipe.vae.scale(raw.float()).half()

    def draw(self, rng: random.Random, config: ControlConfig) -> tuple[list[scenes.Scene], Tensor, Tensor]:
        """Scenes, their latents, and what the control network reads: half keep what no hole covers, or less."""
        chosen = [rng.randrange(len(self.scenes)) for _ in range(BATCH)]
        clean, lines, masked, keep = (self.parts[name][chosen].float() for name in self.parts)
        repaints = torch.tensor([rng.random() < REPAINTED for _ in chosen])[:, None, None, None]
        outlined = torch.tensor([rng.random() < 0.5 for _ in chosen])[:, None, None, None] | ~repaints
        read = control_latents(lines * outlined, keep * repaints, masked * repaints, config)
        return [self.scenes[i] for i in chosen], clean, read


def train(minutes: float, snapshot: Path, out: Path, seed: int = 0, begin: Path | None = None) -> None:
    """Writes `out`; a run that was stopped goes on from `out` with the suffix .state. begin: a file to improve."""
    torch.manual_seed(seed)
    pipe = ZImagePipeline.from_pretrained(snapshot, dtype=torch.float32)
    pipe.transformer.requires_grad_(False)
    network = build(pipe.transformer)
    if begin is not None:
        network.load_state_dict(open_component(begin, "control").state_dict(torch.float32))
    average = Average(network, 0.995)
    adam = torch.optim.AdamW(network.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    state_file = out.with_suffix(".state")
    before, step = 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        average.module.load_state_dict(state["average"])
        adam.load_state_dict(state["adam"])
        average.steps, before, step = state["step"], state["seconds"], state["step"]
    pool = Pool(pipe, seed)
    rng = random.Random(f"control {seed} {step}")
    torch.manual_seed(rng.randrange(2**31))
    start, done, losses = time.monotonic() - before, before / (60 * minutes), []
    while done < 1:
        drawn, clean, read = pool.draw(rng, network.config)
        loss = _loss(pipe, network, clean, read, [_caption(pipe, scene, rng) for scene in drawn])
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        seconds = time.monotonic() - start
        done = seconds / (60 * minutes)
        adam.param_groups[0]["lr"] = LR * rate(done, step, hold=0.5, floor=0.01)
        adam.step()
        average.update(network)
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            print(f"control {seconds:5.0f} s  step {step}  loss {sum(losses[-100:]) / 100:.4f}", flush=True)
            state = {"network": network.state_dict(), "average": average.module.state_dict(), "adam": adam.state_dict()}
            save_atomically({**state, "seconds": seconds, "step": step}, state_file)
    metadata = {
        "format": "pt",
        "modelspec.architecture": "z-image-nano/control",
        "modelspec.title": "Z-Image-Nano outlines",
        "training": json.dumps({"steps": step, "batch": BATCH, "seed": seed}),
        "zimage.control.config": json.dumps(published(network.config)),
    }
    temporary = out.with_name(out.name + ".part")
    save_file(file_of(average.module), temporary, metadata=metadata)
    os.replace(temporary, out)
    state_file.unlink(missing_ok=True)


def published(config: ControlConfig) -> dict[str, object]:
    """As diffusers writes it into a config.json."""
    return {
        "_class_name": "ZImageControlNetModel",
        "all_patch_size": [config.patch_size],
        "dim": config.dim,
        "n_heads": config.n_heads,
        "norm_eps": config.norm_eps,
        "control_in_dim": config.in_channels,
        "control_layers_places": list(config.places),
        "n_refiner_layers": config.n_refiner_layers,
        "add_control_noise_refiner": "control_noise_refiner",
    }


def file_of(network: nn.Module) -> dict[str, Tensor]:
    """The weights by their published names, bfloat16."""
    stored = {}
    for name, value in network.state_dict().items():
        name = name.replace("x_embedder.", "all_x_embedder.2-1.").replace("attention.out.", "attention.to_out.0.")
        name = f"control_{name}".replace("q_norm", "norm_q").replace("k_norm", "norm_k")
        if "qkv" in name:
            parts = zip("qkv", value.chunk(3), strict=True)
            stored |= {name.replace("qkv", f"to_{part}"): rows.bfloat16().clone() for part, rows in parts}
        else:
            stored[name] = value.bfloat16().contiguous()
    return stored


def _caption(pipe: ZImagePipeline, scene: scenes.Scene, rng: random.Random) -> str:
    """Often one that leaves open what the outlines say, or speaks against it: then they count."""
    while True:
        told = _otherwise(scene, rng) if rng.random() < OTHERWISE else scene
        text = captions.caption(told, rng, empty=0.2, short=0.45)
        if len(pipe.tokenizer(text)) <= 32:  # one block: no caption is masked
            return text


def _otherwise(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """Other shapes in other places, in the colors of a scene."""
    other = scenes.sample(rng)
    colors = [color for color, _ in scene.objects]
    objects = tuple((colors[i % len(colors)], shape) for i, (_, shape) in enumerate(other.objects))
    return dataclasses.replace(other, objects=objects, background_name=scene.background_name)


def _loss(pipe: ZImagePipeline, network: ControlNetwork, clean: Tensor, read: Tensor, texts: list[str]) -> Tensor:
    sigma = noise_levels(len(clean))
    level = sigma.view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    ids, lengths = train_text.token_batch(pipe.tokenizer, texts)
    with autocast("cpu"):
        with torch.no_grad():
            features = pipe.text_encoder(ids)
        caps = [item[:length] for item, length in zip(features, lengths, strict=True)]
        noisy = level * noise + (1 - level) * clean
        controls = [ActiveControl(network, read, 1.0)]
        velocity = pipe.transformer(noisy, 1 - sigma, caps, attention=plain_attention, controls=controls)
    error = (velocity.float() - (clean - noise)).square().mean(1)  # (B, h, w)
    weights = object_weights(clean)
    return (error * weights).mean() / weights.mean()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--snapshot", type=Path, default=evaluate.SNAPSHOT)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=Path, help="an earlier file, to train further")
    a = parser.parse_args()
    train(a.minutes, a.snapshot, a.out, a.seed, a.begin)
