"""The nano model's control network: outlines say what is where, if the prompt leaves that open."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nano import judge, scenes, train_control
from zimage_core.pipeline import ZImagePipeline
from zimage_core.sampling.control import Control

from ..helpers import NANO

FILE = train_control.OUT
AT_ONCE = 20


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(NANO)


def drawn(count: int, name: str, **options: object) -> list[scenes.Scene]:
    """Scenes that training never drew: its seeds have other names."""
    return [scenes.sample(random.Random(f"{name} {index}"), **options) for index in range(count)]


def colors(scene: scenes.Scene) -> str:
    """Of an object and the background; position, count and shape are left open."""
    return f"{scene.objects[0][0]} shapes on a {scene.background_name} background"


def a_color(scene: scenes.Scene) -> str:
    """The background may become the same, and then nothing is to be seen."""
    return scene.objects[0][0]


def another_shape(scene: scenes.Scene) -> str:
    """One object in the middle, of a shape that is not in the scene."""
    color, shape = scene.objects[0]
    return f"a {color} {'star' if shape == 'ring' else 'ring'} on a {scene.background_name} background"


def made(
    pipe: ZImagePipeline, chosen: list[scenes.Scene], strength: float, said: Callable = colors, **settings: object
) -> Tensor:
    """Images of these scenes' outlines; said: the prompt of each."""
    found = []
    for at in range(0, len(chosen), AT_ONCE):
        part = chosen[at : at + AT_ONCE]
        control = [Control(FILE, train_control.outlines(part), strength)]
        size = {"width": 128, "height": 128, "steps": 8, "seed": list(range(at, at + len(part)))}
        found.append(pipe.generate([said(scene) for scene in part], control=control, **size, **settings))
    return torch.cat(found)


def test_the_file_is_small_and_open():
    assert FILE.stat().st_size <= 3e6
    assert Path(FILE).suffix == ".safetensors"


@pytest.mark.parametrize(
    "said, count, least",
    [
        (colors, 10, 0.95),
        pytest.param(colors, 120, 0.95, marks=pytest.mark.slow),
        pytest.param(a_color, 120, 0.85, marks=pytest.mark.slow),
        pytest.param(another_shape, 120, 0.9, marks=pytest.mark.slow),
    ],
)
def test_position_count_and_shape_follow_the_outlines(pipe, said, count, least):
    chosen = drawn(count, "follow")
    steered, free = (made(pipe, chosen, strength, said) for strength in (1.0, 0.0))
    follow = [judge.follows(image, scene) for image, scene in zip(steered, chosen, strict=True)]
    chance = [judge.follows(image, scene) for image, scene in zip(free, chosen, strict=True)]
    print(f"{said.__name__}: {sum(follow)} of {count} follow, without the outlines {sum(chance)}")
    assert sum(follow) / count >= least
    assert sum(chance) / count <= 0.1


def test_no_strength_is_no_control(pipe):
    (scene,) = drawn(1, "follow")
    settings = {"width": 128, "height": 128, "steps": 8, "seed": [0], "output": "latents"}
    plain = pipe.generate([colors(scene)], **settings)
    assert torch.equal(made(pipe, [scene], 0.0, output="latents"), plain)
