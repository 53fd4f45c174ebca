"""What was made: results.jsonl, one line for each image, written once the image is complete."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .folder import Store
from .names import same
from .plan import SHOWN, Task

NAME = "results.jsonl"
DONE, FAILED = "done", "failed"
TYPES: dict[str, tuple[type, ...]] = {
    "row": (int,),
    "image": (int,),
    "file": (str, type(None)),
    "seed": (int,),
    "seconds": (int, float),
    "status": (str,),
    "error": (str, type(None)),
    "key": (str,),
}


@dataclass(frozen=True)
class Outcome:
    """What became of one image: a line of the journal. file: None unless it is done."""

    row: int
    image: int
    file: str | None
    seed: int
    seconds: float
    status: str
    error: str | None
    key: str

    @classmethod
    def done(cls, task: Task, seconds: float) -> Outcome:
        return cls(task.row.number, task.image, task.file, task.seed, round(seconds, 3), DONE, None, task.key)

    @classmethod
    def failed(cls, task: Task, seconds: float, error: str) -> Outcome:
        return cls(task.row.number, task.image, None, task.seed, round(seconds, 3), FAILED, error, task.key)


class Results:
    """The journal of a folder, which its caller has locked.

    results = Results(folder)
    results.record(Outcome.done(task, 1.2))
    Raises ValueError, naming the line, for a journal that is damaged.
    """

    def __init__(self, folder: Store):
        self.folder = folder
        self.torn = 0  # bytes of a last line that a kill left unfinished, and that were cut off
        self._journal = folder.journal(NAME)
        self._latest: dict[tuple[int, int], Outcome] = {}
        self._owners: dict[str, set[tuple[int, int]]] = {}  # file -> images that it was recorded for
        raw = self._journal.read()
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].split(b"\n")[:-1], 1):
            self._keep(self._read(number, line))
        if whole < len(raw):
            self.torn = len(raw) - whole
            self._journal.cut(whole)

    @property
    def latest(self) -> list[Outcome]:
        """The last line of each image."""
        return [*self._latest.values()]

    def record(self, outcome: Outcome) -> None:
        """Writes its line, which counts from now on. Raises OSError, and then there is none of it."""
        self._journal.append(json.dumps(dataclasses.asdict(outcome), ensure_ascii=False).encode() + b"\n")
        self._keep(outcome)

    def close(self) -> None:
        self._journal.close()

    def pending(self, tasks: Sequence[Task], redo_changed: bool) -> list[Task]:
        """Those that are not done, failed, deleted, or (with `redo_changed`) made with other settings.

        An image that is complete but has no line, as after a kill between both, gets its line now. Raises ValueError
        for images made with other settings, and for files in the way, before anything is written.
        """
        changed = [task for task in tasks if self._is_changed(task)]
        if changed and not redo_changed:
            raise ValueError(_listed(changed, "made with other settings", self.folder, CHANGED))
        open_ = [task for task in tasks if not self._is_done(task)]
        there = [task for task in open_ if self.folder.exists(task.file)]
        adopted = [task for task in there if self.folder.holds(task.file, task.parameters)]
        own = {task.place for task in adopted}
        in_the_way = [
            task for task in there if task.place not in own and task.place not in self._owners.get(same(task.file), ())
        ]
        if in_the_way:
            raise ValueError(_listed(in_the_way, "in the way", self.folder, IN_THE_WAY))
        for task in adopted:
            self.record(Outcome.done(task, 0.0))
        return [task for task in open_ if task.place not in own]

    def _is_done(self, task: Task) -> bool:
        last = self._latest.get(task.place)
        if last is None or last.status != DONE or last.key != task.key:
            return False
        return last.file is not None and self.folder.exists(last.file)

    def _is_changed(self, task: Task) -> bool:
        last = self._latest.get(task.place)
        return last is not None and last.status == DONE and last.key != task.key

    def _keep(self, outcome: Outcome) -> None:
        place = (outcome.row, outcome.image)
        self._latest[place] = outcome
        if outcome.file is not None:
            self._owners.setdefault(same(outcome.file), set()).add(place)

    def _read(self, number: int, line: bytes) -> Outcome:
        try:
            values: Any = json.loads(line)
            if not isinstance(values, dict) or values.keys() != TYPES.keys():
                raise ValueError(f"expected an object of {', '.join(TYPES)}")
            for name, types in TYPES.items():
                if not isinstance(values[name], types) or isinstance(values[name], bool):
                    raise ValueError(f"{name} is {values[name]!r}")
            if values["status"] not in (DONE, FAILED) or (values["status"] == DONE) != (values["file"] is not None):
                raise ValueError(f"status is {values['status']!r} and file {values['file']!r}")
        except (ValueError, RecursionError) as error:
            self.close()
            raise ValueError(
                f"{self.folder.told(NAME)}, line {number} is damaged ({error}); delete this line: its image is then "
                "known by its own text, or made again"
            ) from None
        return Outcome(**values)


CHANGED = (
    "Make what has changed again by --redo-changed, put the prompts and options back as they were, or give another "
    "folder by --output."
)
IN_THE_WAY = "What is not of these rows is not overwritten. Move it away, or give another folder by --output."


def _listed(tasks: Sequence[Task], what: str, folder: Store, advice: str) -> str:
    shown = ", ".join(f"row {task.row.number} ({task.file})" for task in tasks[:SHOWN])
    more = f" and {len(tasks) - SHOWN} more" if len(tasks) > SHOWN else ""
    count = f"{len(tasks)} {'image is' if len(tasks) == 1 else 'images are'}"
    return f"{count} {what} in {folder.told()}: {shown}{more}. {advice}"
