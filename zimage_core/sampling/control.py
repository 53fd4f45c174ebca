"""Steering by images, as people ask for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import images
from ..config import ControlConfig
from ..model.control import ActiveControl, ControlNetwork, control_latents
from .schedule import shifted

STRENGTH = 0.8  # its makers' default (predict_t2i_control.py of VideoX-Fun); their cards name 0.65 to 1
SAME = 1e-6  # two noise levels; float32 and float64 round them differently


@dataclass(frozen=True)
class Control:
    """One control network, and what it is to see.

    path: a Fun-Controlnet-Union file. image: [1 or B, 3, H, W] in 0..1, the control map (edges, depth, pose, ...).
    strength: of its hints, 0 is none. start, end: shares of the way from noise to image between which it steers.
    mask, inpaint_image: for networks of version 2, an image to repaint where the mask [1 or B, 1, H, W] is 1. By
        default the image and mask of the run, if it has any.
    Raises ValueError, naming the value.
    """

    path: str | Path
    image: Tensor | None = None
    strength: float = STRENGTH
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None
    inpaint_image: Tensor | None = None

    def __post_init__(self) -> None:
        check(self.strength, self.start, self.end)
        if (self.mask is None) != (self.inpaint_image is None):
            given, missing = ("a mask", "an image to repaint") if self.mask is not None else ("an image", "a mask")
            raise ValueError(f"control has {given} without {missing}; give both inpaint_image and mask, or neither")

    def check(self, config: ControlConfig, count: int) -> None:
        """Whether this network takes it, for so many images."""
        check_inputs(config, self.image is not None, self.mask is not None)
        if self.image is not None:
            images.check("the control image", self.image, 3, count)
        if self.mask is not None and self.inpaint_image is not None:
            images.check("the image to repaint", self.inpaint_image, 3, count)
            images.check("its mask", self.mask, 1, count)


def check(strength: float, start: float, end: float) -> None:
    if not math.isfinite(strength):
        raise ValueError(f"the control's strength is {strength}, expected a number; 0 switches it off")
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"the control acts from {start:g} to {end:g}, expected shares of the way from noise (0) to image (1), "
            "the start below the end"
        )


def check_inputs(config: ControlConfig, has_image: bool, has_mask: bool) -> None:
    """Raises ValueError where a network can't use what it is given."""
    if has_mask and not config.inpaints:
        raise ValueError(
            f"this control network ({config.version}) can't repaint; leave the image to repaint and its mask out, or "
            "use one of version 2.0 or later"
        )
    if not has_image and not has_mask:
        raise ValueError("a control network needs a control image, or an image to repaint and its mask")


@dataclass(frozen=True)
class Working:
    """A control network with what it reads, for the steps of a run."""

    network: ControlNetwork
    latents: Tensor  # see `model.control.control_latents`
    strength: float
    first: float  # noise level at which it begins
    last: float  # and at which it has ended

    def at(self, sigma: float) -> list[ActiveControl]:
        """It, where it steers at this noise level; else nothing."""
        acts = self.strength and self.last + SAME < sigma <= self.first + SAME
        return [ActiveControl(self.network, self.latents, self.strength)] if acts else []


def working(
    control: Control,
    network: ControlNetwork,
    encode: Callable[[Tensor], Tensor],
    downscale: int,
    size: tuple[int, int],
    shift: float,
) -> Working:
    """A control with its images encoded.

    encode: images in 0..1 to scaled latents, of 1 / downscale their sides. size: (height, width) in pixels.
    shift: of the schedule.
    """
    image = keep = masked = None
    if control.image is not None:
        image = encode(images.fitted(control.image, *size))
    if control.mask is not None and control.inpaint_image is not None:
        own, mask = (images.fitted(x, *size) for x in (control.inpaint_image, control.mask))
        gray, keep = images.hole(own, mask, downscale)
        masked = encode(gray)
    latents = control_latents(image, keep, masked, network.config)
    first, last = (shifted(1 - share, shift) for share in (control.start, control.end))
    return Working(network, latents, control.strength, first, last)
