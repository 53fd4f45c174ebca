"""Weight files as one table of tensors: headers checked byte by byte, tensors read one at a time, mapped or copied.

Safetensors and GGUF (`gguf_files`) look the same from here on; quantized tensors are bytes, `quantized` knows more.

What is no safetensors file (a pickle, a web page, a git-lfs pointer, half a download) is refused with its name.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from . import gguf as gguf_files
from . import gguf_dequant

logger = logging.getLogger(__name__)

# bits of one value of each dtype of the format (https://github.com/huggingface/safetensors)
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
DTYPES = {  # those that weights may have
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
OTHERS = {  # those of scales, markers and quantized weights
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32,
    "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
ATTENTION = ".comfy_attention.config"  # JSON in bytes: the attention kernel that newer ComfyUI shall use for a layer
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
# what a file that is no safetensors file begins with -> what it is and what to do
MAGIC = {
    b"version https://git-lfs": "this is a git-lfs pointer, not the file itself; fetch it with `git lfs pull` or "
    "`hf download`",
    b"<": "this is a web page, not a model; the download link led to a page, download the file itself",
    b"PK\x03\x04": "this is a pickle or zip archive, which is never opened; get the .safetensors version of the model",
    b"\x80": "this is a pickle, which is never opened (it can run code); get the .safetensors version of the model",
    b"{": "this is a JSON file, not weights",
}


@dataclass(frozen=True)
class Entry:
    """A tensor as its file's header describes it."""

    path: Path
    dtype: str  # one of BITS, in a GGUF file one of gguf_dequant.TYPES
    shape: tuple[int, ...]
    begin: int  # byte in the file
    end: int
    gguf: bool = False


class Mapped(Protocol):
    """A safetensors file of which tensors are views."""

    def get_tensor(self, name: str) -> Tensor: ...


MapFile = Callable[[Path], Mapped]


def map_safetensors(path: Path) -> Mapped:
    """By the library of the format."""
    opened: Mapped = safe_open(path, framework="pt")
    return opened


class TensorFiles:
    """The tensors of one file or of all shards of a model, by key. Only headers are read until `read` is called."""

    def __init__(self, paths: Sequence[Path], map_file: MapFile | None = map_safetensors):
        """map_file: how a file is mapped, tensors then being pages of it, so that it must stay as it is; None: each
        tensor is a copy in memory."""
        self.paths = list(paths)
        self.map_file = map_file
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        self._states = {path: _state(path) for path in self.paths}
        for path in self.paths:
            entries, metadata = read_header(path)
            _take_out_attention(path, entries)
            if double := self.entries.keys() & entries.keys():
                key = min(double)
                raise CheckpointError(
                    f"{key} is in {self.entries[key].path.name}, too; the shards are of different downloads", path
                )
            self.entries |= entries
            self.metadata |= metadata

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: entry.shape for key, entry in self.entries.items()}

    def read(self, key: str) -> Tensor:
        """The tensor. Mapped from its file, it takes no memory until its values are used.

        One of GGUF's quantized types comes as its bytes, [n] uint8.
        """
        entry = self.entries[key]
        path = entry.path
        try:
            if self.map_file is None or not _is_utf8(path):  # neither library opens such names
                return _typed(entry, self._copied(entry))
            if entry.gguf:
                return _typed(entry, self._mapped_bytes(path)[entry.begin : entry.end])
            if path not in self._open:
                self._open[path] = self.map_file(path)
            return self._open[path].get_tensor(key)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{key} can't be read ({error}); download the file again", path) from error

    def _mapped_bytes(self, path: Path) -> Tensor:
        if path not in self._open:
            self._open[path] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        return self._open[path]

    def _copied(self, entry: Entry) -> Tensor:
        """Its bytes in memory of their own, which nothing that happens to the file reaches."""
        raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        into: Any = raw.numpy()
        with open(entry.path, "rb") as file:
            if _state(file.fileno()) != self._states[entry.path]:
                raise OSError("the file has changed since it was opened")
            file.seek(entry.begin)
            if file.readinto(into) != len(raw):
                raise OSError("the file ends before it")
        return raw

    def dtype(self, keys: Iterable[str] | None = None) -> torch.dtype:
        """The dtype of most of the values of these tensors (None: all), from the headers alone."""
        counts: dict[str, int] = {}
        for key in self.entries if keys is None else keys:
            entry = self.entries[key]
            if entry.dtype not in DTYPES:
                raise CheckpointError(
                    f"{key} is stored as {entry.dtype}, expected one of {', '.join(DTYPES)}", entry.path
                )
            counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
        return DTYPES[max(counts, key=lambda name: counts[name])]


