"""What the tests of this folder share: a batch by its command, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zimage_core.__main__ import main

SMALL = ["--cpu", "-s", "2", "--width", "32", "--height", "32", "--quiet"]


class Run:
    """A file of prompts and its folder."""

    def __init__(self, folder: Path, rows: list[Any], *options: str, name: str = "out"):
        """rows: prompts, or objects of a .jsonl file."""
        self.file = folder / f"{name}.{'txt' if isinstance(rows[0], str) else 'jsonl'}"
        self.out = folder / name
        self.journal = self.out / "results.jsonl"
        self.options = options
        self.write(rows)

    def write(self, rows: list[Any]) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.file.write_text("\n".join(lines) + "\n")

    @property
    def command(self) -> list[str]:
        return ["batch", str(self.file), "--output", str(self.out), *self.options]

    def __call__(self, *options: str) -> int:
        return main([*self.command, *options])

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def images(self) -> dict[str, bytes]:
        paths = [path for path in self.out.rglob("*") if path.suffix in (".png", ".jpg", ".webp")]
        return {path.relative_to(self.out).as_posix(): path.read_bytes() for path in paths}
