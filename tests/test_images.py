"""Images to begin with, masks and control in `generate`: rules, limits and what is said of bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nano.train_control import build
from zimage_core import images
from zimage_core.errors import CheckpointError
from zimage_core.pipeline import ZImagePipeline
from zimage_core.sampling.control import Control
from zimage_core.sampling.start import Repaint, left_out

from .helpers import NANO

PROMPT = "a red circle on a blue background"
SMALL = {"width": 64, "height": 64, "steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(NANO)


@pytest.fixture(scope="module")
def image(pipe) -> torch.Tensor:
    return pipe.generate("a green star on a white background", **SMALL)


def test_fitting_never_stretches():
    image = torch.zeros(1, 3, 40, 80)
    image[..., 30:50] = 1  # a square bar, 20 wide and 40 high, in the middle
    covered = images.fitted(image, 64, 64)
    assert covered.shape == (1, 3, 64, 64)
    assert (covered[0, 0, 32] > 0.5).sum() == 32  # scaled by 1.6, the sides cut off
    within = images.fitted(image, 64, 64, fill=0.25)
    assert (within[0, 0, 32] > 0.5).sum() == 16  # by 0.8
    assert torch.equal(within[..., :16, :], torch.full((1, 3, 16, 64), 0.25))
    assert images.fitted(image, 40, 80) is image


def test_an_image_at_no_strength_and_at_full():
    assert [left_out(8, strength) for strength in (1.0, 0.6, 0.5, 0.125)] == [0, 3, 4, 7]  # int(8 - 8 * strength)
    for strength in (0.0, 1.5, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"strength is {strength}, expected more than 0"):
            left_out(8, strength)


def test_full_strength_is_text_to_image(pipe, image):
    """The posterior's mean draws nothing, so the noise is that of the seed."""
    begun = pipe.generate(PROMPT, image=image, strength=1.0, output="latents", **SMALL)
    assert torch.equal(begun, pipe.generate(PROMPT, output="latents", **SMALL))


def test_pixels_outside_the_mask_stay_bit_for_bit(pipe, image):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 21:50, 13:40] = 1  # on no boundary of latents
    made = pipe.generate(PROMPT, image=image, mask=mask, **SMALL)
    outside = mask.expand_as(made) == 0
    assert torch.equal(made[outside], image[outside])
    assert (made - image).abs()[~outside].mean() > 0.02


def test_masks_of_one_value(pipe, image):
    """All 0 changes nothing; all 1 is text to image."""
    ones = torch.ones(1, 1, 64, 64)
    assert torch.equal(pipe.generate(PROMPT, image=image, mask=0 * ones, **SMALL), image)
    assert torch.equal(pipe.generate(PROMPT, image=image, mask=ones, **SMALL), pipe.generate(PROMPT, **SMALL))


def test_a_soft_mask_lets_go_for_its_share_of_the_steps():
    clean, noise, free = torch.full((1, 1, 1, 3), 5.0), torch.ones(1, 1, 1, 3), torch.full((1, 1, 1, 3), -1.0)
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    repaint = Repaint(clean, noise, torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3), sigmas)
    seen = [repaint(free, step).flatten().tolist() for step in (1, 2, 3, 4)]
    assert seen == [[2.0, 2.0, -1.0], [3.0, 3.0, -1.0], [4.0, -1.0, -1.0], [5.0, -1.0, -1.0]]


def test_control_of_no_strength_is_none(pipe, control_file, image):
    plain = pipe.generate(PROMPT, output="latents", **SMALL)

    def steered(**settings) -> torch.Tensor:
        return pipe.generate(PROMPT, control=[Control(control_file, image, **settings)], output="latents", **SMALL)

    assert torch.equal(steered(strength=0.0), plain)
    assert not torch.equal(steered(), plain)
    first, second = steered(end=0.5), steered(start=0.5)
    assert not torch.equal(first, second) and not torch.equal(first, plain)


def test_start_and_end_part_the_steps(pipe, control_file, image, monkeypatch):
    """Two halves that meet see each step once."""
    seen: list[float] = []
    forward = type(pipe.transformer).forward

    def spy(self, latents, t, features, **rest):
        seen.append(len(rest.get("controls", ())))
        return forward(self, latents, t, features, **rest)

    monkeypatch.setattr(type(pipe.transformer), "forward", spy)
    for start, end, steps in ((0, 0.5, [1, 1, 0, 0]), (0.5, 1, [0, 0, 1, 1]), (0.3, 0.6, [0, 0, 1, 0])):
        seen.clear()
        pipe.generate(PROMPT, control=[Control(control_file, image, start=start, end=end)], **SMALL)
        assert seen == steps


