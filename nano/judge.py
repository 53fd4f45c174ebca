"""Reads an image back: background, and of every object its color, shape, place and size; then marks it.

Plain image processing, no learned part: threshold against the border's color, connected components, nearest palette
color, overlap with each shape's drawn outline. What fits nothing well is None, so a smear is not taken for a circle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from . import scenes
from .scenes import COLORS, EXTRA_SHAPES, PLACES, SHAPES, Scene

CONTRAST = 0.16  # RGB distance (of 0..1) from the background that makes an object; the palette's closest two: 0.3
COLOR_LIMIT = 0.2  # RGB distance beyond which a color is none of the palette
SMALLEST = 40  # pixels of a 128x128 image; smaller specks are no objects (the smallest drawn shape has over 300)
OVERLAP = 0.72  # intersection over union with the best outline below which a shape is none
OUTLINE = 32  # pixels, the side at which outlines are compared
FOLLOWED = 0.08  # of width and height: how far an object may be from where a control image has it
PLACE_TOLERANCE = 0.125  # of width and height: half the distance between neighboring places
APART = 0.25  # of width or height: how far two related objects must be from each other, and how level at most
SMALL_BELOW, LARGE_ABOVE = 0.155, 0.28  # half the object's side as a share of the image's shorter side

_PALETTE = np.array(list(COLORS.values())) / 255


@dataclass(frozen=True)
class Seen:
    """One object as read from the pixels."""

    color: str | None
    shape: str | None
    x: float  # center of its bounding box, 0..1 of the width
    y: float
    reach: float  # half the longer side of its bounding box, as a share of the image's shorter side


def read(image: Tensor) -> tuple[str | None, list[Seen]]:
    """The background's color and the objects, largest first, of an image [3, H, W] in 0..1."""
    pixels = image.detach().float().cpu().numpy().transpose(1, 2, 0)  # (H, W, 3)
    height, width, _ = pixels.shape
    border = np.concatenate(
        [pixels[:2], pixels[-2:], pixels[:, :2].swapaxes(0, 1), pixels[:, -2:].swapaxes(0, 1)], axis=1
    )
    background = np.median(border.reshape(-1, 3), axis=0)
    away = np.linalg.norm(pixels - background, axis=-1)  # (H, W)
    parts, count = ndimage.label(away > CONTRAST, structure=np.ones((3, 3)))
    smallest = SMALLEST * min(height, width) ** 2 / scenes.SIZE**2
    objects = []
    for index in range(1, count + 1):
        part = parts == index
        if part.sum() < smallest:
            continue
        core = ndimage.binary_erosion(part)
        color = np.median(pixels[core if core.sum() > 10 else part], axis=0)
        # the outline runs where a pixel is as near to the object's color as to the background's
        part &= np.linalg.norm(pixels - color, axis=-1) < away
        rows, columns = np.where(part)
        if len(rows) < smallest:
            continue
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        objects.append(
            Seen(
                color=_nearest(color),
                shape=_shape(part[top:bottom, left:right]),
                x=float(left + right) / 2 / width,
                y=float(top + bottom) / 2 / height,
                reach=float(max(bottom - top, right - left)) / 2 / min(height, width),
            )
        )
    return _nearest(background), sorted(objects, key=lambda seen: -seen.reach)


def mark(image: Tensor, scene: Scene) -> dict[str, bool]:
    """What of the scene the image [3, H, W] in 0..1 gets right; only what the caption says is marked.

    Keys: background, count, color, shape, all; place (of one object, a row or a column), size, relation where said.
    """
    background, objects = read(image)
    marks = {"background": background == scene.background_name, "count": len(objects) == len(scene.objects)}
    marks |= {"one": _mark_one, "pair": _mark_pair, "count": _mark_count}[scene.kind](objects, scene)
    marks["all"] = all(marks.values())
    return marks


