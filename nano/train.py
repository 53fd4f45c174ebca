"""Trains the nano transformer, and the text encoder with it, by flow matching on encoded scenes.

Stage "learn" shows mostly 128x128 images, stage "sizes" mostly others.

    torchrun --nproc-per-node 2 -m nano.train --minutes 60 --runs runs
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear

from zimage_core.config import TransformerConfig
from zimage_core.model.text_encoder import TextEncoder
from zimage_core.model.tokenizer import Tokenizer
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.sampling.schedule import shifted

from . import captions, latents, scenes, train_text
from .optim import Average, Muon, Ranks, autocast, rate, save_atomically

CONFIG = TransformerConfig(
    dim=192,
    n_layers=6,
    n_refiner_layers=1,
    n_heads=4,
    norm_eps=1e-5,  # this and the next four are Z-Image's
    rope_theta=256.0,
    t_scale=1000.0,
    in_channels=16,
    patch_size=2,
    cap_feat_dim=train_text.CONFIG.hidden_size,
    axes_dims=(16, 16, 16),
)
SHIFT = 3.0  # Turbo's schedule; training draws four fifths of its noise levels along it
BATCH = 32  # per rank, of 128x128 images with captions of one 32-token block
SHARE_LONG = 0.02  # of the steps: captions of more than one block
OBJECT_WEIGHT = 2.0  # added to the loss where the latents differ from the background's
READ = (1 + len(scenes.SHAPES), 1 + len(scenes.COLORS), 3)  # shape or none, color or none, offset and radius
READ_AFTER, READ_WEIGHT = 2, 0.15  # the layer whose image tokens it is read from, its weight in the loss
OUTLINE = 8  # each 16x16-pixel token's outline is told on 8x8 points
OUTLINE_AFTER, OUTLINE_WEIGHT = 4, 0.5
MUON_LR, ADAM_LR, TEXT_LR = 0.015, 2e-3, 5e-4


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run with its own learning-rate cycle."""

    name: str
    share: float  # of the run's time
    peak: float  # of the learning rates
    hold: float  # share of the stage at the peak
    floor: float  # of the cosine that follows
    other: float  # share of the steps that show other sizes than 128x128


STAGES = (Stage("learn", 0.7, 1.0, 0.45, 0.04, other=0.05), Stage("sizes", 0.3, 0.6, 0.4, 0.02, other=0.6))


