"""Images to latents and back, computed again with more room where numbers are not finite.

Letters: B batch, H W height and width in pixels, h w the same in latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .diagnostics import finite
from .diagnostics.finite import NotFinite
from .model import vae_bands
from .model.vae import AutoencoderKL

# (compute by dtype, dtype, the one with more room or None, vae=network) -> what it gives, see `ZImagePipeline._finite`
Safely = Callable[..., Any]


def decode(vae: AutoencoderKL, latents: Tensor, safely: Safely) -> Tensor:
    """Scaled latents [B, 16, h, w] to images [B, 3, H, W] float32 in 0..1."""

    def compute(dtype: torch.dtype) -> Tensor:
        network, raw = _cast(vae, dtype), vae.unscale(latents).to(dtype)
        images = torch.cat([_decode_one(network, item) for item in raw.split(1)])  # one by one bounds the memory
        if not images.isfinite().all():
            if not latents.isfinite().all():
                raise ValueError(f"the latents to decode hold {finite.WHAT}: they are at fault, not the VAE")
            raise NotFinite("decoding (VAE)")
        return (images.float() / 2 + 0.5).clamp(0, 1)

    images: Tensor = safely(compute, *_dtypes(vae), vae=vae)
    return images


def encode_moments(vae: AutoencoderKL, image: Tensor, safely: Safely) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] in 0..1 to mean and log-variance of their unscaled latents [B, 16, h, w], float32."""

    def compute(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        network = _cast(vae, dtype)
        parts = [network.encode_moments(item) for item in (image.to(dtype) * 2 - 1).split(1)]
        mean, logvar = (torch.cat(part).float() for part in zip(*parts, strict=True))
        if not mean.isfinite().all():
            raise NotFinite("encoding (VAE)")
        return mean, logvar

    moments: tuple[Tensor, Tensor] = safely(compute, *_dtypes(vae), vae=vae)
    return moments


def _dtypes(vae: AutoencoderKL) -> tuple[torch.dtype, torch.dtype | None]:
    """Its own, and one with more room where there is one."""
    own = next(vae.parameters()).dtype
    return own, torch.float32 if own.itemsize < torch.float32.itemsize else None


def _cast(vae: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    return vae if dtype == _dtypes(vae)[0] else copy.deepcopy(vae).to(dtype)


def _decode_one(vae: AutoencoderKL, raw: Tensor) -> Tensor:
    height, width = (side * vae.config.downscale for side in raw.shape[-2:])
    in_bands = vae_bands.advised(vae, height, width, raw)
    return vae_bands.decode(vae, raw) if in_bands else vae.decode(raw)
