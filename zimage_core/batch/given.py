"""What the command was given: the file of prompts, and options for the columns that a row leaves out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .reading import BadRows, Fault, Record, extension_of, records
from .rows import COLUMNS

# Columns that are options, too, for the rows that leave them out; `options.add_sampling` has those of `generate`
HELP = {
    "cfg_normalization": "cap the norm of guided steps at this many times the unguided one; false is off",
    "cfg_truncation": "where guidance stops, as a share of the way to the image; from 1 it never does",
    "images": "images of a row, each with the next seed",
    "max_prompt_tokens": "tokens of a prompt that are read, its template included",
    "image": "image to begin with; its size is made if none is given",
    "strength": "share of the steps to run on the image: 0.6, with a mask 1",
    "mask": "image, white where the image is repainted, black where it stays as it is",
    "control": "Fun-Controlnet-Union file to steer with",
    "control_image": "what it follows (edges, depth, pose, ...)",
    "control_strength": "of the control, 0.8 if not given",
    "references": "images that Z-Image Omni or Edit sees beside the prompt, several apart by |",
}
SHARED = ("width", "height", "steps", "guidance_scale", "negative_prompt")

Read = tuple[list[Record], str, Path]  # rows as they stand in the file, its name, and where its relative names begin


def read(args: argparse.Namespace, needed: str | None = "prompt") -> Read:
    if args.prompts == "-":
        source, raw, extension, base = "standard input", sys.stdin.buffer.read(), None, Path.cwd()
    else:
        path = Path(args.prompts)
        extension = extension_of(path)
        source, raw, base = str(path), path.read_bytes(), path.absolute().parent
    return records(raw, source, extension, needed), source, base


def check_faults(rows: Sequence[Any], faults: list[Fault], source: str, skip: bool) -> None:
    """Raises BadRows, unless the rows that are right are to be made without the others."""
    if faults and not skip:
        raise BadRows(faults, source)
    if not rows:
        raise BadRows(faults, f"{source}, in which no row is right")


def counts(found: Sequence[Record], default: int) -> dict[int, int]:
    """Images of each row, those that are left out included, so that the seeds of the others don't depend on them."""
    told = {}
    for record in found:
        try:
            told[record.number] = COLUMNS["images"](record.values.get("images") or default, Path())
        except ValueError:
            told[record.number] = default
    return told
