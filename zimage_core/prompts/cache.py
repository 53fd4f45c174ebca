"""Caption features that were computed once: in memory, then in files that several processes may share.

An entry is one safetensors file, named by the SHA-256 of its key. Its metadata says whose it is and what its content
must hash to, so that a damaged file, or one of something else, is not taken for it: it is left out, and replaced when
the prompt has been encoded again. Files appear whole (`os.replace`) and may vanish at any time; nothing is locked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

VERSION = 2  # of what a key is made of; to be raised when the same key would give other features
DISK_BYTES = 512 * 2**20
MEMORY_BYTES = 64 * 2**20
STALE = 3600  # seconds after which a half-written file is one whose writer is gone
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
HALF_WRITTEN = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{32}\.tmp")
NAME = "features"  # of the tensor in an entry

Stamp = tuple[str, int, int]  # file, bytes, modification time in ns


def key_of(**ingredients: Any) -> str:
    """What features depend on, as one line of JSON: `ingredients` and the libraries that compute.

    The same in every process. Raises TypeError for an ingredient that JSON doesn't know.
    """
    computed_by = {"torch": torch.__version__, "transformers": version("transformers")}
    return json.dumps({"version": VERSION, **computed_by, **ingredients}, sort_keys=True)


def stamps(paths: Iterable[str | os.PathLike[str]]) -> list[Stamp]:
    """What tells files apart without reading them. Bytes and time of a file that isn't there are -1.

    To be taken before a file is opened: should it be replaced in between, its new content stays under an old stamp.
    """
    found = []
    for path in paths:
        file = Path(os.path.realpath(path))  # a link of a Hugging Face cache leads to a name that is the content's hash
        try:
            state = file.stat()
            found.append((str(file), state.st_size, state.st_mtime_ns))
        except OSError:
            found.append((str(file), -1, -1))
    return found


class PromptCache:
    """Features by key, the least recently used given up first. Any number of threads and processes may use it.

    cache = PromptCache("user/prompts")
    cache.put(key_of(encoder=..., prompt="a red fox"), features)
    cache.get(key_of(encoder=..., prompt="a red fox"))  # the same bits, or None
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        disk_bytes: int = DISK_BYTES,
        memory_bytes: int = MEMORY_BYTES,
    ):
        """folder: of the entries, made when the first is written; None keeps them in memory only.

        disk_bytes, memory_bytes: how much may be kept, 0 for nothing.
        """
        self.folder = None if folder is None or disk_bytes <= 0 else Path(folder)
        self.disk_bytes = disk_bytes
        self.memory_bytes = memory_bytes
        self._memory: OrderedDict[str, Tensor] = OrderedDict()  # by the key's hash, the least recently used first
        self._held = 0  # bytes in memory
        self._lock = threading.Lock()
        self._warned = False

    def get(self, key: str) -> Tensor | None:
        """The features put under this key, a copy on the CPU that the caller may write to; None if there are none."""
        name = _name(key)
        with self._lock:
            features = self._memory.get(name)
            if features is not None:
                self._memory.move_to_end(name)
        if features is None:
            features = self._read(name)
            if features is None:
                return None
            self._hold(name, features)
        if self.folder is not None:
            with suppress(OSError):  # gone, or not ours to touch
                _touch(self._path(name))
        return features.clone()

    def put(self, key: str, features: Tensor) -> None:
        """Keeps a copy of features, in the dtype they have; those that are not finite are not kept."""
        if not features.isfinite().all():
            return
        name, features = _name(key), features.detach().to("cpu", copy=True).contiguous()
        self._hold(name, features)
        if self.folder is None:
            return
        try:
            self._write(self.folder, name, features)
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "Prompts can't be kept in %s (%s), so they are kept in memory only; make room there, or make the "
                    "folder writable.",
                    self.folder,
                    error,
                )
            self._warned = True

    def _hold(self, name: str, features: Tensor) -> None:
        with self._lock:
            self._held -= _size(self._memory.pop(name, None))
            if features.nbytes > self.memory_bytes:
                return
            self._memory[name] = features
            self._held += features.nbytes
            while self._held > self.memory_bytes:
                self._held -= _size(self._memory.popitem(last=False)[1])

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _read(self, name: str) -> Tensor | None:
        if self.folder is None:
            return None
        path = self._path(name)
        try:
            raw = path.read_bytes()  # at once: the file may be replaced while it is looked at
            length = int.from_bytes(raw[:8], "little")
            metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
            features = safetensors.torch.load(raw)[NAME].clone()
            if metadata != _metadata(name, features):
                raise ValueError("its content is not what its metadata says")
            if not features.isfinite().all():
                raise ValueError("it holds values that are not finite")
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a damaged file makes of itself, it is no entry
            logger.debug("%s is no entry of the prompt cache (%s)", path, error)
            return None
        return features

    def _write(self, folder: Path, name: str, features: Tensor) -> None:
        """Raises OSError."""
        raw = safetensors.torch.save({NAME: features}, _metadata(name, features))
        if len(raw) > self.disk_bytes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        half_written = folder / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            half_written.write_bytes(raw)
            _touch(half_written)
            os.replace(half_written, self._path(name))
        except BaseException:
            with suppress(OSError):
                half_written.unlink(missing_ok=True)
            raise
        self._trim(folder)

    def _trim(self, folder: Path) -> None:
        """Deletes the least recently used entries beyond the bound, and what writers that died have left."""
        entries: list[tuple[int, int, str]] = []
        with os.scandir(folder) as files:
            for file in files:
                with suppress(OSError):  # deleted meanwhile
                    state = file.stat()
                    if ENTRY.fullmatch(file.name):
                        entries.append((state.st_mtime_ns, state.st_size, file.path))
                    elif HALF_WRITTEN.fullmatch(file.name) and time.time() - state.st_mtime > STALE:
                        os.unlink(file.path)
        excess = sum(size for _, size, _ in entries) - self.disk_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            try:
                os.unlink(path)
            except FileNotFoundError:  # by another process, which makes the same room
                pass
            except OSError:  # in use, where that forbids it
                continue
            excess -= size


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _size(features: Tensor | None) -> int:
    return 0 if features is None else features.nbytes


def _touch(path: Path) -> None:
    now = time.time_ns()  # to the ns, where the file system's own clock ticks in ms: the order of use is to be told
    os.utime(path, ns=(now, now))


def _metadata(name: str, features: Tensor) -> dict[str, str]:
    """What an entry says of itself: whose it is, and the hash of all of it."""
    hashed = hashlib.sha256(f"{name} {features.dtype} {list(features.shape)} ".encode())
    hashed.update(features.view(torch.uint8).numpy().tobytes())
    return {"key": name, "sha256": hashed.hexdigest()}
