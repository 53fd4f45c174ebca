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


def checked_vae(vae: Any) -> None:
    """Raises ValueError where a loader had none to give."""
    if vae is None:
        raise ValueError(
            "There is no VAE in `vae`: the loader before it found none (a checkpoint without one, perhaps). Connect a "
            "Load Z-Image VAE node."
        )
