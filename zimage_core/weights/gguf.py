"""GGUF headers (ggml's gguf.md), read field by field: which tensors a file holds, of which type and where.

Every length is compared with what is left of the file before anything of that length is made.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import CheckpointError
from . import gguf_dequant

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where the metadata does not say otherwise
NUMBERS = {  # number of a type of metadata -> its struct format
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
NESTED = 4  # arrays in arrays that are followed
MOST_VALUES = 8  # of an array that are read; longer ones (a tokenizer's, say) are only counted
MAX_NAME = 64 * 1024  # bytes of a key or a tensor's name
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of a tensor that was reshaped to fit ggml
AGAIN = "download the file again"


class Place(NamedTuple):
    """A tensor as the header describes it; shape in torch's order."""

    dtype: str  # one of gguf_dequant.TYPES
    shape: tuple[int, ...]
    begin: int  # byte in the file
    end: int


def read_header(path: Path) -> tuple[dict[str, Place], dict[str, Any]]:
    """(name -> place, metadata). Raises CheckpointError where the header does not account for the file, and OSError."""
    with open(path, "rb") as file:
        cursor = _Cursor(path, file)
        if cursor.take(4) != MAGIC:
            raise cursor.damaged("it does not begin with GGUF")
        if (version := cursor.number("I")) not in VERSIONS:
            raise CheckpointError(f"GGUF version {version}, expected {VERSIONS[0]} or {VERSIONS[1]}; {AGAIN}", path)
        tensors, pairs = cursor.number("Q"), cursor.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text()
            if key in metadata:
                raise cursor.damaged(f"{key} is in the header twice")
            metadata[key] = cursor.value(cursor.number("I"))
        found = [_tensor(cursor) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise cursor.damaged(f"general.alignment is {alignment!r}")
        return _places(cursor, found, metadata, alignment), metadata


def _tensor(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    """(name, type, shape, offset)."""
    name = cursor.text()
    if (dimensions := cursor.number("I")) > 8:
        raise cursor.damaged(f"{name} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    number = cursor.number("I")
    if number not in gguf_dequant.BY_NUMBER:
        names = ", ".join(gguf_dequant.TYPES)
        raise CheckpointError(f"{name} has the GGUF type {number}, expected one of {names}", cursor.path)
    return name, gguf_dequant.BY_NUMBER[number], shape, cursor.number("Q")


def _places(
    cursor: _Cursor,
    found: list[tuple[str, str, tuple[int, ...], int]],
    metadata: dict[str, Any],
    alignment: int,
) -> dict[str, Place]:
    if not found:
        raise cursor.damaged("there is no tensor in it")
    start = reached = -(-cursor.at // alignment) * alignment
    places: dict[str, Place] = {}
    for name, dtype, shape, offset in sorted(found, key=lambda tensor: tensor[3]):
        begin = start + offset
        try:
            end = begin + gguf_dequant.size(dtype, shape)
        except ValueError as error:
            raise cursor.damaged(f"{name} has the shape {list(shape)}, but {error}") from error
        if name in places:
            raise cursor.damaged(f"{name} is in the header twice")
        if begin != reached:
            raise cursor.damaged(f"{name} lies at byte {begin}, expected {reached}")
        if end > cursor.size:
            raise CheckpointError(
                f"the file is truncated, {name} ends at byte {end} of {cursor.size}; {AGAIN}", cursor.path
            )
        places[name] = Place(dtype, _original(metadata, name, shape), begin, end)
        reached = -(-end // alignment) * alignment
    if cursor.size > reached:
        raise cursor.damaged(f"{cursor.size - reached} bytes follow the last tensor")
    return places


def _original(metadata: dict[str, Any], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape before the file's maker reshaped the tensor, if it is noted and holds as many values."""
    noted = metadata.get(ORIGINAL_SHAPE + name)
    if not isinstance(noted, list) or not all(isinstance(size, int) and size >= 0 for size in noted):
        return shape
    return tuple(noted) if math.prod(noted) == math.prod(shape) else shape


class _Cursor:
    """Reads one field after the other and never past the end."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"the GGUF header is damaged ({why}); {AGAIN}", self.path)

    def skip(self, count: int) -> None:
        """Moves on; makes nothing of that length."""
        self._advance(count)
        self.file.seek(count, os.SEEK_CUR)

    def take(self, count: int) -> bytes:
        self._advance(count)
        return self.file.read(count)

    def _advance(self, count: int) -> None:
        if count > self.size - self.at:
            raise CheckpointError(f"the file is truncated inside the GGUF header; {AGAIN}", self.path)
        self.at += count

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        """A short one: a key or a name."""
        if (length := self.number("Q")) > MAX_NAME:
            raise self.damaged(f"a name of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged("a name is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of metadata; of a long array only the number of its values is told."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.take(self.number("Q")).decode("utf-8", errors="replace")
        if kind != ARRAY or depth == NESTED:
            raise self.damaged(f"metadata of type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS and count > MOST_VALUES:
            self.skip(count * struct.calcsize(f"<{NUMBERS[kind]}"))
            return f"{count} values"
        if kind == STRING and count > MOST_VALUES:
            for _ in range(count):  # a vocabulary has 150,000
                self.skip(self.number("Q"))
            return f"{count} values"
        return [self.value(kind, depth + 1) for _ in range(count)]
