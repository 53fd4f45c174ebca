"""Where sampling begins: noise, alone or over an image, and what of the image stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Gaussian noise drawn on the CPU, so that a seed means the same on every device; float32.

    One seed draws the whole batch from one generator, as diffusers and ComfyUI do; a list draws each item from its own.
    """

    def __init__(self, seed: int | Sequence[int], count: int):
        if not isinstance(seed, int) and len(seed) != count:
            raise ValueError(f"{len(seed)} seeds for {count} images; give one seed, or one for each image")
        seeds = [seed] if isinstance(seed, int) else seed
        self.generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
        self.count = count

    def draw(self, shape: Sequence[int], count: int | None = None) -> Tensor:
        """[count, *shape], the next numbers of the generators. count: of items, all if not told."""
        count = self.count if count is None else count
        if len(self.generators) == 1:
            return torch.randn((count, *shape), generator=self.generators[0])
        return torch.stack([torch.randn(tuple(shape), generator=one) for one in self.generators[:count]])


def left_out(steps: int, strength: float) -> int:
    """How many of the first steps an image spares by which sampling begins: int(n - n * strength), as diffusers.

    Raises ValueError unless at least one is left.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength!r}, expected more than 0 (the image as it is) up to 1 (all noise)")
    return int(max(steps - min(steps * strength, steps), 0))


def noised(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Latents at a noise level: sigma * noise + (1 - sigma) * clean."""
    return sigma * noise + (1 - sigma) * clean


class Repaint:
    """Puts an image's own latents back after each step, where a mask [1 or B, 1, h, w] keeps them.

    mask: 1 is repainted in all steps and 0 in none; m between lets go of a pixel for the last share m of the steps, so
    that it changes little ("differential diffusion", arXiv:2306.00950).
    """

    def __init__(self, clean: Tensor, noise: Tensor, mask: Tensor, sigmas: Tensor):
        """clean, noise: [B, 16, h, w]; sigmas: of the steps that are run and the last."""
        self.clean, self.noise, self.mask, self.sigmas = clean, noise, mask, sigmas

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """Latents after `step` steps, with what is kept at their noise level."""
        steps = len(self.sigmas) - 1
        stays = self.mask <= (steps - step) / steps
        return torch.where(stays, noised(self.clean, self.noise, self.sigmas[step]), latents)
