"""Draws nano/samples.png: sixteen prompts through the shipped workflow in a real ComfyUI, each image over its prompt.

.venv/bin/python .ci/gallery.py
"""

from __future__ import annotations

import io
import textwrap

import provision
import workflow
from host import Server
from PIL import Image, ImageDraw, ImageFont

PROMPTS = (
    "two red stars on a blue background",
    "a large yellow heart on a purple background",
    "a green ring at the top left on a white background",
    "a red circle to the left of a blue square on a yellow background",
    "three orange diamonds on a black background",
    "a small pink triangle on a gray background",
    "a white star above a brown cross on a cyan background",
    "a black cross in the center on an orange background",
    "two purple hearts on a pink background",
    "a cyan diamond on the right on a red background",
    "a large brown ring on a white background",
    "a yellow star below a green circle on a black background",
    "three blue circles on a yellow background",
    "an orange square in the bottom right corner on a blue background",
    "a gray triangle to the right of a red heart on a white background",
    "a large white star on a green background",
)
COLUMNS, IMAGE, LABEL, GAP = 4, 192, 44, 12  # images in a row; the rest in pixels


def main() -> None:
    rows = -(-len(PROMPTS) // COLUMNS)
    size = (COLUMNS * (IMAGE + GAP) + GAP, rows * (IMAGE + LABEL + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    with Server(provision.newest(), packs={"comfyui-zimage": provision.ROOT}) as server, server.connect() as client:
        for index, text in enumerate(PROMPTS):
            prompt = workflow.load("zimage_nano_txt2img")
            workflow.set_text(prompt, text)
            (png,) = client.images(client.run(prompt))
            x = GAP + index % COLUMNS * (IMAGE + GAP)
            y = GAP + index // COLUMNS * (IMAGE + LABEL + GAP)
            sheet.paste(Image.open(io.BytesIO(png)).resize((IMAGE, IMAGE), Image.Resampling.LANCZOS), (x, y))
            draw.multiline_text((x, y + IMAGE + 4), textwrap.fill(text, 32), "black", font)
    sheet.save(provision.ROOT / "nano" / "samples.png", optimize=True)


if __name__ == "__main__":
    main()
