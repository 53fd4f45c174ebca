"""What a phase found: tables and remarks, saved after every row, printed, and written into RESULTS.md."""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

FILE = "results.json"
SECTION = "gpu"


class Report:
    """A phase's part of FOLDER/results.json. An exception that leaves the context is noted there and printed."""

    def __init__(self, folder: Path, phase: str):
        self.folder, self.phase = folder, phase
        self.found: dict[str, Any] = {"tables": {}, "remarks": [], "seconds": 0.0, "machine": ""}
        self.failed = False
        self._started = time.monotonic()

    def table(self, name: str, columns: list[str]) -> None:
        """Begins a table; columns of numbers begin with a >."""
        self.found["tables"][name] = {"columns": columns, "rows": []}

    def row(self, name: str, *cells: object) -> None:
        table = self.found["tables"][name]
        table["rows"].append([str(cell) for cell in cells])
        if len(cells) != len(table["columns"]):
            raise ValueError(f"{name}: {len(cells)} cells for {len(table['columns'])} columns: {cells}")
        print(f"[{self.phase}] {name} |", " | ".join(table["rows"][-1]), flush=True)
        self.save()

    def remark(self, text: str) -> None:
        print(f"[{self.phase}] {text}", flush=True)
        self.found["remarks"].append(text)
        self.save()

    def save(self) -> None:
        self.found["seconds"] = round(time.monotonic() - self._started, 1)
        everything = load(self.folder) | {self.phase: self.found}
        partial = self.folder / f"{FILE}.partial"
        partial.write_text(json.dumps(everything, indent=1))
        partial.replace(self.folder / FILE)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        if "torch" in sys.modules:
            self.found["machine"] = importlib.import_module("benchmarks.results").machine()
        if error is not None:
            self.failed = True
            traceback.print_exception(error)
            self.remark(f"FAILED with {type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}")
        self.save()
        return isinstance(error, Exception)


def load(folder: Path) -> dict[str, Any]:
    """Phase -> what was found, of an earlier or unfinished run, too."""
    file = folder / FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def printed(everything: dict[str, Any]) -> str:
    """Markdown of all phases."""
    timing = importlib.import_module("benchmarks.timing")  # brings torch, which a phase may have to come before
    parts = []
    for phase, found in everything.items():
        parts.append(f"**{phase}** ({found['seconds']:.0f} s)")
        for name, table in found["tables"].items():
            parts.append(f"{name}:\n\n{timing.table(table['columns'], table['rows'])}")
        parts += ["\n".join(f"- {remark}" for remark in found["remarks"])] if found["remarks"] else []
    return "\n\n".join(parts)


def record(folder: Path) -> None:
    """The tables into RESULTS.md, with the machine on which they were measured."""
    everything = load(folder)
    machines = {found["machine"]: None for found in everything.values() if found["machine"]}
    measured = date.fromtimestamp((folder / FILE).stat().st_mtime)
    head = f"`python -m benchmarks.gpu`, {measured}, {' and '.join(machines)}."
    importlib.import_module("benchmarks.results").put(SECTION, f"{head}\n\n{printed(everything)}")
