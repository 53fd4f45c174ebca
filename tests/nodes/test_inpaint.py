"""The two inpainting nodes around our sampler and ComfyUI's, and ComfyUI's own masks on our MODEL."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nano import judge, scenes

from ..helpers import NANO, relative
from . import test_model

patcher = test_model.patcher
native = test_model.native

DEFAULTS = {"grow": 0, "feather": 0, "crop": False, "context": 1.5, "megapixels": 0.0, "fill": "keep"}


@pytest.fixture(scope="module")
def parts(pack) -> SimpleNamespace:
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    model, vae = pack.bridge.model.load_model(NANO, torch.float32), pack.bridge.vae.ZImageVAE(NANO)
    return SimpleNamespace(model=model, vae=vae, encode=lambda text: pack.bridge.clip.encode(clip, text))


def drawn(width: int = 128, place: tuple[float, float] = (64.0, 64.0)) -> Tensor:
    """A red circle on blue, [1, 128, width, 3]."""
    red, blue = ((channel / 255 for channel in scenes.COLORS[name]) for name in ("red", "blue"))
    item = scenes.Item("circle", tuple(red), *place, 24.0)
    scene = scenes.Scene(width, 128, tuple(blue), (item,), "one", "blue", (("red", "circle"),))
    return (scenes.draw([scene]).movedim(1, -1) + 1) / 2


def around(width: int = 128, place: tuple[int, int] = (64, 64), reach: int = 32) -> Tensor:
    mask = torch.zeros(1, 128, width)
    mask[:, place[1] - reach : place[1] + reach, place[0] - reach : place[0] + reach] = 1
    return mask


def prepared(pack, parts, image: Tensor, mask: Tensor | None = None, **given: Any) -> Any:
    return pack.inpaint.ZImageInpaintPrepare.execute(parts.vae, image, mask=mask, **{**DEFAULTS, **given}).args


def finished(pack, parts, latents: Tensor, crop: Any, match_color: bool = False) -> Tensor:
    (image,) = pack.vae.ZImageVAEDecode.execute(parts.vae, {"samples": latents}).args
    return pack.inpaint.ZImageInpaintFinish.execute(image, crop, match_color).args[0]


def ours(pack, parts, text: str, latent: dict[str, Tensor]) -> Tensor:
    (out,) = pack.sampling.ZImageSampler.execute(parts.model, parts.encode(text), latent, 1, 8, 0.0, 0.0, 1.0, 1.0).args
    return out["samples"]


def stock(pack, parts, text: str, latent: dict[str, Tensor]) -> Tensor:
    sampler = importlib.import_module("nodes").KSampler()
    given = (1, 8, 1.0, "euler", "simple", parts.encode(text), parts.encode(""), latent)
    return sampler.sample(parts.model, *given)[0]["samples"]


@pytest.mark.parametrize("sampler", [ours, stock])
def test_an_object_is_repainted_and_nothing_else(pack, parts, sampler):
    image, mask = drawn(), around()
    latent, crop, shown, own = prepared(pack, parts, image, mask)
    assert torch.equal(shown, image) and torch.equal(own, mask)
    made = finished(pack, parts, sampler(pack, parts, "a green circle on a blue background", latent), crop)
    outside = (mask == 0).unsqueeze(-1).expand_as(image)
    assert torch.equal(made[outside], image[outside])
    background, objects = judge.read(made[0].movedim(-1, 0))
    assert background == "blue" and [(seen.color, seen.shape) for seen in objects] == [("green", "circle")]


def test_a_part_of_a_large_image_is_sampled_at_the_models_size(pack, parts):
    """The nano model knows 128x128; the image has eight times as many pixels, and its circle is elsewhere."""
    image, mask = drawn(1024, (640.0, 64.0)), around(1024, (640, 64))
    latent, crop, shown, own = prepared(pack, parts, image, mask, crop=True, context=2.0, megapixels=0.016384)
    assert latent["samples"].shape == (1, 16, 16, 16) and latent["noise_mask"].shape == (1, 1, 16, 16)
    assert shown.shape == (1, 128, 128, 3) and own.shape == (1, 128, 128)
    made = finished(pack, parts, ours(pack, parts, "a yellow circle on a blue background", latent), crop)
    assert made.shape == image.shape
    outside = (mask == 0).unsqueeze(-1).expand_as(image)
    assert torch.equal(made[outside], image[outside])
    _, objects = judge.read(made[0, :, 576:704].movedim(-1, 0))
    assert [(seen.color, seen.shape) for seen in objects] == [("yellow", "circle")]


def test_extended_sides_are_all_new_and_the_old_ones_stay(pack, parts):
    image = drawn()
    latent, crop, _, own = prepared(pack, parts, image, right=64)
    assert own[..., :128].max() == 0 and own[..., 128:].min() == 1
    made = finished(pack, parts, ours(pack, parts, "a blue background", latent), crop)
    assert made.shape == (1, 128, 192, 3) and torch.equal(made[:, :, :128], image)
    assert judge.read(made[0, :, 136:].movedim(-1, 0))[0] == "blue"


def test_batches(pack, parts):
    """One mask for two images, and two samples of each."""
    image = torch.cat((drawn(), drawn().flip(-1)))
    latent, crop, _, _ = prepared(pack, parts, image, around(), grow=8, feather=8)
    assert len(latent["samples"]) == len(latent["noise_mask"]) == 2
    made = finished(pack, parts, ours(pack, parts, "a green circle on a blue background", latent), crop)
    stays = crop.blend[:, 0].unsqueeze(-1).expand_as(image) == 0
    assert torch.equal(made[stays], image[stays])
    four = finished(pack, parts, latent["samples"].repeat(2, 1, 1, 1), crop, match_color=True)
    assert len(four) == 4 and (four - image.repeat(2, 1, 1, 1)).abs().mean() < 0.02


def test_hole_and_mask_suit_a_control_network_as_well(pack, parts, control_file, monkeypatch):
    monkeypatch.setattr(pack.bridge.folders, "control_path", lambda name: control_file)
    latent, crop, shown, own = prepared(pack, parts, drawn(), around())
    pair = {"inpaint_image": shown, "mask": own}
    (model,) = pack.control.ZImageControlNet.execute(parts.model, parts.vae, "x", 0.8, 0.0, 1.0, **pair).args
    steered = SimpleNamespace(**{**vars(parts), "model": model})
    made = finished(pack, parts, ours(pack, steered, "a green circle on a blue background", latent), crop)
    assert torch.equal(made[:, :32], drawn()[:, :32])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "There is nothing to repaint: connect `mask`, or extend a side"),
        ({"mask": torch.zeros(1, 128, 128)}, "the mask is empty"),
        ({"mask": torch.zeros(1, 64, 64)}, "`mask` is 64x64 and `image` 128x128"),
        ({"mask": torch.full((1, 128, 128), float("nan"))}, "`mask` holds NaN"),
        ({"mask": torch.zeros(1, 1, 128, 128)}, r"`mask` has the shape \[1, 1, 128, 128\]"),
        ({"mask": torch.ones(3, 128, 128), "image": drawn().repeat(2, 1, 1, 1)}, "`mask` is a batch of 3 for 2 images"),
        ({"context": float("inf"), "right": 8}, "`context` is inf"),
    ],
)
def test_bad_input_is_named(pack, parts, given, words):
    with pytest.raises(ValueError, match=words):
        prepared(pack, parts, given.pop("image", drawn()), **given)


@pytest.mark.parametrize("soft", [False, True])
def test_masks_of_other_nodes_do_what_they_do_natively(pack, comfy, patcher, native, soft):
    """SetLatentNoiseMask and DifferentialDiffusion with KSampler, on our MODEL and on ComfyUI's."""
    nodes = importlib.import_module("nodes")
    differential = importlib.import_module("comfy_extras.nodes_differential_diffusion").DifferentialDiffusion
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    positive, negative = (pack.bridge.clip.encode(clip, text) for text in ("a green circle on blue", ""))
    latent = {"samples": pack.bridge.vae.encode(pack.bridge.vae.ZImageVAE(NANO), drawn()[:, :64, :64])}
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64)
    (latent,) = nodes.SetLatentNoiseMask().set_mask(latent, ramp if soft else (ramp > 0.5).float())
    found = []
    for model in (patcher, native):
        (used,) = differential.execute(model).args if soft else (model,)
        (out,) = nodes.KSampler().sample(used, 1, 4, 2.0, "euler", "simple", positive, negative, latent)
        found.append(out["samples"])
    assert relative(found[0], found[1]) <= 1e-4
