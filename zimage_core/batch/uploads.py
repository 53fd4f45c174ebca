"""Images that a row names and this machine has: servers get them before they run the row."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .. import image_files
from .graph import Nodes

FOLDER = "zimage_batch"  # among the input images of a server


class Uploads:
    """uploads = Uploads(folder of the rows' file)
    uploads.place("photo.png")  # "zimage_batch/3f2c....png", which the nodes name instead; None: it isn't here
    uploads.of(nodes)  # those that a filled workflow names
    uploads.content("zimage_batch/3f2c....png")
    A place on a server is named after the content, so no image there is ever replaced by another.
    """

    def __init__(self, base: Path):
        self._base = base
        self._files: dict[str, Path] = {}  # place on a server -> file here
        self._places: dict[Path, str] = {}

    def place(self, name: str) -> str | None:
        """Raises ValueError for a file that is no image, OSError for one that can't be read."""
        path = self._base / name.strip()
        if not os.path.isfile(path):  # which takes a name that no system could have, too
            return None
        if path not in self._places:
            image_files.size_of(path)
            suffix = path.suffix.lower() if path.suffix[1:].isalnum() and path.suffix.isascii() else ""
            self._places[path] = place = f"{FOLDER}/{_digest(path.read_bytes())}{suffix}"
            self._files[place] = path
        return self._places[path]

    def of(self, nodes: Nodes) -> list[str]:
        values = [value for content in nodes.values() for value in content["inputs"].values()]
        return [*dict.fromkeys(value for value in values if isinstance(value, str) and value in self._files)]

    def content(self, place: str) -> bytes:
        """Raises OSError, also for a file that is not any more what it was."""
        path = self._files[place]
        content = path.read_bytes()
        if _digest(content) not in place:
            raise OSError(f"{path} has changed since the run began; run the same command again")
        return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]
