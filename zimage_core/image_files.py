"""Image files: what people bring, and what they get. Needs Pillow."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

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
ORIENTATION, EXIF, USER_COMMENT = 0x0112, 0x8769, 0x9286  # tags of Exif
UNICODE = b"UNICODE\0"  # what begins a comment in Exif that is UTF-16
COMMENT = 15_000  # characters, some of four bytes: a JPEG's Exif holds 65,533 bytes


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


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) as `read` gives it, without the pixels of most formats. Raises ValueError or OSError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            turned = file.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            return (file.height, file.width) if turned else (file.width, file.height)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read ({error})") from error


def save(image: Tensor, path: Path, parameters: str) -> None:
    """Writes an image [3, H, W] in 0..1 in the format of the extension, whole or not at all: see `encoded`."""
    written = encoded(image, path.suffix, parameters)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(written)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def encoded(image: Tensor, extension: str, parameters: str) -> bytes:
    """The file of an image [3, H, W] in 0..1, in the format of an extension.

    PNG carries `parameters` as text, JPEG and WebP as a comment in Exif, in the form that other programs show.
    """
    from PIL import Image, PngImagePlugin

    kind = FORMATS[extension.lower()]
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
    settings: dict[str, Any] = {}
    if kind == "PNG":
        settings["pnginfo"] = PngImagePlugin.PngInfo()
        settings["pnginfo"].add_itxt("parameters", _whole(parameters))
    elif kind in ("JPEG", "WEBP"):
        exif = Image.Exif()
        exif.get_ifd(EXIF)[USER_COMMENT] = UNICODE + _commented(_whole(parameters)).encode("utf-16-be")
        settings = {"quality": 95, "exif": exif}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, **settings)
    return file.getvalue()


def stamped(raw: bytes, extension: str, parameters: str) -> bytes:
    """The file of an image that somebody else has encoded, with these parameters instead of any of its own.

    A PNG that is to be one stays as it is but for them, its other texts too; anything else is encoded anew.
    Raises ValueError for what is no image.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(raw)) as file:
            kind = file.format
            file.load()  # all of it is there
            pixels = None if kind == "PNG" == FORMATS[extension.lower()] else np.array(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"it is no image that can be read ({error})") from error
    if pixels is not None:
        return encoded(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, extension, parameters)
    pieces, place, added = [raw[:8]], 8, False
    while place < len(raw):
        length, name = int.from_bytes(raw[place : place + 4], "big"), raw[place + 4 : place + 8]
        chunk = raw[place : place + length + 12]
        place += length + 12
        if name == b"IDAT" and not added:
            body = b"iTXtparameters\0\0\0\0\0" + _whole(parameters).encode()
            pieces += [(len(body) - 4).to_bytes(4, "big"), body, zlib.crc32(body).to_bytes(4, "big")]
            added = True
        if not (name in (b"tEXt", b"zTXt", b"iTXt") and chunk[8:].startswith(b"parameters\0")):
            pieces.append(chunk)
    return b"".join(pieces)


def holds(path: Path | BinaryIO, parameters: str) -> bool:
    """Whether a file is a whole image that carries these parameters, as `encoded` writes them."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            file.load()  # to its end: the head alone may be all that was written
            comment = file.getexif().get_ifd(EXIF).get(USER_COMMENT)
            if file.format == "PNG":
                return file.info.get("parameters") == _whole(parameters)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # whatever a damaged file makes of itself
        return False
    return bool(comment == UNICODE + _commented(_whole(parameters)).encode("utf-16-be"))


def _whole(parameters: str) -> str:
    return parameters.encode(errors="backslashreplace").decode()


def _commented(parameters: str) -> str:
    """Shortened in the middle to what Exif in a JPEG has room for, so that the settings at the end stay."""
    half = COMMENT // 2
    return parameters if len(parameters) <= COMMENT else f"{parameters[:half]} ... {parameters[-half:]}"


def parameters(
    prompt: str,
    negative_prompt: str | None,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    size: tuple[int, int],
    model: str,
    loras: Sequence[tuple[Path, float]] = (),
    strength: float | None = None,
    control: Sequence[tuple[Path, float]] = (),
    references: Sequence[Path] = (),
    key: str | None = None,
) -> str:
    """What an image says of itself, in the form that other programs show.

    strength: of an image that it began with. key: of its row in a batch.
    """
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(
        f"Steps: {steps}, Sampler: Euler, CFG scale: {guidance_scale + 1:g}, Seed: {seed}, "
        f"Size: {size[0]}x{size[1]}, Model: {model}"
        + "".join(f", LoRA: {path.name}:{weight:g}" for path, weight in loras)
        + (f", Denoising strength: {strength:g}" if strength is not None else "")
        + "".join(f", Control: {path.name}:{weight:g}" for path, weight in control)
        + "".join(f", Reference: {path.name}" for path in references)
        + (f", Key: {key}" if key is not None else "")
    )
    return "\n".join(lines)


def check_output(path: Path) -> str:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown image format {path.suffix!r}; use one of {', '.join(FORMATS)}")
    return kind
