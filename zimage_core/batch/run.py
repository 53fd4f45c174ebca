"""The local run: one maker samples, a thread beside it saves, and what became of each image is yielded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from .. import image_files
from .folder import NoRoom, Store
from .maker import Made
from .results import Outcome

WAITING = 4  # images that wait to be saved at most, before sampling waits for them


def save(folder: Store, made: Made) -> Outcome:
    """Writes the image of a task whole, and says what became of it. Raises `NoRoom` where the disk is full."""
    task = made.task
    if made.image is None:
        return Outcome.failed(task, made.seconds, made.error or "no image was made")
    try:
        extension = task.file[task.file.rindex(".") :]
        folder.write(task.file, image_files.encoded(made.image, extension, task.parameters))
    except NoRoom:
        raise
    except Exception as error:
        return Outcome.failed(task, made.seconds, f"it can't be saved: {type(error).__name__}: {error}")
    return Outcome.done(task, made.seconds)


def outcomes(images: Iterable[Made], folder: Store) -> Iterator[Outcome]:
    """What became of each image, once it is saved, in the order in which they are made.

    Closed early or by an error, it waits for the image that is being written.
    """
    waiting: deque[Future[Outcome]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="saving") as thread:
        try:
            for made in images:
                waiting.append(thread.submit(save, folder, made))
                while waiting and (waiting[0].done() or len(waiting) > WAITING):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()
