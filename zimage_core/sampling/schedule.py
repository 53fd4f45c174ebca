"""The noise levels of flow-matching Euler, and its step."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from ..config import SchedulerConfig

Level = TypeVar("Level", float, Tensor)


def sigmas(steps: int, config: SchedulerConfig, image_seq_len: int) -> Tensor:
    """Noise levels from 1 (pure noise) down to 0 (image): [steps + 1] float32; `steps` model evaluations.

    The even grid u = 1, 1 - 1/n, ..., 1/n is bent towards noise, then 0 is appended. diffusers and the official
    code agree on this grid; "9 steps" in older advice is 8 here.

    image_seq_len: image tokens before padding, (height/16) * (width/16); used by dynamic shifting only.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    even = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    bent = shifted(even, shift_of(config, image_seq_len))
    return torch.cat((bent, torch.zeros(1, dtype=torch.float64))).float()


def shift_of(config: SchedulerConfig, image_seq_len: int) -> float:
    """By how much the noise levels of an image of so many tokens are bent towards noise."""
    return math.exp(dynamic_shift(image_seq_len, config)) if config.use_dynamic_shifting else config.shift


def shifted(u: Level, shift: float) -> Level:
    """shift * u / (1 + (shift - 1) * u): SD3's resolution shift (arXiv:2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def dynamic_shift(image_seq_len: int, config: SchedulerConfig) -> float:
    """mu, the logarithm of the shift, on the line through (base_image_seq_len, base_shift) and (max_..., max_...)."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (image_seq_len - config.base_image_seq_len)


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One Euler step along dlatents/dsigma = velocity, in float32."""
    return latents + (sigma_next - sigma) * velocity