def test_what_is_repainted_is_told_to_the_network(pipe, control_file, image):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    settings = {**SMALL, "image": image, "mask": mask, "output": "latents"}
    told = pipe.generate(PROMPT, control=[Control(control_file)], **settings)
    same = Control(control_file, mask=mask, inpaint_image=image)
    assert torch.equal(told, pipe.generate(PROMPT, control=[same], **settings))
    other = Control(control_file, mask=mask, inpaint_image=1 - image)
    assert not torch.equal(told, pipe.generate(PROMPT, control=[other], **settings))


def test_both_halves_of_guidance_are_steered(pipe, control_file, image):
    control = [Control(control_file, image)]
    settings = {**SMALL, "guidance_scale": 2.0, "output": "latents", "control": control}
    guided = pipe.generate(PROMPT, "blurry", **settings)
    assert not torch.equal(guided, pipe.generate(PROMPT, "blurry", **{**settings, "control": ()}))


def test_one_control_image_for_all_or_one_for_each(pipe, control_file, image):
    both = torch.cat((image, image.flip(-1)))
    settings = {**SMALL, "seed": [3, 3], "batch_size": 2, "output": "latents"}
    one = pipe.generate(PROMPT, control=[Control(control_file, image)], **settings)
    each = pipe.generate(PROMPT, control=[Control(control_file, both)], **settings)
    assert (each[0] - each[1]).abs().mean() > 0.01
    torch.testing.assert_close(one[1], one[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(each[0], one[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"image": torch.zeros(1, 4, 64, 64)}, r"the image has shape \[1, 4, 64, 64\], expected \[batch, 3"),
        ({"image": torch.full((1, 3, 64, 64), math.nan)}, "the image holds NaN"),
        ({"image": torch.full((1, 3, 64, 64), 255.0)}, "the image holds numbers from 255 to 255, expected 0 to 1"),
        ({"image": torch.zeros(3, 3, 64, 64)}, "the image is a batch of 3 for 1 images"),
        ({"mask": torch.zeros(1, 1, 64, 64)}, "mask is for an image, and none is given"),
        ({"strength": 0.5}, "strength is for an image, and none is given"),
        (
            {"image": torch.zeros(1, 3, 64, 64), "mask": torch.zeros(1, 1, 32, 64)},
            "the mask is 64x32 and the image 64x64; give them one size",
        ),
        ({"image": torch.zeros(1, 3, 64, 64), "posterior": "mode"}, "posterior is 'mode'"),
    ],
)
def test_bad_images_are_named(pipe, settings, words):
    with pytest.raises(ValueError, match=words):
        pipe.generate(PROMPT, **{**SMALL, **settings})


GOOD = {"path": "x", "image": torch.zeros(1, 3, 64, 64)}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"strength": math.nan}, "strength is nan"),
        ({"start": 0.5, "end": 0.5}, "acts from 0.5 to 0.5"),
        ({"end": 1.5}, "to 1.5"),
        ({"mask": torch.zeros(1, 1, 64, 64)}, "a mask without an image to repaint"),
        ({"inpaint_image": torch.zeros(1, 3, 64, 64)}, "an image without a mask"),
    ],
)
def test_bad_control_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Control(**{**GOOD, **settings})


def test_bad_control_files_and_images_are_named(pipe, control_file, image):
    with pytest.raises(ValueError, match="the control image is a batch of 3 for 1 images"):
        pipe.generate(PROMPT, control=[Control(control_file, image.repeat(3, 1, 1, 1))], **SMALL)
    with pytest.raises(ValueError, match="needs a control image, or an image to repaint and its mask"):
        pipe.generate(PROMPT, control=[Control(control_file)], **SMALL)
    with pytest.raises(CheckpointError, match="this is a Z-Image transformer, not a Z-Image control network"):
        model = NANO / "transformer" / "diffusion_pytorch_model.safetensors"
        pipe.generate(PROMPT, control=[Control(model, image)], **SMALL)
    old = dataclasses.replace(Control(control_file, image, mask=image[:, :1], inpaint_image=image))
    network = build(pipe.transformer)
    network.config = dataclasses.replace(network.config, in_channels=16, refined="blocks")
    with pytest.raises(ValueError, match=r"this control network \(Union 1.0\) can't repaint"):
        old.check(network.config, 1)
    assert pipe.generate(PROMPT, **SMALL).isfinite().all()
