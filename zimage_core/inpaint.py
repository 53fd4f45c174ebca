"""Repainting a part of an image: its surroundings cut out at a size that suits the model, and put back.

Letters: B batch, H W height and width of the image in pixels, h w of what is cut out and sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import REPAINTED, composed

MULTIPLE = 16  # pixels, of both sides of what is sampled
FILLS = ("keep", "neutral", "blurred", "noise")


@dataclass(frozen=True)
class Crop:
    """Where a cut-out comes from and how it goes back."""

    canvas: Tensor  # [B, 3, H, W], the image, with what was added at its sides
    blend: Tensor  # [B, 1, H, W]: how much of the new image, 0 outside the grown mask, 1 inside of its feathered edge
    repainted: Tensor  # [B, 1, H, W], the grown mask
    box: tuple[int, int, int, int]  # top, left, height, width on the canvas; may jut out of it
    size: tuple[int, int]  # height, width at which it is sampled


def prepare(
    image: Tensor,
    mask: Tensor,
    *,
    grow: int = 0,
    feather: int = 0,
    extend: Sequence[int] = (0, 0, 0, 0),
    crop: bool = True,
    context: float = 1.5,
    pixels: float = 0.0,
) -> tuple[Tensor, Tensor, Crop]:
    """What is to be sampled of an image [B, 3, H, W] whose mask [B, 1, H, W] is 1 where to repaint, and the way back.

    grow: pixels by which the mask grows. feather: of these and more, over how many pixels the new image fades in, from
    the edge of the grown mask inwards; all beyond that edge stays bit for bit.
    extend: pixels added left, above, right, below, all to be repainted.
    crop: whether only the surroundings of the mask are sampled, the box around it times `context`; else all.
    pixels: about how many the cut-out is scaled to; 0 leaves it as large as it is. Its sides are multiples of 16.

    Gives the cut-out [B, 3, h, w], its mask [B, 1, h, w] and the `Crop`. Raises ValueError where nothing is masked.
    """
    left, above, right, below = extend
    around = (left, right, above, below)
    canvas = F.pad(image, around, mode="replicate") if any(around) else image
    mask = F.pad(mask, around, value=1.0)
    repainted = _grown(mask, grow)
    if not (repainted > 0).any():
        raise ValueError("the mask is empty: nothing is to be repainted")
    box, size = _box(repainted, canvas.shape[-2:], crop, context, pixels)
    part, hole = (_resized(_cut(x, box), size) for x in (canvas, repainted))
    return part, hole, Crop(canvas, _faded(repainted, feather), repainted, box, size)


def finish(made: Tensor, crop: Crop, *, match_color: bool = True) -> Tensor:
    """The image with a cut-out [n * B, 3, h, w] put back: [n * B, 3, H, W]; what is not repainted is bit for bit.

    match_color: see `matched`.
    Raises ValueError where the cut-out is of another shape, or not as many.
    """
    top, left, height, width = crop.box
    if len(made) % len(crop.canvas) or abs(made.shape[-1] * height - made.shape[-2] * width) > max(made.shape[-2:]):
        raise ValueError(
            f"the images to put back are {len(made)} of {made.shape[-1]}x{made.shape[-2]}, expected "
            f"{len(crop.canvas)} (or a multiple) of {crop.size[1]}x{crop.size[0]}, as they were cut out"
        )
    times = len(made) // len(crop.canvas)
    canvas, blend, repainted = (x.repeat(times, 1, 1, 1).to(made) for x in (crop.canvas, crop.blend, crop.repainted))
    rows = slice(max(0, top), min(top + height, canvas.shape[2]))
    columns = slice(max(0, left), min(left + width, canvas.shape[3]))
    inner = _resized(made, (height, width))[
        ..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    part, own, hole = (x[..., rows, columns] for x in (canvas, blend, repainted))
    if match_color:
        inner = matched(inner, part, hole)
    mixed = torch.lerp(part, inner, own)
    out = canvas.clone()
    out[..., rows, columns] = composed(mixed, part, own)
    return out


def _grown(mask: Tensor, by: int) -> Tensor:
    return F.max_pool2d(mask, 2 * by + 1, 1, by) if by else mask


def _faded(repainted: Tensor, over: int) -> Tensor:
    """0 at the edge of what is repainted, 1 `over` pixels inwards; the sides of the image are no edges."""
    reach = over // 2
    if not reach:
        return repainted
    kernel = 2 * reach + 1
    padded = F.pad(repainted, (2 * reach,) * 4, mode="replicate")
    inner = -F.max_pool2d(-padded, kernel, 1)
    rows = F.avg_pool2d(inner, (kernel, 1), 1)
    return F.avg_pool2d(rows, (1, kernel), 1).clamp(0, 1) * (repainted > 0)


def _box(
    repainted: Tensor, canvas: Sequence[int], crop: bool, context: float, pixels: float
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """(top, left, height, width) on the canvas, (height, width) to sample, of one shape."""
    top = left = 0
    height, width = canvas
    if crop:
        found = (repainted > 0).any(0).any(0)  # (H, W), of any item of the batch
        rows, columns = (torch.where(found.any(dim))[0] for dim in (1, 0))
        (top, height), (left, width) = (
            _with_context(int(at.min()), int(at.max()) + 1, context, most)
            for at, most in zip((rows, columns), canvas, strict=True)
        )
    scale = math.sqrt(pixels / (height * width)) if crop and pixels else 1.0
    tall, wide = (max(MULTIPLE, math.ceil(side * scale / MULTIPLE) * MULTIPLE) for side in (height, width))
    each = 1 / scale  # pixels of the image for one that is sampled
    own = (max(height, round(tall * each)), max(width, round(wide * each)))
    # what is added for the shape, on both sides, within the canvas as long as there is room
    top, left = (
        _within(at - (n - before) // 2, n, most)
        for at, n, before, most in zip((top, left), own, (height, width), canvas, strict=True)
    )
    return (top, left, *own), (tall, wide)


def _with_context(first: int, last: int, context: float, most: int) -> tuple[int, int]:
    """(where it begins, how long it is) with its surroundings."""
    add = math.ceil((last - first) * (context - 1) / 2)
    begin = max(0, first - add)
    return begin, min(most, last + add) - begin


def _within(begin: int, length: int, most: int) -> int:
    """Where a stretch begins that lies on the canvas if it fits."""
    return (most - length) // 2 if length > most else min(max(0, begin), most - length)


def _cut(x: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """[B, C, height, width] of a box; what juts out repeats the edge."""
    top, left, height, width = box
    rows = torch.arange(top, top + height, device=x.device).clamp(0, x.shape[-2] - 1)
    columns = torch.arange(left, left + width, device=x.device).clamp(0, x.shape[-1] - 1)
    return x[..., rows, :][..., columns]


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    settings: dict[str, Any] = {"mode": "bilinear" if x.shape[1] == 1 else "bicubic", "antialias": True}
    return F.interpolate(x.float(), size, **settings).clamp(0, 1)


def filled(image: Tensor, hole: Tensor, fill: str) -> Tensor:
    """An image [B, 3, H, W] with something else where `hole` [B, 1, H, W] is above 0; fill: one of FILLS."""
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r}, expected one of {', '.join(FILLS)}")
    if fill == "keep":
        return image
    if fill == "neutral":
        filling = torch.full_like(image, 0.5)
    elif fill == "noise":  # the same each time
        draws = torch.rand(image.shape, generator=torch.Generator("cpu").manual_seed(0))
        filling = draws.to(image)
    else:
        filling = _spread(image, (hole < REPAINTED).to(image), 0.5)
    return torch.where(hole > 0, filling, image)


def matched(made: Tensor, image: Tensor, hole: Tensor) -> Tensor:
    """`made` without a seam to the image: what the two differ by around the hole is spread into it and taken off.

    made, image: [B, 3, H, W]; hole: [B, 1, H, W], above 0 where `made` is new. As in gradient-domain cloning (Poisson
    image editing), what is new keeps its own changes from pixel to pixel and begins where the image ends.
    """
    known = (hole == 0).to(made)
    return (made + _spread(image - made, known, 0.0)).clamp(0, 1)


def _spread(image: Tensor, known: Tensor, otherwise: float) -> Tensor:
    """What is known, spread into what isn't: averages over 2x2 pixels, over 4x4, ..., the finest that know anything.

    otherwise: where nothing is known.
    """
    if known.all() or min(image.shape[-2:]) < 2:
        weight = known.mean((2, 3), keepdim=True)
        average = (image * known).mean((2, 3), keepdim=True) / weight.clamp_min(1e-6)
        rest = torch.where(weight > 0, average, torch.full_like(average, otherwise))
        return torch.where(known > 0, image, rest)
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(image * known, 2, ceil_mode=True) / share.clamp_min(1e-6)
    wide = _spread(coarse, (share > 0).to(image), otherwise)
    smooth = F.interpolate(wide, image.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(known > 0, image, smooth)
