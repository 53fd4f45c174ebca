"""The data generator: images that match their captions, and a training set that evaluation never meets."""

from __future__ import annotations

import random

import pytest
import torch

from nano import captions, evaluate, latents, scenes, train_text
from zimage_core.model.tokenizer import WORDS

from ..helpers import NANO


def anything(color: str, shape: str) -> bool:
    return True


def test_eight_pairs_are_held_out_one_for_each_shape():
    pairs = [(c, s) for c in scenes.COLORS for s in scenes.SHAPES if scenes.held_out(c, s)]
    assert len(pairs) == 8
    assert {shape for _, shape in pairs} == set(scenes.SHAPES)


def test_training_scenes_name_no_held_out_pair():
    drawn = [latents.training_scene(0, 128, 128, index) for index in range(2000)]
    assert not any(scenes.held_out(*pair) for scene in drawn for pair in scene.objects)
    assert {pair for scene in drawn for pair in scene.objects} == {
        (c, s) for c in scenes.COLORS for s in scenes.SHAPES if not scenes.held_out(c, s)
    }


def test_held_out_cases_name_only_held_out_pairs():
    chosen = evaluate.cases(100, held_out=True)
    assert all(scenes.held_out(*pair) for case in chosen for pair in case.scene.objects)


def test_no_evaluation_scene_is_a_training_scene():
    trained = {latents.training_scene(0, 128, 128, index) for index in range(3000)}
    assert not trained & {case.scene for case in evaluate.cases(500)}


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (96, 128), (256, 192)])
def test_an_image_has_the_scenes_colors(size):
    width, height = size
    rng = random.Random(f"colors {size}")
    drawn = [scenes.sample(rng, width=width, height=height, allowed=anything) for _ in range(40)]
    images = scenes.draw(drawn)
    assert images.shape == (40, 3, height, width)
    assert images.min() >= -1 and images.max() <= 1
    for image, scene in zip(images, drawn, strict=True):
        torch.testing.assert_close(image[:, 0, 0], torch.tensor(scene.background) * 2 - 1)
        for item in scene.items:
            solid = item.shape != "ring"  # a ring shows the background at its centre
            inside = image[:, int(item.y), int(item.x)]
            torch.testing.assert_close(inside, torch.tensor(item.rgb if solid else scene.background) * 2 - 1)


def test_objects_lie_inside_the_image_on_the_latent_grid_and_apart():
    rng = random.Random("inside")
    for _ in range(2000):
        scene = scenes.sample(rng, allowed=anything)
        for item in scene.items:
            assert item.x % scenes.GRID == 0 and item.y % scenes.GRID == 0
            assert item.radius <= min(item.x, item.y, 128 - item.x, 128 - item.y) + 8
        for a, b in zip(scene.items, scene.items[1:], strict=False):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_is_negative_inside_and_positive_outside(shape):
    u, v = torch.tensor([[0.9 if shape == "ring" else 0.05, 2.0]]), torch.tensor([[0.0, 2.0]])
    inside, outside = scenes.distance(shape, u, v)[0]
    assert inside < 0 < outside


def test_an_unknown_shape_is_an_error():
    with pytest.raises(ValueError, match="'blob', expected one of circle"):
        scenes.distance("blob", torch.zeros(1), torch.zeros(1))


def test_scenes_of_two_sizes_do_not_mix():
    rng = random.Random(0)
    with pytest.raises(ValueError, match="one size"):
        scenes.draw([scenes.sample(rng), scenes.sample(rng, width=64)])


def test_a_blurred_scene_loses_its_edges_and_keeps_its_mean():
    rng = random.Random(3)
    sharp = scenes.sample(rng, kind="one")
    blurred = scenes.Scene(**{**vars(sharp), "blurred": True})
    a, b = scenes.draw([sharp, blurred])
    assert b.diff(dim=-1).abs().max() < 0.5 * a.diff(dim=-1).abs().max()
    assert (a.mean() - b.mean()).abs() < 0.05


def test_a_full_caption_says_all_that_is_judged():
    rng = random.Random("said")
    for _ in range(500):
        scene = scenes.sample(rng, allowed=anything)
        text = captions.describe(scene, rng).lower().replace("grey", "gray")
        assert scene.background_name in text
        for color, shape in scene.objects:
            assert color in text and shape in text
        if scene.kind == "one" and scene.place:
            assert any(word in text for word in (scene.place, "middle"))
        if scene.size:
            assert any(word in text for word in captions.SIZE_WORDS[scene.size])
        if scene.kind == "count":
            assert any(word in text for word in captions.NUMBERS[len(scene.objects)])


def test_training_captions_are_sometimes_empty_short_long_or_complaints():
    rng = random.Random("kinds")
    scene = scenes.sample(rng, kind="one")
    texts = [captions.caption(scene, rng) for _ in range(1000)]
    assert 60 < texts.count("") < 140
    assert any(text == f"{scene.background_name} background" for text in texts)
    assert any(len(text) > 100 for text in texts)
    blurred = scenes.Scene(**{**vars(scene), "blurred": True})
    assert all(
        any(c in text for c in ("blurry", *captions.COMPLAINTS))
        for text in (captions.caption(blurred, rng, empty=0) for _ in range(50))
    )


def test_every_question_has_its_answer_in_every_scene():
    rng = random.Random("questions")
    for _ in range(300):
        found = train_text.answers(scenes.sample(rng, allowed=anything))
        assert len(found) == len(train_text.QUESTIONS)
        assert all(
            0 <= index < len(options) for index, options in zip(found, train_text.QUESTIONS.values(), strict=True)
        )


def test_the_snapshot_lists_all_words_that_training_says():
    assert (NANO / "tokenizer" / WORDS).read_text(encoding="utf-8").split() == captions.words()
