"""What a run tells while it goes on: a bar, nothing but errors, or a line of JSON for each event."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .. import options
from .plan import Task
from .results import DONE, FAILED, Outcome


class Progress:
    """progress = Progress(tasks, pending)
    progress.saw(outcome)  # for each
    progress.end("done")
    """

    def __init__(self, tasks: Sequence[Task], pending: Sequence[Task]):
        self._started = time.perf_counter()
        self.images = len(tasks)
        self._left = Counter(task.row.number for task in pending)  # row -> images that are not done
        self.rows = len({task.row.number for task in tasks})
        self.done = self.images - len(pending)
        self._places = {task.place for task in tasks}
        self._failed: dict[tuple[int, int], Outcome] = {}

    @property
    def rows_done(self) -> int:
        return self.rows - sum(count > 0 for count in self._left.values())

    @property
    def failed(self) -> list[Outcome]:
        """The images that failed, and were not made since."""
        return list(self._failed.values())

    def saw(self, outcome: Outcome) -> None:
        place = (outcome.row, outcome.image)
        if place not in self._places:  # an image more than was planned: a workflow may give several
            self._places.add(place)
            self.images += 1
            self._left[outcome.row] += 1
        if outcome.status == DONE:
            self.done += 1
            self._left[outcome.row] -= 1
            self._failed.pop(place, None)
        else:
            self._failed[place] = outcome

    def begin(self) -> None:
        """The model is loaded: from now on the time counts for what is left."""

    def note(self, text: str) -> None:
        """Something to be known that is no image's."""

    def end(self, status: str) -> None:
        """status: "done", "failed" (some images), "interrupted" or "stopped"."""
        self.close()
        print(self.summary(status))

    def close(self) -> None:
        """Leaves the terminal as it was."""

    def summary(self, status: str) -> str:
        parts = [f"{self.done} of {self.images} images done ({self.rows_done} of {self.rows} rows)"]
        if self._failed:
            parts.append(f"{len(self._failed)} failed")
        if status in ("interrupted", "stopped"):
            parts.append(status)
        return f"{', '.join(parts)}, {self.seconds:.1f} s"

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


class Quiet(Progress):
    """Errors and a last line."""

    def saw(self, outcome: Outcome) -> None:
        super().saw(outcome)
        if outcome.status == FAILED:
            print(failure(outcome), file=sys.stderr)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


class Bar(Quiet):
    """Images and rows done of all, images a second, time left, failures."""

    def __init__(self, tasks: Sequence[Task], pending: Sequence[Task]):
        super().__init__(tasks, pending)
        self._bar: Any = options.bar(total=self.images, initial=self.done, desc="Images", unit="image")
        self._show()

    def saw(self, outcome: Outcome) -> None:
        before = self.done
        if outcome.status == FAILED:
            self._bar.write(failure(outcome), file=sys.stderr)
        Progress.saw(self, outcome)
        self._bar.total = self.images
        self._show()
        self._bar.update(self.done - before)

    def begin(self) -> None:
        self._bar.unpause()

    def note(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def _show(self) -> None:
        self._bar.set_postfix_str(f"rows {self.rows_done}/{self.rows}, failed {len(self._failed)}", refresh=False)


class Lines(Progress):
    """A JSON object a line on stdout: {"event": "start" | "row" | "note" | "end", ...}."""

    def __init__(self, tasks: Sequence[Task], pending: Sequence[Task]):
        super().__init__(tasks, pending)
        self._print("start", rows=self.rows, images=self.images, done=self.done)

    def saw(self, outcome: Outcome) -> None:
        super().saw(outcome)
        self._print("row", **dataclasses.asdict(outcome))

    def note(self, text: str) -> None:
        self._print("note", text=text)

    def end(self, status: str) -> None:
        counts = {"rows": self.rows, "images": self.images, "done": self.done, "failed": len(self._failed)}
        self._print("end", status=status, **counts, seconds=round(self.seconds, 3))

    def _print(self, event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), flush=True)


def failure(outcome: Outcome) -> str:
    return f"row {outcome.row}, image {outcome.image} failed: {outcome.error}"
