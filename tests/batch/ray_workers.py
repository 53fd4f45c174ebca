"""Workers for the tests that die of some prompts, or of the model."""

from __future__ import annotations

import os
import signal
from typing import Any

from zimage_core.batch import ray_worker
from zimage_core.batch.maker import Maker
from zimage_core.batch.ray_worker import Worker


class Poisoned(Worker):
    """Killed, as by the system when memory runs out, in the middle of an image whose prompt has "poison" in it."""

    def _load(self) -> Maker:
        maker = super()._load()
        make = maker.make

        def deadly(tasks: Any, *more: Any) -> Any:
            for made in make(tasks, *more):
                if "poison" in made.task.row.prompt:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield made

        maker.make = deadly  # type: ignore[method-assign]
        return maker


class Unloadable(Worker):
    """Killed each time it loads the model."""

    def _load(self) -> Maker:
        ray_worker.Maker = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,misc]
        return super()._load()
