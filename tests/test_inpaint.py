"""Cutting a part out for repainting and putting it back: sizes, edges, what has to stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zimage_core import inpaint


def drawn(batch: int = 1, height: int = 120, width: int = 200) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def masked(size: tuple[int, int] = (120, 200), top: int = 50, left: int = 90, tall: int = 20, wide: int = 40) -> Tensor:
    mask = torch.zeros(1, 1, *size)
    mask[..., top : top + tall, left : left + wide] = 1
    return mask


WAYS = [
    {"crop": False},
    {},
    {"pixels": 128 * 128},
    {"context": 4.0, "pixels": 96 * 96},
    {"grow": 9, "feather": 8},
    {"extend": (24, 0, 40, 16), "crop": False},
    {"extend": (24, 8, 40, 16)},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_cut_out_suits_the_model_and_goes_back_where_it_was(way):
    """Unchanged, it gives the image again: but for rounding, and where it was scaled."""
    image = drawn()
    part, hole, crop = inpaint.prepare(image, masked(), **way)
    assert part.shape[2] % 16 == part.shape[3] % 16 == 0 and hole.shape == (1, 1, *part.shape[2:])
    if (pixels := way.get("pixels")) is not None:
        assert pixels <= part.shape[2] * part.shape[3] <= 1.5 * pixels
    back = inpaint.finish(part, crop)
    left, above, right, below = way.get("extend", (0, 0, 0, 0))
    assert back.shape == (1, 3, 120 + above + below, 200 + left + right)
    own = back[..., above : above + 120, left : left + 200]
    if not way.get("pixels"):
        assert (own - image).abs().max() < 1e-6
    outside = inpaint.prepare(image, masked(), **way)[2].blend[..., above : above + 120, left : left + 200] == 0
    assert torch.equal(own[outside.expand_as(own)], image[outside.expand_as(image)])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_everything_else_stays_bit_for_bit(way):
    image = drawn(2)
    part, _, crop = inpaint.prepare(image, masked().expand(2, 1, 120, 200), **way)
    back = inpaint.finish(1 - part, crop)
    changed = (back != crop.canvas).any(1, keepdim=True)
    assert torch.equal(back.masked_select(~changed), crop.canvas.masked_select(~changed))
    assert not (changed & (crop.repainted == 0)).any() and changed.any()
    inside = crop.blend == 1
    assert inside.any() and (back - crop.canvas).abs().masked_select(inside).mean() > 0.1


def test_shapes_are_kept():
    """A circle that is cut out and scaled is a circle."""
    for size in ((120, 200), (300, 90)):
        y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
        circle = (((y - size[0] / 2) ** 2 + (x - size[1] / 2) ** 2) < 20**2).float()[None, None]
        part, _, _ = inpaint.prepare(circle.expand(1, 3, *size), circle, pixels=256 * 256, context=3.0)
        rows, columns = ((part[0, 0] > 0.5).any(dim).sum().item() for dim in (1, 0))
        assert abs(rows - columns) <= 2


def test_the_new_image_fades_in_inwards_from_the_edge_of_the_mask():
    _, _, crop = inpaint.prepare(drawn(), masked(), grow=10, feather=10, crop=False)
    row = crop.blend[0, 0, 60]
    assert row[79] == 0 and row[80] > 0 and row[95] == 1  # the grown mask begins at 80
    assert (row[80:90].diff() > 0).all()
    whole = torch.ones(1, 1, 120, 200)  # the sides of the image are no edges
    assert inpaint.prepare(drawn(), whole, feather=10, crop=False)[2].blend.min() == 1


def test_fillings():
    image, hole = torch.full((1, 3, 32, 32), 0.2), masked((32, 32), 8, 8, 16, 16)
    image[hole.expand_as(image) > 0] = 1.0
    outside = (hole == 0).expand_as(image)
    for fill in inpaint.FILLS:
        done = inpaint.filled(image, hole, fill)
        assert torch.equal(done[outside], image[outside])
        inner = done[~outside]
        if fill == "keep":
            assert (inner == 1).all()
        elif fill == "neutral":
            assert (inner == 0.5).all()
        elif fill == "blurred":
            assert (inner - 0.2).abs().max() < 1e-5
        else:
            assert inner.std() > 0.2 and torch.equal(done, inpaint.filled(image, hole, fill))
    with pytest.raises(ValueError, match="fill is 'black', expected one of keep"):
        inpaint.filled(image, hole, "black")
    everything = torch.ones(1, 1, 32, 32)  # nothing is known
    assert inpaint.filled(image, everything, "blurred").isfinite().all()


def test_no_seam_where_colors_came_out_otherwise():
    """A part that is darker all over, and one whose shade changes from left to right."""
    image = drawn() * 0.5 + 0.2
    part, hole, crop = inpaint.prepare(image, masked(), crop=False)
    for shade in (torch.full((200,), -0.1), torch.linspace(-0.1, 0.1, 208)[4:204]):
        off = part + F.pad(shade, (0, part.shape[-1] - 200))
        seen = [(inpaint.finish(off, crop, match_color=way) - image).abs().max() for way in (False, True)]
        assert seen[0] > 0.01 and seen[1] < 0.02
    new = torch.where(hole > 0, 1 - part, part)  # what is new is as it came
    assert torch.equal(inpaint.finish(new, crop), inpaint.finish(new, crop, match_color=False))


def test_several_images_for_each_that_was_cut_out():
    image = drawn(2)
    part, _, crop = inpaint.prepare(image, masked().expand(2, 1, 120, 200))
    four = inpaint.finish(torch.cat((part, 1 - part)), crop)
    assert torch.equal(four[2:], inpaint.finish(1 - part, crop))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="the mask is empty"):
        inpaint.prepare(drawn(), torch.zeros(1, 1, 120, 200))
    part, _, crop = inpaint.prepare(drawn(2), masked().expand(2, 1, 120, 200))
    for other in (part[:1], part[..., :32], torch.cat((part, part[:1]))):
        with pytest.raises(ValueError, match="as they were cut out"):
            inpaint.finish(other, crop)
