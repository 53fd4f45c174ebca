"""Captioned scenes drawn from signed distances: what the nano model is taught, and what its bars are measured on.

A scene is one object, two objects side by side or one above the other, or two or three equal objects, in flat colors
on a flat background. Centers lie on a coarse grid and each size of shape has one radius, so that a shape looks the same
wherever it is met. An object whose place the caption leaves open is in the middle: where the seed chose between nearby
places, a model of this size drew two half ghosts. The seed decides tints, and colors that the caption leaves open.

Letters: B images, H W height and width in pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "orange": (245, 140, 30),
    "purple": (140, 60, 180),
    "pink": (250, 150, 190),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "brown": (125, 75, 40),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
EXTRA_SHAPES = ("moon",)  # drawn and judged, but not shown to the model: its LoRA brings them
PLACES: dict[str, tuple[float, float]] = {  # center, as a share of width and height
    "center": (0.5, 0.5),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
RELATIONS = ("left", "right", "above", "below")
SIZES = ("small", "large")
SIZE = 128  # pixels: the size that most images have, and that the radii below are given for
GRID = 8  # pixels, one latent pixel: centers lie on its lines (half that in images under 96)
RADII = {"small": 16, "medium": 28, "large": 48, "pair": 26, "three": 16}  # pixels
TINT = 0.03  # every color channel is off by up to this, of 1
BLUR = 3.0  # pixels, of the images that captions like "blurry" describe

RGB = tuple[float, float, float]


def held_out(color: str, shape: str) -> bool:
    """Whether training never shows this pair: 8 of 96, one color for each shape."""
    return (5 * list(COLORS).index(color) + 3 * SHAPES.index(shape)) % 12 == 7


@dataclass(frozen=True)
class Item:
    """One drawn object; center, radius in pixels, angle in radians."""

    shape: str
    rgb: RGB  # 0..1
    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """What is drawn (`background`, `items`, `blurred`), and what the caption asks for (the rest)."""

    width: int
    height: int
    background: RGB
    items: tuple[Item, ...]
    kind: str  # "one", "pair", "count"
    background_name: str
    objects: tuple[tuple[str, str], ...]  # (color, shape) of each, the first mentioned first
    place: str | None = None  # of PLACES, when kind is "one" and the caption says it; of a count: "row", "column"
    size: str | None = None  # of SIZES, when the caption says it
    relation: str | None = None  # of RELATIONS: where the first object is
    blurred: bool = False


# Scenes


def sample(
    rng: random.Random,
    *,
    width: int = SIZE,
    height: int = SIZE,
    kind: str | None = None,
    allowed: Callable[[str, str], bool] = lambda color, shape: not held_out(color, shape),
) -> Scene:
    """A random scene whose (color, shape) pairs are all `allowed`."""
    kind = kind or rng.choices(("one", "pair", "count"), (0.55, 0.27, 0.18))[0]
    background = rng.choice(list(COLORS))
    make = {"one": _one, "pair": _pair, "count": _count}[kind]
    return make(rng, width, height, background, lambda: _pick(rng, background, allowed))


def _pick(rng: random.Random, background: str, allowed: Callable[[str, str], bool]) -> tuple[str, str]:
    while True:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        if color != background and allowed(color, shape):
            return color, shape


def _one(rng: random.Random, width: int, height: int, background: str, pick: Callable[[], tuple[str, str]]) -> Scene:
    color, shape = pick()
    place = rng.choice(list(PLACES)) if rng.random() < 0.5 else None
    size = rng.choice(SIZES) if rng.random() < 0.4 else None
    if size == "large" and place not in (None, "center"):
        size = None  # it would not fit
    x, y = PLACES[place or "center"]
    radius = RADII[size or "medium"]
    item = Item(shape, _tinted(rng, color), *_at(x, y, width, height), _scaled(radius, width, height))
    return Scene(
        width, height, _tinted(rng, background), (item,), "one", background, ((color, shape),), place=place, size=size
    )


def _pair(rng: random.Random, width: int, height: int, background: str, pick: Callable[[], tuple[str, str]]) -> Scene:
    first, second = pick(), pick()
    while second == first:
        second = pick()
    relation = rng.choice(RELATIONS)
    along = 0.25 if relation in ("left", "above") else 0.75
    radius = _scaled(RADII["pair"], width, height)
    items = []
    for (color, shape), a in ((first, along), (second, 1 - along)):
        x, y = (a, 0.5) if relation in ("left", "right") else (0.5, a)
        items.append(Item(shape, _tinted(rng, color), *_at(x, y, width, height), radius))
    return Scene(
        width, height, _tinted(rng, background), tuple(items), "pair", background, (first, second), relation=relation
    )


def _count(rng: random.Random, width: int, height: int, background: str, pick: Callable[[], tuple[str, str]]) -> Scene:
    color, shape = pick()
    number = rng.choice((2, 3))
    place = "column" if number == 2 and rng.random() < 0.25 else "row"
    spots = (0.25, 0.75) if number == 2 else (0.1875, 0.5, 0.8125)
    radius = _scaled(RADII["pair" if number == 2 else "three"], width, height)
    rgb = _tinted(rng, color)
    items = []
    for spot in spots:
        x, y = (0.5, spot) if place == "column" else (spot, 0.5)
        items.append(Item(shape, rgb, *_at(x, y, width, height), radius))
    objects = ((color, shape),) * number
    return Scene(width, height, _tinted(rng, background), tuple(items), "count", background, objects, place=place)


def _tinted(rng: random.Random, color: str) -> RGB:
    r, g, b = (min(1.0, max(0.0, value / 255 + rng.uniform(-TINT, TINT))) for value in COLORS[color])
    return r, g, b


def _at(x: float, y: float, width: int, height: int) -> tuple[float, float]:
    grid = GRID if min(width, height) >= 96 else GRID // 2  # coarser, three in a row would touch
    return round(x * width / grid) * grid, round(y * height / grid) * grid


def _scaled(radius: int, width: int, height: int) -> float:
    return radius * min(width, height) / SIZE


# Images


def draw(scenes: Sequence[Scene]) -> Tensor:
    """Scenes of one size to antialiased images [B, 3, H, W] in -1..1."""
    width, height = scenes[0].width, scenes[0].height
    if any((scene.width, scene.height) != (width, height) for scene in scenes):
        raise ValueError("the scenes of one batch must have one size")
    image = torch.tensor([scene.background for scene in scenes])[:, :, None, None].repeat(1, 1, height, width)
    for where, items, covered in _layers(scenes, step=1):
        rgb = torch.tensor([item.rgb for item in items])[:, :, None, None]
        covered = covered.unsqueeze(1)  # (n, 1, H, W)
        image[where] = image[where] * (1 - covered) + rgb * covered
    blurred = torch.tensor([scene.blurred for scene in scenes])
    if blurred.any():
        image[blurred] = _blur(image[blurred])
    return image * 2 - 1


def cover(scenes: Sequence[Scene], step: int) -> Tensor:
    """How much objects cover, 0..1, on a grid of one point every `step` pixels: [B, H / step, W / step]."""
    total = torch.zeros(len(scenes), scenes[0].height // step, scenes[0].width // step)
    for where, _, covered in _layers(scenes, step):
        total[where] = torch.maximum(total[where], covered)
    return total


def _layers(scenes: Sequence[Scene], step: int) -> Iterator[tuple[Tensor, list[Item], Tensor]]:
    """Objects of equal shape that lie on different images: image indices (n), the items, their cover (n, H, W)."""
    width, height = scenes[0].width, scenes[0].height
    column = torch.arange(width // step) * step + step / 2
    row = (torch.arange(height // step) * step + step / 2).unsqueeze(1)
    for layer in range(max(len(scene.items) for scene in scenes)):
        for shape in (*SHAPES, *EXTRA_SHAPES):
            drawn = [(i, s.items[layer]) for i, s in enumerate(scenes) if layer < len(s.items)]
            drawn = [(i, item) for i, item in drawn if item.shape == shape]
            if not drawn:
                continue
            items = [item for _, item in drawn]
            numbers = torch.tensor([(item.x, item.y, item.radius, item.angle) for item in items])
            x, y, radius, angle = numbers.view(-1, 4, 1, 1).unbind(1)  # each (n, 1, 1)
            dx, dy = (column - x) / radius, (row - y) / radius  # (n, 1, W), (n, H, 1)
            u, v = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx  # (n, H, W)
            edge = distance(shape, u, v) * radius / step  # in grid points
            yield torch.tensor([i for i, _ in drawn]), items, (0.5 - edge).clamp(0, 1)


def distance(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """About the signed distance to the outline of a shape of radius 1 (v points down), negative inside."""
    if shape == "circle":
        return (u * u + v * v).sqrt() - 0.98
    if shape == "ring":
        return ((u * u + v * v).sqrt() - 0.77).abs() - 0.23
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.86
    if shape == "diamond":
        return (u.abs() / 0.72 + v.abs() / 1.06 - 1) * 0.596  # 0.596: makes the gradient's length 1
    if shape == "cross":
        return torch.minimum(torch.maximum(u.abs() - 1, v.abs() - 0.27), torch.maximum(u.abs() - 0.27, v.abs() - 1))
    if shape == "triangle":
        side = (u.abs() * 1.75 - (v + 1) * 0.97) / math.hypot(1.75, 0.97)
        return torch.maximum(v - 0.75, side)
    if shape == "star":
        turn = 2 * math.pi / 5
        angle = (torch.remainder(torch.atan2(u, -v) + turn / 2, turn) - turn / 2).abs()  # 0 at a tip
        reach = (u * u + v * v).sqrt()
        tip, (dent_x, dent_y) = 1.1, (0.44 * math.cos(turn / 2), 0.44 * math.sin(turn / 2))
        normal_x, normal_y = dent_y, tip - dent_x  # to the edge from the tip to the dent beside it
        along = (reach * angle.cos() - tip) * normal_x + reach * angle.sin() * normal_y
        return along / math.hypot(normal_x, normal_y)
    if shape == "heart":
        x, y = u.abs() / 1.55, 0.56 - v / 1.55  # Inigo Quilez's heart, which stands on its tip at the origin
        lobe = ((x - 0.25) ** 2 + (y - 0.75) ** 2).sqrt() - math.sqrt(2) / 4
        foot = (x + y).clamp(min=0) / 2
        flank = torch.minimum(x**2 + (y - 1) ** 2, (x - foot) ** 2 + (y - foot) ** 2).sqrt() * torch.sign(x - y)
        return torch.where(x + y > 1, lobe, flank) * 1.55
    if shape == "moon":
        return torch.maximum((u * u + v * v).sqrt() - 0.98, 0.82 - ((u - 0.45) ** 2 + v * v).sqrt())
    raise ValueError(f"shape is {shape!r}, expected one of {', '.join((*SHAPES, *EXTRA_SHAPES))}")


def _blur(image: Tensor) -> Tensor:
    reach = round(3 * BLUR)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / BLUR) ** 2)
    kernel = (weights / weights.sum()).view(1, 1, -1).expand(3, 1, -1)
    padded = torch.nn.functional.pad(image, (reach,) * 4, mode="replicate")
    rows = torch.nn.functional.conv2d(padded, kernel.unsqueeze(2), groups=3)
    return torch.nn.functional.conv2d(rows, kernel.unsqueeze(3), groups=3)