def follows(image: Tensor, scene: Scene) -> bool:
    """Whether as many objects are in the image [3, H, W] as in the scene, of its shapes, where they are in it."""
    _, left = read(image)
    if len(left) != len(scene.items):
        return False
    for item in scene.items:
        x, y = item.x / scene.width, item.y / scene.height
        there = [seen for seen in left if abs(seen.x - x) < FOLLOWED and abs(seen.y - y) < FOLLOWED]
        if not there or there[0].shape != item.shape:
            return False
        left.remove(there[0])
    return True


def _mark_one(objects: list[Seen], scene: Scene) -> dict[str, bool]:
    color, shape = scene.objects[0]
    seen = objects[0] if objects else None
    marks = {
        "color": seen is not None and seen.color == color,
        "shape": seen is not None and seen.shape == shape,
    }
    if scene.place:
        x, y = PLACES[scene.place]
        marks["place"] = seen is not None and abs(seen.x - x) < PLACE_TOLERANCE and abs(seen.y - y) < PLACE_TOLERANCE
    if scene.size == "small":
        marks["size"] = seen is not None and seen.reach < SMALL_BELOW
    if scene.size == "large":
        marks["size"] = seen is not None and seen.reach > LARGE_ABOVE
    return marks


def _mark_pair(objects: list[Seen], scene: Scene) -> dict[str, bool]:
    if len(objects) < 2:
        return {"color": False, "shape": False, "relation": False}
    sideways = scene.relation in ("left", "right")
    ordered = sorted(objects[:2], key=lambda seen: seen.x if sideways else seen.y)
    if scene.relation in ("right", "below"):
        ordered.reverse()
    dx, dy = abs(ordered[0].x - ordered[1].x), abs(ordered[0].y - ordered[1].y)
    along, across = (dx, dy) if sideways else (dy, dx)
    return {
        "color": tuple(seen.color for seen in ordered) == tuple(color for color, _ in scene.objects),
        "shape": tuple(seen.shape for seen in ordered) == tuple(shape for _, shape in scene.objects),
        "relation": along > APART > across,
    }


def _mark_count(objects: list[Seen], scene: Scene) -> dict[str, bool]:
    color, shape = scene.objects[0]
    spread_x, spread_y = (float(np.ptp([getattr(seen, axis) for seen in objects] or [0.0])) for axis in ("x", "y"))
    along, across = (spread_x, spread_y) if scene.place == "row" else (spread_y, spread_x)
    return {
        "color": bool(objects) and all(seen.color == color for seen in objects),
        "shape": bool(objects) and all(seen.shape == shape for seen in objects),
        "place": along > APART > across,
    }


def _nearest(rgb: np.ndarray) -> str | None:
    distances = np.linalg.norm(_PALETTE - rgb, axis=1)
    best = int(distances.argmin())
    return list(COLORS)[best] if distances[best] < COLOR_LIMIT else None


def _shape(part: np.ndarray) -> str | None:
    """The shape whose outline overlaps this cut-out [h, w] of an object best."""
    seen = _normalized(part)
    overlaps = {
        shape: float(np.minimum(seen, outline).sum() / np.maximum(seen, outline).sum())
        for shape, outline in _outlines().items()
    }
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= OVERLAP else None


@cache
def _outlines() -> dict[str, np.ndarray]:
    outlines = {}
    for shape in (*SHAPES, *EXTRA_SHAPES):
        item = scenes.Item(shape, (1.0, 1.0, 1.0), 64, 64, 48)
        scene = scenes.Scene(128, 128, (0.0, 0.0, 0.0), (item,), "one", "black", (("white", shape),))
        part = scenes.draw([scene])[0, 0].numpy() > 0
        rows, columns = np.where(part)
        outlines[shape] = _normalized(part[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    return outlines


def _normalized(part: np.ndarray) -> np.ndarray:
    """A cut-out [h, w], centered in a square and scaled to OUTLINE x OUTLINE, 0..1."""
    height, width = part.shape
    side = max(height, width)
    square = torch.zeros(1, 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[0, 0, top : top + height, left : left + width] = torch.from_numpy(part).float()
    return F.interpolate(square, size=(OUTLINE, OUTLINE), mode="bilinear", align_corners=False)[0, 0].numpy()
