"""Trains the nano autoencoder: images to 16 latent channels at 1/8 of the size, in FLUX's latent normalization.

Besides reconstructing, the latents are taught two habits. They are about unit-sized once scaled, so the published
`scaling_factor` and `shift_factor` hold. And FLUX's published latent-to-RGB preview factors give the image's colors,
so previews of this model are true in any program that previews FLUX latents, and color is linear for the transformer.

    torchrun --nproc-per-node 2 -m nano.train_vae --minutes 10 --out runs/vae.pt
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_core.config import VAEConfig
from zimage_core.model.vae import AttentionBlock, AutoencoderKL, ResnetBlock

from . import scenes
from .optim import Average, Muon, Ranks, autocast, psnr, rate, save_atomically

CONFIG = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    block_out_channels=(16, 32, 64, 64),
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=0.3611,  # FLUX.1's and Z-Image's, vae/config.json
    shift_factor=0.1159,
    sample_size=scenes.SIZE,
)
# FLUX's latent preview: RGB in -1..1 = scaled latents @ factors + bias (ComfyUI latent_formats.py, class Flux)
PREVIEW_FACTORS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
PREVIEW_BIAS = (-0.0329, -0.0718, -0.0851)
PREVIEW_CONTRAST = 0.8  # at 1 the palette alone would take 1.4 times the latents' unit size


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run with its own learning-rate cycle."""

    share: float  # of the run's time
    phases: tuple[tuple[float, int, int], ...]  # (up to this share of the stage, image size, batch)
    peak: float  # of the learning rates
    weight_kl: float


STAGES = (
    # small crops first: they teach edges at a sixteenth of the cost
    Stage(0.72, ((0.45, 32, 24), (0.8, 64, 16), (1.0, 128, 6)), peak=1.0, weight_kl=3e-4),
    # then the latents, 2.3 times too large by now, are pulled to unit size
    Stage(0.28, ((0.5, 64, 16), (1.0, 128, 6)), peak=0.5, weight_kl=4e-3),
)
WEIGHT_PREVIEW = 0.4
LATENT_NOISE = 0.15  # added to the latents up to this: what the transformer makes is never exact