class Learner(nn.Module):
    """Both networks that learn from captions, and two heads that are left behind when training ends.

    `reader` tells, from the middle of the transformer, which object will cover each image token; `outliner` tells, from
    the last layer but one, which pixels of the token it covers. Noise hides both, so the answers have to come from the
    caption: what binds words to places is taught directly, not only through pixels.
    """

    def __init__(self, text_encoder: TextEncoder, transformer: ZImageTransformer):
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.reader = Linear(CONFIG.dim, sum(READ))
        self.outliner = Linear(CONFIG.dim, OUTLINE**2)

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity towards the image [B, 16, h, w], and the heads' answers [B, N, sum(READ)], [B, N, OUTLINE**2].

        Captions of one block run unmasked, as in the pipeline.
        """
        features = self.text_encoder(ids)  # (B, L, hidden)
        caps = [item[:length] for item, length in zip(features, lengths, strict=True)]
        n = noisy.shape[2] * noisy.shape[3] // 4
        heard: dict[int, Tensor] = {}

        def listen(stage: str, index: int, state: dict) -> None:
            if stage == "layers" and index in (READ_AFTER, OUTLINE_AFTER):
                tokens = state["img"][:, :n]
                heard[index] = F.rms_norm(tokens, tokens.shape[-1:])

        velocity = self.transformer(noisy, t, caps, attention=plain_attention, patch_tokens=listen).float()
        return velocity, self.reader(heard[READ_AFTER]).float(), self.outliner(heard[OUTLINE_AFTER]).float()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by two matmuls: on a CPU its backward pass beats the fused kernel's by far at this size."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def build(seed: int = 0) -> ZImageTransformer:
    """A new transformer whose gates start half open and whose output starts near zero."""
    torch.manual_seed(seed)
    model = ZImageTransformer(CONFIG)
    for name, parameter in model.named_parameters():
        if "pad_token" in name:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            std = 0.02 if "adaLN" in name else min(0.2, parameter.shape[1] ** -0.5)
            nn.init.normal_(parameter, std=std)
    for block in (*model.noise_refiner, *model.layers):
        _, gate_msa, _, gate_mlp = block.adaLN_modulation[0].bias.data.chunk(4)
        gate_msa.fill_(0.5)
        gate_mlp.fill_(0.5)
    nn.init.normal_(model.final_layer.linear.weight, std=0.005)
    nn.init.zeros_(model.final_layer.adaLN_modulation[1].weight)
    return model


# Batches


class Batches:
    """Draws (clean latents, captions) batches; all ranks meet the same sequence of batch kinds, each its own scenes."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, seed: str, rank: int, batch: int):
        self.pools = latents.load(folder)
        self.deck = {
            size: [i for i, scene in enumerate(drawn) for _ in range(_emphasis(scene))]
            for size, (_, drawn) in self.pools.items()
        }
        self.tokenizer = tokenizer
        self.batch = batch
        self.kinds = random.Random(seed)
        self.rng = random.Random(f"{seed} rank {rank}")

    def draw(self, share_other: float) -> tuple[str, Tensor, list[str], list[scenes.Scene]]:
        """The kind ("main", "long" or "other"), latents [B, 16, h, w] float32, B captions, B scenes."""
        u, other = self.kinds.random(), self.kinds.choice(latents.OTHERS)
        kind = "other" if u < share_other else "long" if u < share_other + SHARE_LONG else "main"
        size = other if kind == "other" else latents.MAIN
        pool, drawn = self.pools[size]
        tokens = pool.shape[2] * pool.shape[3] // 4
        batch = self.batch if kind == "main" else max(2, self.batch * 64 // (tokens + 64))
        chosen = self.rng.choices(self.deck[size], k=batch)
        texts = [self._caption(drawn[i], long=kind == "long" and self.rng.random() < 0.6) for i in chosen]
        return kind, pool[chosen].float(), texts, [drawn[i] for i in chosen]

    def _caption(self, scene: scenes.Scene, *, long: bool) -> str:
        for _ in range(20):
            text = captions.describe(scene, self.rng) if long else captions.caption(scene, self.rng)
            if long:
                text = self.rng.choice(captions.WORDY) + text + self.rng.choice(captions.ENDINGS[2:])
            if (len(self.tokenizer(text)) > 32) == long:
                return text
        return text


def _emphasis(scene: scenes.Scene) -> int:
    """How many times a scene is in the deck: what is rare and learnt last is drawn more often."""
    return 4 if scene.size == "large" else 2 if len(scene.items) == 3 else 1


def noise_levels(batch: int) -> Tensor:
    """One sigma for each of an even division of 0..1, shuffled; four fifths bent towards noise: [B]."""
    u = ((torch.arange(batch) + torch.rand(batch)) / batch)[torch.randperm(batch)]
    return torch.where(torch.rand(batch) < 0.8, shifted(u, SHIFT), u)


def object_weights(clean: Tensor) -> Tensor:
    """1 on background latent pixels, 1 + OBJECT_WEIGHT on others: [B, h, w]. The median one is background."""
    background = clean.flatten(2).median(dim=-1).values[:, :, None, None]
    return 1 + OBJECT_WEIGHT * ((clean - background).square().sum(1) > 1.0).float()


def token_truth(drawn: Sequence[scenes.Scene]) -> Tensor:
    """What the reading head should say: [B, N, 5] of shape, color (0 = no object), offset x and y, radius.

    A token belongs to an object whose bounding square reaches its center; offsets and radius count in radii and half
    images.
    """
    width, height = drawn[0].width, drawn[0].height
    y, x = torch.meshgrid(torch.arange(8, height, 16), torch.arange(8, width, 16), indexing="ij")
    x, y = x.flatten(), y.flatten()  # (N,) centers of the tokens in pixels
    truth = torch.zeros(len(drawn), len(x), 5)
    for row, scene in zip(truth, drawn, strict=True):
        for item, (color, shape) in zip(scene.items, scene.objects, strict=True):
            dx, dy = (x - item.x) / item.radius, (y - item.y) / item.radius
            inside = torch.maximum(dx.abs(), dy.abs()) <= 1 + 4 / item.radius
            row[inside, 0] = 1 + scenes.SHAPES.index(shape)
            row[inside, 1] = 1 + list(scenes.COLORS).index(color)
            row[inside, 2:] = torch.stack((dx, dy, torch.full_like(dx, 2 * item.radius / min(width, height))), 1)[
                inside
            ]
    return truth


def reading_loss(read: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of shape and color, and squared error of offset and radius where there is an object.

    read: [B, N, sum(READ)]. truth: `token_truth`.
    """
    shape, color, geometry = read.flatten(0, 1).split(READ, dim=1)
    truth = truth.flatten(0, 1)
    there = (truth[:, 0] > 0).float()
    weight = 1 + 2 * there
    named = F.cross_entropy(shape, truth[:, 0].long(), reduction="none")
    named = named + F.cross_entropy(color, truth[:, 1].long(), reduction="none")
    placed = (geometry - truth[:, 2:]).square().sum(1) * there
    return ((named + placed) * weight).mean()


def outline_loss(outlined: Tensor, drawn: Sequence[scenes.Scene], truth: Tensor) -> Tensor:
    """Cross-entropy of covered or not, [B, N, OUTLINE**2]; tokens with an object weigh five times as much."""
    step = 16 // OUTLINE
    cover = scenes.cover(drawn, step).to(outlined.device)  # [B, H / step, W / step]
    rows, columns = cover.shape[1] // OUTLINE, cover.shape[2] // OUTLINE
    cover = cover.unflatten(2, (columns, OUTLINE)).unflatten(1, (rows, OUTLINE)).transpose(2, 3)
    cover = cover.reshape(len(drawn), rows * columns, OUTLINE**2)
    weight = 1 + 4 * (truth[..., :1] > 0).float()
    return (F.binary_cross_entropy_with_logits(outlined, cover, reduction="none") * weight).mean()


# Training


def train(minutes: float, runs: Path, seed: int = 0) -> None:
    """Reads tokenizer, text.pt and latents in `runs`; writes model.pt (averaged); resumes from model.state.pt."""
    ranks = Ranks()
    tokenizer = Tokenizer(runs / "tokenizer")
    encoder = train_text.build(seed)
    encoder.load_state_dict(torch.load(runs / "text.pt", weights_only=True))
    learner = Learner(encoder, build(seed)).to(ranks.device)
    average = Average(learner, 0.997)
    optimizer = _Optimizer(learner)
    state_file = runs / "model.state.pt"
    stage_number, before, salt = 0, 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        learner.load_state_dict(state["learner"])
        average.module.load_state_dict(state["average"])
        optimizer.load(state["optimizer"])
        average.steps, stage_number, before, salt = state["steps"], state["stage"], state["seconds"], state["steps"]
    _compile(learner)
    batch = BATCH if ranks.device.type == "cpu" else 8 * BATCH
    batches = Batches(runs / "latents", tokenizer, f"batches {seed} {salt}", ranks.rank, batch)
    torch.manual_seed(batches.rng.randrange(2**31))
    ranks.wait()
    for stage in STAGES[stage_number:]:
        start, step, done, seconds = time.monotonic() - before, 0, 0.0, 60 * minutes * stage.share
        losses: list[float] = []
        while done < 1:
            kind, clean, texts, drawn = batches.draw(stage.other)
            # compiled blocks know one shape; the rare others run as they are
            with torch.compiler.set_stance("default" if kind == "main" else "force_eager"):
                loss = _loss(learner, tokenizer, clean.to(ranks.device), texts, drawn)
                optimizer.zero()
                loss.backward()
            done = ranks.average(optimizer.parameters, time.monotonic() - start) / seconds
            optimizer.step(stage.peak * rate(done, step, warm_steps=100, hold=stage.hold, floor=stage.floor))
            average.update(learner)
            losses.append(loss.item())
            step += 1
            if step % 100 == 0 and ranks.first:
                mean, speed = sum(losses[-100:]) / 100, step * batch * ranks.count / (seconds * done - before)
                print(f"{stage.name} {seconds * done:5.0f} s  step {step}  loss {mean:.4f}  {speed:.0f}/s", flush=True)
            if step % 400 == 0 and ranks.first:
                _save(runs, learner, average, optimizer, stage_number, seconds * done)
        stage_number, before = stage_number + 1, 0.0
        if ranks.first:
            _save(runs, learner, average, optimizer, stage_number, 0.0)
            save_atomically(average.module.state_dict(), runs / f"model.{stage.name}.pt")
        ranks.wait()


def _loss(
    learner: Learner,
    tokenizer: Tokenizer,
    clean: Tensor,
    texts: list[str],
    drawn: list[scenes.Scene],
) -> Tensor:
    device = clean.device
    sigma = noise_levels(len(clean)).to(device)
    level = sigma.view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    noisy = level * noise + (1 - level) * clean
    target = clean - noise
    ids, lengths = train_text.token_batch(tokenizer, texts)
    with autocast(device.type):
        velocity, read, outlined = learner(noisy, 1 - sigma, ids.to(device), lengths)
    error = (velocity - target).square().mean(1)  # (B, h, w)
    weights = object_weights(clean)
    loss = (error * weights).mean() / weights.mean()
    truth = token_truth(drawn).to(device)
    loss = loss + READ_WEIGHT * reading_loss(read, truth)
    return loss + OUTLINE_WEIGHT * outline_loss(outlined, drawn, truth)


class _Optimizer:
    """Muon for the matrices inside blocks, AdamW for the rest and for the text encoder."""

    def __init__(self, learner: Learner):
        matrices, rest = [], []
        for name, parameter in learner.transformer.named_parameters():
            in_block = name.startswith(("layers.", "noise_refiner.", "context_refiner.")) and "adaLN" not in name
            (matrices if in_block and parameter.ndim == 2 else rest).append(parameter)
        text = list(learner.text_encoder.parameters())
        self.muon = Muon(matrices, momentum=0.95, weight_decay=0.01)
        heads = [*learner.reader.parameters(), *learner.outliner.parameters()]
        self.parameters = matrices + rest + text + heads
        groups = [
            {"params": rest, "peak": ADAM_LR},
            {"params": text, "peak": TEXT_LR},
            {"params": heads, "peak": ADAM_LR},
        ]
        self.adam = torch.optim.AdamW(groups, lr=ADAM_LR, betas=(0.9, 0.97), weight_decay=0.0)

    def zero(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, scale: float) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * scale
        self.adam.step()
        self.muon.step(MUON_LR * scale)

    def state(self) -> dict[str, object]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.buffers}

    def load(self, state: dict[str, object]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.muon.buffers = state["muon"]


def _compile(learner: Learner) -> None:
    for module in (*learner.transformer.modules(), *learner.text_encoder.model.layers):
        if type(module).__name__ in ("Block", "DecoderLayer"):
            module.compile(dynamic=False)


def _save(runs: Path, learner: Learner, average: Average, optimizer: _Optimizer, stage: int, seconds: float) -> None:
    state = {
        "learner": learner.state_dict(),
        "average": average.module.state_dict(),
        "optimizer": optimizer.state(),
        "stage": stage,
        "seconds": seconds,
        "steps": average.steps,
    }
    save_atomically(state, runs / "model.state.pt")
    save_atomically(average.module.state_dict(), runs / "model.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.minutes, arguments.runs, arguments.seed)
