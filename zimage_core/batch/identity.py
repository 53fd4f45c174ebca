"""What tells files apart by their content, the same on every machine, without reading all of a large one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..weights.snapshot import open_component, schedule_of, snapshot_folder

WHOLE = 16 * 2**20  # bytes up to which all of a file is hashed
PIECES, PIECE = 64, 64 * 2**10  # of a larger one: so many places, so many bytes at each
VERSION = 1  # of what a key is made of; to be raised when the same settings would give another image


class Fingerprints:
    """Of files by path, each read once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, path: str | os.PathLike[str]) -> str:
        """Raises OSError."""
        path = os.fspath(path)
        if path not in self._known:
            self._known[path] = _fingerprint(Path(path))
        return self._known[path]


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    hashed = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            hashed.update(file.read())
        else:
            for number in range(PIECES):
                file.seek((size - PIECE) * number // (PIECES - 1))
                hashed.update(file.read(PIECE))
    return hashed.hexdigest()


def of_model(
    model: str | Path, parts: dict[str, str | None], tokenizer: str | None, dtype: str, prints: Fingerprints
) -> str:
    """The hash of all that a model brings to an image: weights, numbers, schedule, tokenizer, precision.

    parts: places of transformer, text_encoder and vae that are not the model's. Reads no weights but samples of them.
    """
    told: dict[str, Any] = {"dtype": dtype}
    places = {kind: Path(place or model) for kind, place in parts.items()}
    for kind, place in places.items():
        component = open_component(place, kind)
        told[kind] = [repr(component.config), [prints.of(file) for file in component.files.paths]]
    told["schedule"] = repr(schedule_of(places["transformer"]))
    place = Path(tokenizer) if tokenizer else places["text_encoder"]
    if not tokenizer and place.is_file():
        place = Path(model)
    root = snapshot_folder(place) or place.parent
    for folder in (place, place / "tokenizer", root / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            told["tokenizer"] = prints.of(folder / "tokenizer.json")
            break
    return digest(told)


def digest(told: Any) -> str:
    """Of anything that JSON knows, the same in every process."""
    return hashlib.sha256(json.dumps([VERSION, told], sort_keys=True).encode()).hexdigest()[:32]
