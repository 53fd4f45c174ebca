"""What runs in the actors of a Ray cluster, and may be imported without Ray."""

from __future__ import annotations

import pickle
import socket
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .attempts import Attempts
from .folder import NoRoom, Store
from .maker import Maker, Settings
from .plan import Task
from .results import Outcome
from .run import outcomes

KEEP_ENCODER = 40e9  # bytes of GPU from which text encoder and transformer stay there side by side; they are 20.1e9
DIED = (
    "its worker died {} times while making it (out of memory, a crash, or killed); make it smaller, or run the same "
    "command again to try once more"
)


@dataclass(frozen=True)
class Job:
    """What an actor is told. limit: so many may be loading the model, or have died of it."""

    settings: Settings
    store: Store
    run: str
    tries: int
    limit: int
    gpus: float


class Worker:
    """What an actor runs. It answers with pairs: ("outcome", ...), ("no room", ...) or ("fatal", ...)."""

    def __init__(self, job: Job):
        self.job = job
        self.attempts = Attempts(job.store, job.run)
        self._maker: Maker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Raises nothing: Ray would end the whole run, or drop these rows."""
        told: list[tuple[str, Any]] = []
        try:
            for number, packed in zip(batch["number"], batch["tasks"], strict=True):
                if self._maker is None:
                    self._maker = self._load()
                told += [("outcome", one) for one in self._chunk(self._maker, f"chunk-{number}", unpacked(packed))]
        except NoRoom as error:
            told.append(("no room", (error.errno, error.strerror, error.filename)))
        except Exception as error:
            told.append(("fatal", f"{socket.gethostname()}: {type(error).__name__}: {error}"))
        return {"told": [pickle.dumps(one) for one in told]}

    def _load(self) -> Maker:
        """At the first chunk and not in __init__, where Ray would start an actor that dies again without end."""
        if not self.attempts.seen():
            raise ValueError(
                f"the output folder {self.job.store.told()} is not the same here as where the command runs; give one "
                "by --output that all machines share"
            )
        loading = [name for name in self.attempts.left() if name.startswith("load-")]
        if len(loading) >= self.job.limit:
            raise ValueError("workers died again and again while they loaded the model; is there memory enough?")
        with self.attempts.mark(f"load-{uuid.uuid4().hex}"):
            return Maker(replace(self.job.settings, keep_text_encoder=self._has_room()))

    def _has_room(self) -> bool:
        """Whether the text encoder may stay: else it is read again for each chunk."""
        if self.job.settings.device != "cuda":
            return True
        return torch.cuda.get_device_properties(0).total_memory * min(self.job.gpus, 1) >= KEEP_ENCODER

    def _chunk(self, maker: Maker, name: str, tasks: list[Task]) -> Iterator[Outcome]:
        """All together, or one by one where a worker died of them before."""
        begun = self.attempts.left()  # of an image that was given up, too: its chunk's outcomes may have been lost
        if name not in begun and not {_mark(task) for task in tasks} & {*begun}:
            with self.attempts.mark(name):
                yield from outcomes(maker.make(tasks), self.job.store)
            return
        for task in tasks:
            own = _mark(task)
            died = self.attempts.count(own) + (len(tasks) == 1)
            if self.job.store.holds(task.file, task.parameters):
                yield Outcome.done(task, 0.0)
            elif died and died >= self.job.tries - (len(tasks) > 1):
                yield Outcome.failed(task, 0.0, DIED.format(died + (len(tasks) > 1)))
            else:
                with self.attempts.mark(own):
                    yield from outcomes(maker.make([task]), self.job.store)
        self.attempts.clear(name)


def _mark(task: Task) -> str:
    return f"image-{task.row.number}-{task.image}"


def packed(tasks: Sequence[Task]) -> bytes:
    return zlib.compress(pickle.dumps(list(tasks)), 1)


def unpacked(content: bytes) -> list[Task]:
    found: list[Task] = pickle.loads(zlib.decompress(content))
    return found
