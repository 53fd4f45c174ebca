"""Weight files that look untouched, but whose every value is NaN: who reads one of them can't hide it."""

from __future__ import annotations

import os
from pathlib import Path


def poison(file: Path) -> None:
    """Overwrites the data of a safetensors file in place; header, size and modification time stay."""
    before = file.stat()
    with file.open("r+b") as raw:
        start = 8 + int.from_bytes(raw.read(8), "little")
        raw.seek(start)
        raw.write(b"\xff" * (before.st_size - start))  # NaN in every format of floats
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
