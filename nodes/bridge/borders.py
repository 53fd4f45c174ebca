"""The shape of what comes in from other nodes and goes out to them: rank, channels and batch, in one place."""

from __future__ import annotations

import math
from typing import Any

LATENT = ("batch", 16, "height/8", "width/8")
IMAGE = ("batch", "height", "width", 3)
COLORS = "3 or 4"  # with transparency
FEATURES = ("batch", "tokens", "width")


def checked(what: str, values: Any, expected: tuple[int | str, ...], advice: str = "") -> Any:
    """The tensor, if it has this shape; words stand for any size above 0.

    Raises ValueError that begins with `what`, names both shapes and ends with the advice.
    """
    if getattr(values, "is_nested", False):
        found = "several tensors"
    else:
        shape = list(getattr(values, "shape", ()))
        pairs = zip(shape, expected, strict=False)
        if len(shape) == len(expected) and all(_is(a, b) for a, b in pairs):
            return values
        found = f"the shape {shape}" if hasattr(values, "shape") else f"no tensor but a {type(values).__name__}"
    wanted = ", ".join(map(str, expected))
    raise ValueError(f"{what} has {found}, expected [{wanted}]{f'. {advice}' if advice else '.'}")


def _is(size: int, expected: int | str) -> bool:
    return size == expected if isinstance(expected, int) else size in (3, 4) if expected == COLORS else size > 0


def checked_numbers(**inputs: float) -> None:
    """Raises ValueError for a number that is NaN or infinite, which passes ComfyUI's limits; named as the input is."""
    for name, value in inputs.items():
        if not math.isfinite(value):
            raise ValueError(
                f"`{name}` is {value}, expected a finite number. Set it in the node or where it comes from."
            )


def checked_image(name: str, image: Any) -> Any:
    """[B, H, W, 3] of an IMAGE that may have transparency; raises ValueError for other shapes, NaN and infinity."""
    image = checked(name, image, ("batch", "height", "width", COLORS))[..., :3]
    return _finite(name, image)


def checked_mask(mask: Any, image: Any, name: str) -> Any:
    """A MASK [B, H, W] for the IMAGE of this name; raises ValueError where they don't fit."""
    _finite("`mask`", checked("`mask`", mask, ("batch", "height", "width")))
    if mask.shape[1:] != image.shape[1:3]:
        sizes = [f"{x.shape[2]}x{x.shape[1]}" for x in (mask, image)]
        raise ValueError(
            f"`mask` is {sizes[0]} and {name} {sizes[1]}. Give them one size; Load Image makes a mask of 64x64 for an "
            "image that has none, so paint one (Open in MaskEditor)."
        )
    if 1 not in (len(mask), len(image)) and len(mask) != len(image):
        raise ValueError(f"`mask` is a batch of {len(mask)} for {len(image)} images. Give one, or one for each.")
    return mask


def _finite(name: str, values: Any) -> Any:
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity. Check the node that made it.")
    return values


def checked_vae(vae: Any) -> None:
    """Raises ValueError where a loader had none to give."""
    if vae is None:
        raise ValueError(
            "There is no VAE in `vae`: the loader before it found none (a checkpoint without one, perhaps). Connect a "
            "Load Z-Image VAE node."
        )
