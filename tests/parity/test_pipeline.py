"""The whole pipeline against diffusers' ZImagePipeline: the latents after eight steps, and the image."""

from __future__ import annotations

import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline
from diffusers import ZImagePipeline as ReferencePipeline

from zimage_core.pipeline import ZImagePipeline

from ..helpers import relative

CASES = {
    "no guidance": {},
    "guidance": {"guidance_scale": 3.0},
    "guidance, negative prompt of another length": {"guidance_scale": 2.0, "negative_prompt": "blurry " * 30},
    "normalization": {"guidance_scale": 4.0, "cfg_normalization": True},
    "normalization by a factor": {"guidance_scale": 4.0, "cfg_normalization": 0.7},
    "truncation": {"guidance_scale": 3.0, "cfg_truncation": 0.3},
    "normalization and truncation": {"guidance_scale": 5.0, "cfg_normalization": True, "cfg_truncation": 0.5},
}
PROMPTS = ["a red circle on a blue background", "two green stars beside a very long list of things " * 4]


MODELS = [("narrow", 0, {}), ("wide", 1, {"shift": 6.0}), ("narrow", 2, {"use_dynamic_shifting": True})]
# Every case with one model and every model with these are in `make test`, all of both in `make test-all`.
OFTEN = {"no guidance", "guidance, negative prompt of another length", "normalization and truncation"}
PAIRS = [
    pytest.param(model, case, marks=() if model is MODELS[0] or case in OFTEN else pytest.mark.slow)
    for model in MODELS
    for case in CASES
]


@pytest.fixture(scope="module")
def pipelines(request, make_snapshot):
    name, seed, scheduler = request.param
    folder = make_snapshot(name, seed, **scheduler)
    reference = ReferencePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return ZImagePipeline.from_pretrained(folder), reference


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("pipelines", "case"), PAIRS, indirect=["pipelines"], ids=str)
def test_latents_after_eight_steps(pipelines, case):
    ours, reference = pipelines
    settings = CASES[case]
    mine = ours.generate(PROMPTS, width=96, height=64, seed=11, output="latents", **settings)
    theirs = _reference(reference, settings, "latent", width=96, height=64)
    assert relative(mine, theirs) <= 1e-4


@pytest.mark.one_in(3)
@pytest.mark.parametrize("pipelines", MODELS, indirect=True, ids=str)
def test_image_with_several_per_prompt(pipelines):
    ours, reference = pipelines
    mine = ours.generate(PROMPTS, width=64, height=64, seed=11, batch_size=2)
    theirs = _reference(reference, {"num_images_per_prompt": 2}, "pt", width=64, height=64)
    assert mine.shape == (4, 3, 64, 64)
    assert (mine - theirs).abs().max() <= 1e-3


FULL = pytest.mark.slow  # what text to image covers but for its first step


@pytest.mark.parametrize("pipelines", MODELS, indirect=True, ids=str)
@pytest.mark.parametrize("strength, guidance", [(0.3, 3.0), (0.6, 0.0), pytest.param(1.0, 3.0, marks=FULL)])
def test_image_to_image(pipelines, strength, guidance):
    ours, reference = pipelines
    pipe, image = _with_images(ZImageImg2ImgPipeline, reference), _image()
    settings = {"strength": strength, "guidance_scale": guidance}
    mine = ours.generate(PROMPTS, image=image, posterior="sample", seed=11, output="latents", **settings)
    theirs = _reference(pipe, {"image": image * 2 - 1, **settings}, "latent", width=96, height=64)
    assert relative(mine, theirs) <= 1e-4


@pytest.mark.parametrize("pipelines", MODELS, indirect=True, ids=str)
@pytest.mark.parametrize("strength", [0.6, pytest.param(1.0, marks=FULL)])
def test_inpainting(pipelines, strength):
    """A mask on the grid of the latents: else diffusers takes a pixel of each of their cells, we the most of it."""
    ours, reference = pipelines
    pipe, image = _with_images(ZImageInpaintPipeline, reference), _image()
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 16:48, 24:72] = 1
    settings = {"strength": strength, "guidance_scale": 2.0}
    mine = ours.generate(PROMPTS, image=image, mask=mask, posterior="sample", seed=11, output="latents", **settings)
    given = {"image": image * 2 - 1, "mask_image": mask, **settings}
    theirs = _reference(pipe, given, "latent", width=96, height=64)
    assert relative(mine, theirs) <= 1e-4


def _image() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))


def _with_images(kind, reference):
    pipe = kind(**reference.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_bfloat16_is_no_further_from_float32_than_diffusers(make_snapshot):
    ours = theirs = 0.0
    for seed in range(3):
        folder = make_snapshot("wide", seed)
        exact = ZImagePipeline.from_pretrained(folder).generate(PROMPTS, width=64, height=64, seed=11, output="latents")
        pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.bfloat16)
        ours += relative(pipe.generate(PROMPTS, width=64, height=64, seed=11, output="latents"), exact)
        reference = ReferencePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        reference.set_progress_bar_config(disable=True)
        theirs += relative(_reference(reference, {}, "latent", width=64, height=64), exact)
    assert ours <= 1.1 * theirs


def _reference(pipe, settings, output, *, width, height):
    settings = {"guidance_scale": 0.0, **settings}
    negative = settings.pop("negative_prompt", None)
    return pipe(
        list(PROMPTS),  # a copy: diffusers writes into it
        negative_prompt=None if negative is None else [negative] * len(PROMPTS),
        width=width,
        height=height,
        num_inference_steps=8,
        generator=torch.Generator("cpu").manual_seed(11),
        output_type=output,
        **settings,
    ).images
