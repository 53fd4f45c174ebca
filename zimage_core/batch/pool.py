"""The prompts of a run, shared by its servers: each is taken by one, given back where that one is lost, ended once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .plan import Task


@dataclass
class Job:
    """A prompt to be run. wanted: the images that are missing of those that it gives."""

    task: Task  # its first image
    wanted: dict[int, Task]  # which of its images, from 1 -> task
    crashes: int = 0  # servers that went away while they ran it
    vanished: int = 0  # times that a server knew nothing of it any more
    fresh: str = ""  # what makes its outputs new to a server that remembered them and had no image

    @property
    def mark(self) -> dict[str, object]:
        """What a server is told of it, by which the next run knows it again."""
        return {"row": self.task.row.number, "image": self.task.image, "key": self.task.key}


class Pool:
    """For threads."""

    def __init__(self, jobs: Iterable[Job]):
        self._lock = threading.Lock()
        self._waiting = deque(jobs)
        self._open = len(self._waiting)
        self._ended: set[tuple[int, int]] = set()
        self._idle: set[str] = set()  # servers that have nothing, and got nothing
        self.closed = threading.Event()  # all have ended, or nobody wants them any more

    def take(self, server: str, busy: bool) -> Job | None:
        """busy: whether the server has one already; then it gets none while another has nothing."""
        with self._lock:
            if self._waiting and not (busy and self._idle - {server}):
                self._idle.discard(server)
                return self._waiting.popleft()
            if not busy:
                self._idle.add(server)
            return None

    def leave(self, server: str) -> None:
        """It is away, and waits for nothing."""
        with self._lock:
            self._idle.discard(server)

    @property
    def wanted(self) -> bool:
        """Whether a server has nothing to do."""
        return bool(self._idle)

    def claim(self, mark: object) -> Job | None:
        """Takes the one with this mark, if it waits."""
        with self._lock:
            found = next((job for job in self._waiting if job.mark == mark), None)
            if found is not None:
                self._waiting.remove(found)
            return found

    def give_back(self, jobs: Sequence[Job]) -> None:
        """To be the next that are taken."""
        with self._lock:
            self._waiting.extendleft(reversed(jobs))

    def end(self, job: Job) -> None:
        with self._lock:
            if job.task.place not in self._ended:
                self._ended.add(job.task.place)
                self._open -= 1
            if not self._open:
                self.closed.set()