class Trained(nn.Module):
    """The autoencoder while it learns, on latents z = raw * scaling_factor, which are about unit-sized.

    Raw latents would be 2.8 times larger, which slows the layers next to them; `exported` folds the factor back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vae = AutoencoderKL(CONFIG)
        for module in self.vae.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.vae.modules():
            if isinstance(module, ResnetBlock):
                module.conv2.weight.data.mul_(0.1)  # residual branches start small, else the run stalls at gray
            if isinstance(module, AttentionBlock):
                nn.init.zeros_(module.proj_out.weight)
        self.register_buffer("factors", torch.tensor(PREVIEW_FACTORS), persistent=False)
        self.register_buffer("bias", torch.tensor(PREVIEW_BIAS), persistent=False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        mean, logvar = self.vae.encoder(image).float().chunk(2, dim=1)
        logvar = logvar.clamp(-12, 4)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        z = z + LATENT_NOISE * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)
        decoded = self.vae.decoder(z).float()
        scaled = mean - CONFIG.shift_factor * CONFIG.scaling_factor
        preview = torch.einsum("bchw,ck->bkhw", scaled, self.factors) + self.bias.view(1, 3, 1, 1)
        return {
            "decoded": decoded,
            "kl": 0.5 * (scaled.square() + logvar.exp() - 1 - logvar).mean(),
            "preview": (preview - PREVIEW_CONTRAST * F.avg_pool2d(image, 8)).square().mean(),
        }

    @torch.no_grad()
    def exported(self) -> dict[str, Tensor]:
        """Parameters of an AutoencoderKL on raw latents: the same function, the factor folded into its two ends."""
        weights = {name: value.clone() for name, value in self.vae.state_dict().items()}
        means = slice(0, CONFIG.latent_channels)
        weights["encoder.conv_out.weight"][means] /= CONFIG.scaling_factor
        weights["encoder.conv_out.bias"][means] /= CONFIG.scaling_factor
        weights["encoder.conv_out.bias"][CONFIG.latent_channels :] -= 2 * torch.tensor(CONFIG.scaling_factor).log()
        weights["decoder.conv_in.weight"] *= CONFIG.scaling_factor  # no bias to correct: the zero padding stays zero
        return weights


def images(rng: random.Random, count: int, size: int) -> Tensor:
    """Training images [count, 3, size, size]: whole scenes and crops of larger ones, any colors and angles too."""
    whole = count if size == scenes.SIZE else count // 4
    drawn = [scenes.draw([_scene(rng, size) for _ in range(whole)])] if whole else []
    if whole < count:
        large = [_scene(rng, 96 if size == 32 else 128) for _ in range(count - whole)]
        for scene, image in zip(large, scenes.draw(large), strict=True):
            item = rng.choice(scene.items)  # crop around an object: plain background teaches nothing
            x, y = (
                min(scene.width - size, max(0, int(center + rng.uniform(-0.6, 0.6) * size) - size // 2))
                for center in (item.x, item.y)
            )
            drawn.append(image[None, :, y : y + size, x : x + size])
    image = torch.cat(drawn)
    shaded = torch.randperm(count)[: max(1, count // 10)]
    shade = F.interpolate(torch.randn(len(shaded), 3, 4, 4), size=(size, size), mode="bilinear", align_corners=True)
    image[shaded] = (image[shaded] + rng.uniform(0.1, 0.8) * shade).clamp(-1, 1)
    return image


def _scene(rng: random.Random, size: int) -> scenes.Scene:
    scene = scenes.sample(rng, width=size, height=size, allowed=lambda color, shape: True)
    if rng.random() < 0.3:
        items = tuple(_free_item(rng, size) for _ in range(rng.randint(1, 4)))
        scene = dataclasses.replace(scene, background=_rgb(rng), items=items)
    if rng.random() < 0.04:
        scene = dataclasses.replace(scene, blurred=True)
    return scene


def _free_item(rng: random.Random, size: int) -> scenes.Item:
    x, y = rng.uniform(0.15, 0.85) * size, rng.uniform(0.15, 0.85) * size
    return scenes.Item(
        rng.choice(scenes.SHAPES), _rgb(rng), x, y, rng.uniform(0.08, 0.4) * size, rng.uniform(-3.1, 3.1)
    )


def _rgb(rng: random.Random) -> scenes.RGB:
    return rng.random(), rng.random(), rng.random()


def reconstruction_loss(decoded: Tensor, image: Tensor, *, edges: bool) -> Tensor:
    """L1 + 2 MSE, and half the L1 of neighbor differences, which sharpens outlines."""
    error = decoded - image
    loss = error.abs().mean() + 2 * error.square().mean()
    if edges:
        loss = loss + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    return loss


def train(minutes: float, out: Path, seed: int = 0) -> None:
    """Trains for `minutes` and writes the averaged weights of a plain AutoencoderKL to `out`.

    A killed run goes on from `out` with the suffix .state.pt.
    """
    ranks = Ranks()
    torch.manual_seed(seed)
    model = Trained().to(ranks.device)
    if ranks.device.type == "cpu":
        model.to(memory_format=torch.channels_last)
    average = Average(model, 0.995)
    ends = ("encoder.conv_in.weight", "decoder.conv_out.weight")
    named = list(model.vae.named_parameters())
    matrices = [p for name, p in named if p.ndim >= 2 and name not in ends]
    rest = [p for name, p in named if p.ndim < 2 or name in ends]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    parameters = matrices + rest
    rng = random.Random(f"vae {seed} {ranks.rank} {time.time()}")  # another stream after a resume
    torch.manual_seed(rng.randrange(2**31))

    state_file = out.with_suffix(".state.pt")
    stage_number, before = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        average.steps = 1000
        stage_number, before = state["stage"], state["seconds"]
    for stage in STAGES[stage_number:]:
        start, step, done, seconds = time.monotonic() - before, 0, 0.0, 60 * minutes * stage.share
        while done < 1:
            size, batch = next((size, batch) for until, size, batch in stage.phases if done < until)
            image = images(rng, batch, size).to(ranks.device)
            if ranks.device.type == "cpu":
                image = image.contiguous(memory_format=torch.channels_last)
            with autocast(ranks.device.type):
                made = model(image)
            loss = reconstruction_loss(made["decoded"], image, edges=size > 32)
            loss = loss + stage.weight_kl * made["kl"] + WEIGHT_PREVIEW * made["preview"]
            for parameter in parameters:
                parameter.grad = None
            loss.backward()
            # the clock of all ranks together decides, so that they leave the loop at the same step
            done = ranks.average(parameters, time.monotonic() - start) / seconds
            nn.utils.clip_grad_norm_(parameters, 1.0)
            scale = stage.peak * rate(done, step)
            adam.param_groups[0]["lr"] = 2e-3 * scale
            adam.step()
            muon.step(6e-3 * scale)
            average.update(model)
            step += 1
            if step % 50 == 0 and ranks.first:
                decibels = psnr(made["decoded"].detach(), image).mean().item()
                print(
                    f"vae stage {stage_number} {seconds * done:5.0f} s  step {step}  {size} px  {decibels:.2f} dB  "
                    f"kl {made['kl']:.3f}  preview {made['preview']:.4f}",
                    flush=True,
                )
                _save(state_file, model, average, stage_number, seconds * done)
        stage_number, before = stage_number + 1, 0.0
        if ranks.first:
            _save(state_file, model, average, stage_number, 0.0)
    if ranks.first:
        save_atomically(average.module.exported(), out)
        report(average.module.exported())
    ranks.wait()


def _save(path: Path, model: Trained, average: Average, stage: int, seconds: float) -> None:
    state = {"model": model.state_dict(), "average": average.module.state_dict(), "stage": stage, "seconds": seconds}
    save_atomically(state, path)


@torch.no_grad()
def report(weights: dict[str, Tensor]) -> dict[str, float]:
    """Prints and returns the reconstruction of 64 new scenes (dB) and the size of their scaled latents."""
    vae = AutoencoderKL(CONFIG)
    vae.load_state_dict({name: value.cpu() for name, value in weights.items()})
    rng = random.Random("vae report")
    image = scenes.draw([scenes.sample(rng) for _ in range(64)])
    raw = torch.cat([vae.encode(part) for part in image.split(16)])
    decoded = torch.cat([vae.decode(part) for part in raw.split(16)])
    decibels = psnr(decoded.clamp(-1, 1), image)
    latents = vae.scale(raw)
    numbers = {
        "mean_db": decibels.mean().item(),
        "min_db": decibels.min().item(),
        "latent_mean": latents.mean().item(),
        "latent_std": latents.std().item(),
    }
    print("vae", {name: round(value, 4) for name, value in numbers.items()}, flush=True)
    print("channel std", [round(v, 2) for v in latents.std((0, 2, 3)).tolist()], flush=True)
    return numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=13)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.minutes, arguments.out, arguments.seed)
