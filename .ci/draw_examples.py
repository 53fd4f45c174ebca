"""Draws docs/images/control.png and inpaint.png: what the nano model makes of outlines, masks and margins.

.venv/bin/python .ci/draw_examples.py
"""

from __future__ import annotations

import random
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nano import scenes, train_control  # noqa: E402
from zimage_core import inpaint  # noqa: E402
from zimage_core.pipeline import ZImagePipeline  # noqa: E402
from zimage_core.sampling.control import Control  # noqa: E402

SIDE, LABEL, GAP = 192, 40, 12  # of an image of 128 pixels as it is shown; the rest in pixels
OUT = ROOT / "docs" / "images"


def main() -> None:
    pipe = ZImagePipeline.from_pretrained(ROOT / "nano" / "snapshot")
    sheet(OUT / "control.png", [*steered(pipe, 3, "pair"), *steered(pipe, 5, "count")], 4)
    sheet(OUT / "inpaint.png", repainted(pipe), 4)


def steered(pipe: ZImagePipeline, seed: int, kind: str) -> list[tuple[Tensor, str]]:
    """Outlines, and what becomes of a prompt that names a color only: with two seeds, and without them."""
    scene = scene_of(seed, kind)
    lines = train_control.outlines([scene])
    color = scene.objects[0][0]
    shown = [(lines, "the control image")]
    for number, strength in ((1, 1.0), (2, 1.0), (1, 0.0)):
        control = [Control(train_control.OUT, lines, strength)]
        made = pipe.generate(color, width=128, height=128, seed=number, control=control)
        shown.append((made, f"“{color}”, seed {number}{'' if strength else ', without'}"))
    return shown


def repainted(pipe: ZImagePipeline) -> list[tuple[Tensor, str]]:
    """An image, its mask, the object in another color, and the image extended to the right."""
    prompt = "a blue square on a yellow background"
    image = pipe.generate(prompt, width=128, height=128, seed=4, guidance_scale=2.0)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 20:108, 20:108] = 1
    made = pipe.generate("a red heart on a yellow background", image=image, mask=mask, seed=4, guidance_scale=2.0)
    part, hole, crop = inpaint.prepare(image, torch.zeros(1, 1, 128, 128), extend=(0, 0, 64, 0), crop=False)
    wider = pipe.generate(prompt, image=part, mask=hole, seed=4, guidance_scale=2.0)
    return [
        (image, f"“{prompt}”"),
        (mask.expand_as(image), "the mask: white is repainted"),
        (made, "“a red heart on a yellow background”"),
        (inpaint.finish(wider, crop), "64 pixels more on the right"),
    ]


def scene_of(seed: int, kind: str) -> scenes.Scene:

    return scenes.sample(random.Random(f"example {seed}"), kind=kind)


def sheet(path: Path, shown: list[tuple[Tensor, str]], columns: int) -> None:
    """Images [1, 3, H, W] in rows, each above its words."""
    font = ImageFont.load_default(size=12)
    rows = [shown[at : at + columns] for at in range(0, len(shown), columns)]
    widths = [sum(SIDE * image.shape[-1] // 128 + GAP for image, _ in row) + GAP for row in rows]
    canvas = Image.new("RGB", (max(widths), len(rows) * (SIDE + LABEL + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        x, y = GAP, GAP + number * (SIDE + LABEL + GAP)
        for image, words in row:
            pixels = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
            width = SIDE * image.shape[-1] // 128
            canvas.paste(Image.fromarray(pixels).resize((width, SIDE), Image.Resampling.LANCZOS), (x, y))
            draw.multiline_text((x, y + SIDE + 4), wrapped(words, width), "black", font)
            x += width + GAP
    canvas.save(path, optimize=True)


def wrapped(words: str, width: int) -> str:

    return textwrap.fill(words, width // 6)


if __name__ == "__main__":
    main()
