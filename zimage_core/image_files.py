"""Image files: what people bring, and what they get. Needs Pillow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}


def read(path: Path, channels: int = 3) -> Tensor:
    """[1, channels, H, W] in 0..1: 3 for an image, transparency over black; 1 for a mask, by its brightness.

    Raises ValueError, naming the file, for what is no image.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            if channels == 3 and upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright.convert("RGBA"))
            pixels = np.array(upright.convert("RGB" if channels == 3 else "L"))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read ({error})") from error
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1).unsqueeze(0).float() / 255


def save(image: Tensor, path: Path, parameters: str) -> None:
    """Writes an image [3, H, W] in 0..1 in the format of the extension, whole or not at all.

    PNG carries `parameters` as text, in the form that other programs show.
    """
    from PIL import Image, PngImagePlugin

    kind = check_output(path)
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
    options: dict[str, Any] = {}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("parameters", parameters.encode(errors="backslashreplace").decode())
    elif kind in ("JPEG", "WEBP"):
        options["quality"] = 95
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        Image.fromarray(pixels).save(partial, format=kind, **options)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_output(path: Path) -> str:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown image format {path.suffix!r}; use one of {', '.join(FORMATS)}")
    return kind
