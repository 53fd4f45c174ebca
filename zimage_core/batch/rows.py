"""Rows of a file of prompts: every column that is known, its values checked, all faults found before anything loads."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import image_files, options
from ..model.tokenizer import MAX_LENGTH
from .reading import Fault, Record

MOST_IMAGES = 100_000  # of one row
CONTROL_STRENGTH = 0.8  # `sampling.control.STRENGTH`, without what that imports


@dataclass(frozen=True)
class Row:
    """What one row asks for. number: its place among the rows, from 1. Paths are absolute."""

    number: int
    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int = 8
    guidance_scale: float = 0.0
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    seed: int | None = None
    images: int = 1
    loras: tuple[tuple[str, float], ...] = ()
    max_prompt_tokens: int = MAX_LENGTH
    name: str | None = None
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    control: str | None = None
    control_image: str | None = None
    control_strength: float = CONTROL_STRENGTH
    references: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether it is made by itself: images to see differ from row to row."""
        return self.image is not None or self.control is not None or bool(self.references)


Read = Callable[[Any, Path], Any]  # (a value of the file, the folder of relative paths) -> that of a Row; or ValueError


def _text(value: Any, _: Path) -> str:
    if not isinstance(value, str):
        raise ValueError("expected text; put it in quotes")
    return value


def _number(least: float, most: float, told: str, above: bool = False) -> Read:
    def read(value: Any, _: Path) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and least <= number <= most and not (above and number == least)):
            raise ValueError(f"expected {told}")
        return number

    return read


def _whole(least: int, most: int, told: str, multiple: int = 1) -> Read:
    def read(value: Any, _: Path) -> int:
        if isinstance(value, float) and value.is_integer():  # a spreadsheet's 512.0
            value = int(value)
        text = value.strip().removesuffix(".0") if isinstance(value, str) else ""
        if text.isdecimal() and text.isascii() and len(text) <= 20:
            value = int(text)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"expected {told}")
        if value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise ValueError(f"it must be divisible by {multiple}; the nearest is {near}")
        return value

    return read


def _switch_or_number(value: Any, folder: Path) -> float:
    word = value.strip().lower() if isinstance(value, str) else value
    if word in ("true", "false", True, False):
        return float(word in ("true", True))
    return float(_number(0, 1e6, "true, false, or a number from 0 (off)")(value, folder))


