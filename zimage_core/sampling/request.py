"""What `ZImagePipeline.generate` is asked for, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import images


@dataclass(frozen=True)
class Source:
    """An image to begin with, at the size that is made."""

    image: Tensor  # [1 or B, 3, height, width]
    mask: Tensor | None  # [1 or B, 1, height, width]
    strength: float

    @classmethod
    def of(
        cls, image: Tensor | None, mask: Tensor | None, strength: float | None, batch: int, height: int, width: int
    ) -> Source | None:
        if image is None:
            if mask is not None or strength is not None:
                raise ValueError(f"{'mask' if mask is not None else 'strength'} is for an image, and none is given")
            return None
        images.check("the image", image, 3, batch)
        if mask is not None:
            images.check("the mask", mask, 1, batch)
            if mask.shape[-2:] != image.shape[-2:]:
                sizes = [f"{x.shape[-1]}x{x.shape[-2]}" for x in (mask, image)]
                raise ValueError(f"the mask is {sizes[0]} and the image {sizes[1]}; give them one size")
            mask = images.fitted(mask, height, width)
        return cls(images.fitted(image, height, width), mask, strength_of(strength, mask))


def strength_of(strength: float | None, mask: Any) -> float:
    """The one that is given, else 0.6, with a mask 1: diffusers' defaults."""
    return (0.6 if mask is None else 1.0) if strength is None else strength


def size(width: int | None, height: int | None, image: Tensor | None) -> tuple[int, int]:
    """What is not given: that of the image, in multiples of 16, else 1024."""
    own = (1024, 1024) if image is None or image.ndim != 4 else (image.shape[-1], image.shape[-2])
    found = [
        max(16, side // 16 * 16) if given is None else given for given, side in zip((width, height), own, strict=True)
    ]
    return found[0], found[1]


def check(prompts: list[str], width: int, height: int, batch_size: int, output: Any) -> None:
    if not prompts:
        raise ValueError("no prompt given; an empty string is a valid prompt")
    for name, value in (("width", width), ("height", height)):
        if value < 16 or value % 16:
            nearest = max(16, round(value / 16) * 16)
            raise ValueError(f"{name} is {value}, but must be divisible by 16; the nearest is {nearest}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    if output not in ("image", "latents"):
        raise ValueError(f'output is {output!r}, expected "image" or "latents"')


def spread(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    if len(negative_prompt) != count:
        raise ValueError(f"{len(negative_prompt)} negative prompts for {count} prompts; give one, or one for each")
    return list(negative_prompt)


def repeat(items: list[Tensor], times: int) -> list[Tensor]:
    return [item for item in items for _ in range(times)]
