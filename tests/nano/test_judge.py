"""The judge on drawn truth: it must read nearly everything right, and say wrong of what is wrong."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from nano import judge, scenes


def truth(count: int, name: str, **options) -> tuple[list[scenes.Scene], torch.Tensor]:
    rng = random.Random(name)
    drawn = [scenes.sample(rng, allowed=lambda color, shape: True, **options) for _ in range(count)]
    return drawn, scenes.draw(drawn) / 2 + 0.5


@pytest.mark.parametrize(
    ("size", "lowest"),
    # in images of 64 pixels the smallest shapes are 16 pixels wide, too few to tell all of them apart
    [
        ((128, 128), 0.99),
        ((96, 128), 0.99),
        pytest.param((256, 256), 0.99, marks=pytest.mark.slow),
        ((64, 64), 0.95),
    ],
)
def test_drawn_truth_is_read_right(size, lowest):
    width, height = size
    drawn, images = truth(400, f"judge {size}", width=width, height=height)
    said = defaultdict(list)
    for image, scene in zip(images, drawn, strict=True):
        for name, right in judge.mark(image, scene).items():
            said[name].append(right)
    found = {name: sum(right) / len(right) for name, right in said.items()}
    assert set(found) == {"background", "count", "color", "shape", "place", "relation", "size", "all"}
    assert all(share >= lowest for share in found.values()), found


def test_a_little_noise_does_not_confuse_it():
    drawn, images = truth(100, "noise")
    noisy = (images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    marks = [judge.mark(image, scene)["all"] for image, scene in zip(noisy, drawn, strict=True)]
    assert sum(marks) >= 97


def test_every_wrong_attribute_is_called_wrong():
    drawn, images = truth(150, "wrong", kind="one")
    for image, scene in zip(images, drawn, strict=True):
        ((color, shape),) = scene.objects
        others = {
            "background": replace(scene, background_name=other(scenes.COLORS, scene.background_name)),
            "color": replace(scene, objects=((other(scenes.COLORS, color), shape),)),
            "shape": replace(scene, objects=((color, other(scenes.SHAPES, shape)),)),
            "count": replace(scene, objects=scene.objects * 2),
        }
        if scene.place:
            others["place"] = replace(scene, place=other(scenes.PLACES, scene.place))
        if scene.size:
            others["size"] = replace(scene, size=other(scenes.SIZES, scene.size))
        for attribute, asked in others.items():
            marks = judge.mark(image, asked)
            assert not marks[attribute], (attribute, scene)
            assert not marks["all"]
            assert all(right for name, right in marks.items() if name not in (attribute, "all")), (marks, scene)


def test_a_pair_the_wrong_way_round_is_wrong():
    drawn, images = truth(60, "pairs", kind="pair")
    turned = {"left": "right", "right": "left", "above": "below", "below": "above"}
    across = {"left": "above", "right": "below", "above": "left", "below": "right"}
    for image, scene in zip(images, drawn, strict=True):
        first, second = scene.objects
        marks = judge.mark(image, replace(scene, relation=turned[scene.relation]))
        assert not marks["color"] or first[0] == second[0]
        assert not marks["shape"] or first[1] == second[1]
        assert not marks["all"]
        assert not judge.mark(image, replace(scene, relation=across[scene.relation]))["relation"]


def test_counts_and_rows_are_told_apart():
    drawn, images = truth(60, "counts", kind="count")
    for image, scene in zip(images, drawn, strict=True):
        wrong = 5 - len(scene.objects)  # two for three and three for two
        assert not judge.mark(image, replace(scene, objects=scene.objects[:1] * wrong))["count"]
        turned = "row" if scene.place == "column" else "column"
        assert not judge.mark(image, replace(scene, place=turned))["place"]


def test_nothing_is_not_something():
    drawn, _ = truth(30, "nothing")
    for scene in drawn:
        blank = torch.tensor(scene.background).view(3, 1, 1).expand(3, 128, 128)
        marks = judge.mark(blank, scene)
        assert marks == {name: name == "background" for name in marks}


def test_noise_and_smears_have_no_shape():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        smear = torch.nn.functional.interpolate(coarse, size=(128, 128), mode="bicubic").clamp(0, 1)[0]
        _, objects = judge.read(smear)
        assert sum(seen.shape is not None for seen in objects) <= max(1, len(objects) // 2)


def test_a_color_of_no_name_has_none():
    image = torch.tensor([0.35, 0.9, 0.1]).view(3, 1, 1).expand(3, 128, 128)
    assert judge.read(image) == (None, [])


def other(options, right):
    return next(option for option in options if option != right)
