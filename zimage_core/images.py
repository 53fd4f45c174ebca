"""Images that people bring: checked, brought to a size without distortion, masks on the grid of the latents.

Letters: B batch, H W height and width in pixels, h w the same in latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REPAINTED = 0.5  # from here on a mask counts as one where it has to be all or nothing


def check(what: str, image: Tensor, channels: int, most: int | None = None) -> None:
    """Raises ValueError, naming `what`, unless it is [B, channels, H, W] of numbers in 0..1, for `most` images at most.

    most: how many are made; one image serves for all of them.
    """
    if image.ndim != 4 or image.shape[1] != channels or not image.numel():
        raise ValueError(f"{what} has shape {list(image.shape)}, expected [batch, {channels}, height, width]")
    if most is not None and len(image) not in (1, most):
        raise ValueError(f"{what} is a batch of {len(image)} for {most} images; give one, or one for each")
    if not image.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity; check what made it")
    if image.min() < 0 or image.max() > 1:
        raise ValueError(f"{what} holds numbers from {image.min():.3g} to {image.max():.3g}, expected 0 to 1")


def fitted(image: Tensor, height: int, width: int, *, fill: float | None = None) -> Tensor:
    """[B, C, H, W] in 0..1 to [B, C, height, width], never stretched.

    fill: None scales the image to cover the size and cuts off what juts out, the middle stays; a number scales it to
    lie within and fills the rest.
    """
    own = image.shape[-2:]
    scales = (height / own[0], width / own[1])
    scale = max(scales) if fill is None else min(scales)
    tall, wide = (max(1, round(side * scale)) for side in own)
    if (tall, wide) != own:
        mode = "bilinear" if image.shape[1] == 1 else "bicubic"  # which would overshoot at a mask's edges
        image = F.interpolate(image.float(), (tall, wide), mode=mode, antialias=True).clamp(0, 1)
    above, left = (height - tall) // 2, (width - wide) // 2  # negative where it is cut
    around = (left, width - wide - left, above, height - tall - above)
    return F.pad(image, around, value=0.0 if fill is None else fill) if any(around) else image


def covered(mask: Tensor, downscale: int) -> Tensor:
    """A mask [B, 1, H, W] for latents [B, 1, h, w]: of each of their pixels the most, so that none is missed."""
    return F.max_pool2d(mask, downscale)


def hole(image: Tensor, mask: Tensor, downscale: int) -> tuple[Tensor, Tensor]:
    """What a control network is told of an image [B, 3, H, W] in 0..1 to repaint where mask [B, 1, H, W] is 1.

    Gives the image, gray where it is repainted, and a mask [B, 1, h, w] that is 1 where it stays (as VideoX-Fun: from
    one of all or nothing, the first pixel of each latent pixel).
    """
    repainted = (mask >= REPAINTED).to(image)
    gray = image * (1 - repainted) + 0.5 * repainted
    return gray, 1 - repainted[:, :, ::downscale, ::downscale]


def composed(made: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """`made` where the mask is above 0, all [B, *, H, W]; every other pixel is the image's, bit for bit."""
    return torch.where(mask > 0, made, image.to(made))