def _state(file: Path | int) -> tuple[int, ...]:
    """What tells a file from what is written over it; of a file that isn't there, nothing."""
    try:
        state = os.stat(file)
        return (state.st_size, state.st_mtime_ns, state.st_ino)
    except OSError:
        return ()


def _is_utf8(path: Path) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def _typed(entry: Entry, raw: Tensor) -> Tensor:
    """Bytes [n] as what they are; quantized ones of GGUF stay bytes."""
    dtype = gguf_dequant.PLAIN.get(entry.dtype) if entry.gguf else {**DTYPES, **OTHERS}[entry.dtype]
    if dtype is None:
        return raw
    return (raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()).view(dtype).reshape(entry.shape)


def _take_out_attention(path: Path, entries: dict[str, Entry]) -> None:
    """They are no weights; said once for a file."""
    keys = [key for key in entries if f".{key}".endswith(ATTENTION)]
    for key in keys:
        del entries[key]
    if keys and path not in _told:
        _told.add(path)
        logger.info(
            "%s names an attention kernel for %d of its layers (*%s); these keys are left out, and the attention is "
            "the one that is chosen where the model runs.",
            path,
            len(keys),
            ATTENTION,
        )


_told: set[Path] = set()


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(key -> entry, metadata) of a safetensors or GGUF file, every byte of whose data is accounted for."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            "this is a pickle file, which is never opened (it can run code); get the .safetensors version of the model",
            path,
        )
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            if 8 + length <= size and length <= MAX_HEADER:
                file.seek(8)
                raw = file.read(length)
            else:
                raw = b""
        if start.startswith(gguf_files.MAGIC):
            return _gguf_header(path)
    except OSError as error:
        raise CheckpointError(
            f"this file can't be read ({error.strerror}); check name and permissions", path
        ) from error
    if size == 0:
        raise CheckpointError("the file is empty; download it again", path)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{_what_else(start)}", path)
    return _entries(path, _json_object(path, raw), size, 8 + length)


def _gguf_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    places, metadata = gguf_files.read_header(path)
    entries = {key: Entry(path, at.dtype, at.shape, at.begin, at.end, gguf=True) for key, at in places.items()}
    return entries, {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def _what_else(start: bytes) -> str:
    for magic, what in MAGIC.items():
        if start.lstrip().startswith(magic):
            return what
    return "the file is truncated, or not a safetensors file; download the file again"


def _json_object(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            raise CheckpointError(
                f"{next(n for n in names if names.count(n) > 1)} is in the header twice; {AGAIN}", path
            )
        return made

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"the header is damaged ({error}); {AGAIN}", path) from error
    return header


AGAIN = "download the file again"
SAVE_AGAIN = "save the file with strings only in its metadata"


def _entries(path: Path, header: dict[str, Any], size: int, start: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """size: bytes of the file, of which the header takes `start`."""
    metadata = header.pop("__metadata__", None) or {}  # null as well: there is none
    if not isinstance(metadata, dict):
        raise CheckpointError(f"__metadata__ in the header is {metadata!r:.80}, expected an object; {SAVE_AGAIN}", path)
    for key, value in metadata.items():
        if not isinstance(value, str):  # the library of the format opens no such file either
            raise CheckpointError(
                f"{key!r} in the header's __metadata__ is {json.dumps(value):.80}, expected a string; {SAVE_AGAIN}",
                path,
            )
    entries, places = {}, []
    for key, raw in header.items():
        if not isinstance(raw, dict) or not raw.keys() >= {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"the header's entry of {key} is damaged; {AGAIN}", path)
        dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise CheckpointError(f"{key} is stored as {dtype!r}, expected one of {', '.join(BITS)}", path)
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise CheckpointError(f"the header's shape or place of {key} is damaged; {AGAIN}", path)
        begin, end = offsets
        if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
            raise CheckpointError(f"{key} has {end - begin} bytes, but {dtype} {shape} needs others; {AGAIN}", path)
        entries[key] = Entry(path, dtype, tuple(shape), start + begin, start + end)
        places.append((begin, end, key))
    reached = 0
    for begin, end, key in sorted(places):
        if begin != reached:
            raise CheckpointError(f"{key} lies at byte {begin}, expected {reached}; {AGAIN}", path)
        reached = end
    if reached != (data := size - start):
        what = "the file is truncated" if data < reached else "the file is too long"
        raise CheckpointError(f"{what}, {data} bytes of weights where its header says {reached}; {AGAIN}", path)
    if not entries:
        raise CheckpointError(f"there is no tensor in this file; {AGAIN}", path)
    return entries, metadata


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