def _file(value: Any, folder: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected the name of a file")
    path = Path(os.path.abspath(folder / value.strip()))
    if not os.path.isfile(path):  # which takes a name that no system could have, too
        found = "that is a folder" if os.path.isdir(path) else "there is no such file"
        raise ValueError(f"{found} ({path}); relative names begin at {folder}")
    return str(path)


def _image(value: Any, folder: Path) -> str:
    path = _file(value, folder)
    try:
        image_files.size_of(Path(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; give an image file") from None
    return path


def _images(value: Any, folder: Path) -> tuple[str, ...]:
    return tuple(_image(one, folder) for one in _several(value, "expected images, several apart by |, or a JSON list"))


def _several(value: Any, told: str) -> list[Any]:
    """Parts between |, or of a JSON list. Raises ValueError, saying what is told."""
    if isinstance(value, str):
        if not value.strip().startswith("["):
            return [part for part in value.split("|") if part.strip()]
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(told) from None
    if not isinstance(value, list):
        raise ValueError(told)
    return value


def _loras(value: Any, folder: Path) -> tuple[tuple[str, float], ...]:
    told = 'expected "file:strength", several apart by |, or a JSON list of them'
    found = []
    for one in _several(value, told):
        pair = one if isinstance(one, list) and len(one) == 2 else None
        if pair is None and not isinstance(one, str):
            raise ValueError(told)
        name, strength = (pair[0], pair[1]) if pair is not None else _parted(one.strip())
        found.append((_file(name, folder), _number(-math.inf, math.inf, "a finite strength")(strength, folder)))
    return tuple(found)


def _parted(text: str) -> tuple[str, Any]:
    path, strength = options.lora_parts(text)
    return path, 1.0 if strength is None else strength


# Each column but `prompt`, and how its values are read; the names are those of `Row`
COLUMNS: dict[str, Read] = {
    "prompt": _text,
    "negative_prompt": _text,
    "width": _whole(16, 2**31 - 16, "pixels, a whole number from 16", 16),
    "height": _whole(16, 2**31 - 16, "pixels, a whole number from 16", 16),
    "steps": _whole(1, 100_000, "a whole number from 1"),
    "guidance_scale": _number(0, 999, "a number from 0 (off) up, below 1000"),
    "cfg_normalization": _switch_or_number,
    "cfg_truncation": _number(-1e6, 1e6, "a number; from 1 it never stops guidance"),
    "seed": _whole(0, 2**64 - 1, "a whole number from 0 to 2^64 - 1"),
    "images": _whole(1, MOST_IMAGES, f"a whole number from 1 to {MOST_IMAGES}"),
    "loras": _loras,
    "max_prompt_tokens": _whole(1, 100_000, "a whole number from 1"),
    "name": _text,
    "image": _image,
    "strength": _number(0, 1, "more than 0 (the image as it is) up to 1 (all noise)", above=True),
    "mask": _image,
    "control": _file,
    "control_image": _image,
    "control_strength": _number(-1e6, 1e6, "a number; 0 switches it off"),
    "references": _images,
}


def checked(found: Sequence[Record], folder: Path, defaults: Mapping[str, Any]) -> tuple[list[Row], list[Fault]]:
    """The rows that can be made, and what is wrong with the others.

    folder: where relative names of files begin. defaults: fields of `Row` for what a row leaves out.
    Raises ValueError for columns that nothing is known of, which is a fault of the file and not of a row.
    """
    names = dict.fromkeys(name for record in found for name in record.values)
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise ValueError("; ".join(map(_unknown, unknown[:5])) + f". Columns are: {', '.join(COLUMNS)}")
    rows: list[Row] = []
    faults: list[Fault] = []
    known: dict[tuple[str, str], Any] = {}  # what was read before: a file that a million rows name is looked at once
    for record in found:
        row, wrong = _row(record, folder, defaults, known)
        faults += wrong
        if row is not None and not wrong:
            rows.append(row)
    return rows, faults


def _unknown(name: str) -> str:
    shown = name if len(name) <= 60 else f"{name[:60]}..."
    near = difflib.get_close_matches(name.strip().lower().replace(" ", "_").replace("-", "_"), COLUMNS, 1, 0.5)
    return f"unknown column {shown!r}" + (f", did you mean {near[0]!r}?" if near else "")


def _row(
    record: Record, folder: Path, defaults: Mapping[str, Any], known: dict[tuple[str, str], Any]
) -> tuple[Row | None, list[Fault]]:
    if record.fault is not None:
        return None, [record.fault]
    faults: list[Fault] = []

    def wrong(column: str, value: Any, expected: str) -> None:
        faults.append(Fault(record.number, record.line, column, value, expected))

    given: dict[str, Any] = {}
    for column, value in record.values.items():
        if value is None:
            continue
        place = (column, repr(value))
        if place not in known or column in ("prompt", "name"):
            try:
                found: Any = COLUMNS[column](value, folder)
            except ValueError as error:
                found = error
            if column not in ("prompt", "name"):
                known[place] = found
        else:
            found = known[place]
        if isinstance(found, ValueError):
            wrong(column, value, str(found))
        else:
            given[column] = found
    if record.values.get("prompt") is None:
        wrong("prompt", "", "there is none; every row needs one")
    values = {**defaults, **given}
    broken = {fault.column for fault in faults}
    if values.get("image") is None:
        for column in ("mask", "strength"):
            if column in given and "image" not in broken:
                wrong(column, record.values[column], "it is for an image, and the row has none; add one in image")
            values[column] = None
    if values.get("control") is None:
        for column in ("control_image", "control_strength"):
            if column in given and "control" not in broken:
                wrong(
                    column, record.values[column], "it is for a control file, and the row has none; name it in control"
                )
            values.pop(column, None)
    elif values.get("control_image") is None and values.get("mask") is None and not faults:
        wrong("control", values["control"], "it has nothing to follow; add control_image, or image and mask")
    if faults:
        return None, faults
    return Row(number=record.number, **values), []
