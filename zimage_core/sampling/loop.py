"""The denoising loop: time, signs and guidance. The model is any callable.

The only place where the model's conventions (time up to 1 at the image, velocity towards the image) meet the
sampler's (sigma down to 0 at the image, dlatents/dsigma).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .schedule import euler_step

# (latents [B, 16, h, w], t [B], captions, and what steers) -> velocity towards the image [B, 16, h, w]
Model = Callable[..., Tensor]
# (steps done, steps, latents, estimate of the image's latents); returning False stops the run
Callback = Callable[[int, int, Tensor, Tensor], "bool | None"]


class Cancelled(Exception):
    """The callback asked to stop."""


def model_time(sigma: Tensor) -> Tensor:
    """The model's time, 0 at pure noise and 1 at the image, from the noise level."""
    return 1.0 - sigma


def velocity(model_output: Tensor) -> Tensor:
    """dlatents/dsigma in float32, from the model's velocity towards the image."""
    return -model_output.float()


def denoised(latents: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """The image's latents as this velocity foresees them: latents - sigma * velocity."""
    return latents - sigma * velocity


def guides_at(sigma: float, guidance_scale: float, cfg_truncation: float) -> bool:
    """Whether guidance acts at this noise level: not once the model's time has passed `cfg_truncation` (if <= 1)."""
    return guidance_scale > 0 and not (cfg_truncation <= 1.0 and 1.0 - sigma > cfg_truncation)


def guided_velocity(positive: Tensor, negative: Tensor, guidance_scale: float, cfg_normalization: float) -> Tensor:
    """positive + guidance_scale * (positive - negative), [B, 16, h, w]: 0 is off, ComfyUI's CFG is guidance_scale + 1.

    With cfg_normalization k > 0, an item whose norm exceeds k times that of `positive` is scaled down to it.
    """
    guided = positive + guidance_scale * (positive - negative)
    if cfg_normalization > 0:
        limit = cfg_normalization * positive.flatten(1).norm(dim=1)  # (B,)
        shrink = (limit / guided.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp(max=1.0)
        guided = guided * shrink.view(-1, *[1] * (guided.ndim - 1))
    return guided


def denoise(
    model: Model,
    latents: Tensor,
    sigmas: Tensor,
    features: Sequence[Tensor],
    negative_features: Sequence[Tensor] | None = None,
    *,
    guidance_scale: float = 0.0,
    cfg_normalization: float = 0.0,
    cfg_truncation: float = 1.0,
    dtype: torch.dtype = torch.float32,
    refine: Callable[[Sequence[Tensor]], Any] = list,
    controls: Callable[[float], Sequence[Any]] | None = None,
    keep: Callable[[Tensor, int], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Takes latents [B, 16, h, w] float32 from noise level sigmas[0] to sigmas[-1] by Euler steps.

    features, negative_features: B of [L_i, D]. refine: what of the model's work on captions can be done before the
    first step; the model gets its result. The model computes in `dtype`; latents, guidance and steps stay float32. With
    guidance, positive and negative captions run in one batch. controls: those that steer at a noise level; the model
    gets them, and which image each item is. keep: (latents, steps done) -> latents, after each step. Raises `Cancelled`
    when the callback returns False.
    """
    if guidance_scale > 0 and negative_features is None:
        raise ValueError("guidance needs negative captions; those of an empty prompt serve where there is none")
    steps = len(sigmas) - 1
    batch = len(latents)
    refined: dict[bool, Any] = {}  # whether guided -> captions of that batch
    levels = sigmas.to(latents.device)  # at once: each copy would wait for the device
    for step, sigma in enumerate(sigmas.tolist()[:-1]):
        t = model_time(levels[step]).expand(batch)  # (B,)
        guided = guides_at(sigma, guidance_scale, cfg_truncation)
        if guided not in refined:
            refined[guided] = refine([*features, *(negative_features or ())] if guided else features)
        copies = 2 if guided else 1
        steering = {}
        if controls is not None and (active := controls(sigma)):
            steering = {"controls": active, "images": [*range(batch)] * copies}
        inputs = latents.to(dtype).repeat(copies, 1, 1, 1)
        v = velocity(model(inputs, t.repeat(copies), refined[guided], **steering))  # (copies * B, 16, h, w)
        if guided:
            v = guided_velocity(v[:batch], v[batch:], guidance_scale, cfg_normalization)
        estimate = denoised(latents, v, sigma)
        latents = euler_step(latents, v, levels[step], levels[step + 1])
        if keep is not None:
            latents = keep(latents, step + 1)
        if callback is not None and callback(step + 1, steps, latents, estimate) is False:
            raise Cancelled(f"stopped after step {step + 1} of {steps}")
    return latents
