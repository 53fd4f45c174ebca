"""The pipeline's contract: shapes, ranges, seeds, batches, and input it refuses."""

from __future__ import annotations

import pytest
import torch

from zimage_core.errors import CheckpointError
from zimage_core.pipeline import ZImagePipeline
from zimage_core.sampling import loop

from .helpers import NANO

SMALL = {"width": 64, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(NANO)


def test_shapes_and_ranges(pipe):
    image = pipe.generate("a red circle", **SMALL)
    assert image.shape == (1, 3, 32, 64) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    latents = pipe.generate("a red circle", output="latents", **SMALL)
    assert latents.shape == (1, 16, 4, 8) and latents.dtype == torch.float32
    assert torch.equal(pipe.decode(latents), image)


def test_the_same_seed_gives_the_same_image(pipe):
    first, again = (pipe.generate("a red circle", seed=5, **SMALL) for _ in range(2))
    other = pipe.generate("a red circle", seed=6, **SMALL)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_prompts_times_batch_size_in_order(pipe):
    prompts = ["a red circle", "a blue square on a white background"]
    batch = pipe.generate(prompts, seed=[1, 2, 3, 4], batch_size=2, output="latents", **SMALL)
    for i, (prompt, seed) in enumerate([(prompts[0], 1), (prompts[0], 2), (prompts[1], 3), (prompts[1], 4)]):
        alone = pipe.generate(prompt, seed=seed, output="latents", **SMALL)
        assert torch.allclose(batch[i], alone[0], atol=1e-4)


def test_one_seed_draws_the_whole_batch_from_one_generator(pipe):
    batch = pipe.generate("a red circle", seed=9, batch_size=2, output="latents", **SMALL)
    first = pipe.generate("a red circle", seed=9, output="latents", **SMALL)
    assert torch.allclose(batch[0], first[0], atol=1e-4)
    assert not torch.allclose(batch[1], first[0], atol=1e-2)


def test_the_negative_prompt_counts_only_with_guidance(pipe):
    plain, same = (pipe.generate("a red circle", negative, **SMALL) for negative in (None, "a blue background"))
    assert torch.equal(plain, same)
    guided, other = (
        pipe.generate("a red circle", negative, guidance_scale=2.0, **SMALL) for negative in ("", "a blue background")
    )
    assert not torch.allclose(guided, other, atol=1e-3)
    assert torch.equal(guided, pipe.generate("a red circle", None, guidance_scale=2.0, **SMALL))


def test_callback_and_cancellation(pipe):
    steps = []
    pipe.generate("a red circle", callback=lambda step, *_: steps.append(step), **SMALL)
    assert steps == [1, 2]
    with pytest.raises(loop.Cancelled):
        pipe.generate("a red circle", callback=lambda *_: False, **SMALL)
    assert pipe.generate("a red circle", **SMALL).shape == (1, 3, 32, 64)  # and it goes on working


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 100}, "width is 100, but must be divisible by 16; the nearest is 96"),
        ({"height": 8}, "height is 8"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"output": "pil"}, "output is 'pil'"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ],
)
def test_wrong_settings_are_named(pipe, settings, words):
    with pytest.raises(ValueError) as error:
        pipe.generate("a red circle", **{**SMALL, **settings})
    assert words in str(error.value)


def test_no_prompt_and_a_prompt_that_is_no_text(pipe):
    with pytest.raises(ValueError, match="no prompt given"):
        pipe.generate([], **SMALL)
    with pytest.raises(TypeError, match="a prompt must be a string, got int"):
        pipe.generate([7], **SMALL)


def test_float16_gives_the_image_of_float32():
    """The nano model's activations reach a million, which float16 doesn't hold as they are."""
    latents = [
        ZImagePipeline.from_pretrained(NANO, dtype=dtype).generate("a red circle", output="latents", **SMALL)
        for dtype in (torch.float32, torch.float16)
    ]
    assert (latents[1] - latents[0]).norm() <= 5e-3 * latents[0].norm()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("transformer", "layers.1.attention.qkv.weight"),
        ("text_encoder", "model.layers.0.mlp.up_proj.weight"),
        ("vae", "decoder.mid.block_1.conv1.bias"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(kind, name):
    pipe = ZImagePipeline.from_pretrained(NANO)
    with torch.no_grad():
        weight = getattr(pipe, kind).get_parameter(name)
        weight.copy_(weight)
        weight.view(-1)[3] = float("nan")
    words = f"{name} of the {kind.replace('_', ' ')} has values that are not finite .* download it again"
    with pytest.raises(CheckpointError, match=words):
        pipe.generate("a red circle", width=64, height=64, steps=1)


def test_latents_that_are_not_finite_are_told_from_damage():
    pipe = ZImagePipeline.from_pretrained(NANO)
    with pytest.raises(ValueError, match="the latents to decode hold values that are not finite .* at fault"):
        pipe.decode(torch.full((1, 16, 8, 8), float("inf")))
