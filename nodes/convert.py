"""What comes through LATENT and IMAGE sockets, checked, and back into them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .bridge import borders

EMPTY = "A batch of none or an image of no size can't be used: look at the node that it comes from."
PIXELS = 16  # Z-Image cuts the image into patches of this size: 8 pixels a latent pixel, 2x2 of these a token
PATCH = 2


def checked_latents(samples: Tensor, channels: int) -> Tensor:
    """Raw latents [B, channels, h, w]; raises ValueError with what to do otherwise."""
    if getattr(samples, "is_nested", False) or samples.ndim != 4:
        shape = "several tensors" if getattr(samples, "is_nested", False) else f"shape {list(samples.shape)}"
        raise ValueError(f"The latent is not an image's ({shape}), expected [batch, {channels}, height/8, width/8].")
    if samples.shape[1] != channels:
        raise ValueError(
            f"The latent has {samples.shape[1]} channels, expected {channels}: it belongs to another model. "
            "Encode the image with Z-Image's VAE, or start from EmptySD3LatentImage."
        )
    return borders.checked("The latent", samples, ("batch", channels, "height/8", "width/8"), EMPTY)


def checked_cells(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] with even h and w, which the transformer cuts into patches; raises ValueError otherwise."""
    height, width = latents.shape[-2:]
    if height % PATCH or width % PATCH:
        raise ValueError(_size_message("latent", width * PIXELS // PATCH, height * PIXELS // PATCH))
    return latents


def checked_pixels(pixels: Tensor) -> Tensor:
    """IMAGE [B, H, W, 3] with H and W divisible by 16, of [B, H, W, 3 or 4] without its alpha; ValueError otherwise."""
    channels = pixels.shape[-1] if getattr(pixels, "shape", ()) and pixels.shape[-1] == 4 else 3
    borders.checked("The image", pixels, ("batch", "height", "width", channels), EMPTY)
    pixels = pixels[..., :3]
    height, width = pixels.shape[1:3]
    if height % PIXELS or width % PIXELS:
        raise ValueError(_size_message("image", width, height))
    return pixels


def latent_with(latent: dict[str, Any], samples: Tensor) -> dict[str, Any]:
    """The LATENT with new samples; what described the old ones' scale is dropped, as stock samplers do."""
    rest = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**rest, "samples": samples}


def _size_message(what: str, width: int, height: int) -> str:
    near = f"{max(width // PIXELS, 1) * PIXELS}x{max(height // PIXELS, 1) * PIXELS}"
    return (
        f"The {what} is {width}x{height} pixels; Z-Image needs width and height divisible by {PIXELS}. "
        f"Resize or crop it, to {near} for example."
    )
