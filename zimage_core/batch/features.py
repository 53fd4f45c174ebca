"""Encoded prompts between text encoder and transformer: held in memory, and the work cut so that they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from ..prompts.cache import PromptCache
from .plan import Task

MEMORY = 2 * 2**30  # bytes of features that are held at a time

Wish = tuple[str, int]  # prompt, limit of tokens


class Features(PromptCache):
    """All that is put in until `clear`, and what the cache behind it knows, to which it hands on what is new."""

    def __init__(self, behind: PromptCache | None = None):
        super().__init__(None, memory_bytes=0)
        self.behind = behind
        self._all: dict[str, Tensor] = {}

    def get(self, key: str) -> Tensor | None:
        if key in self._all:
            return self._all[key].clone()
        found = None if self.behind is None else self.behind.get(key)
        if found is not None:
            self._all[key] = found
        return None if found is None else found.clone()

    def put(self, key: str, features: Tensor) -> None:
        if not features.isfinite().all():
            return
        self._all[key] = features.detach().to("cpu", copy=True).contiguous()
        if self.behind is not None:
            self.behind.put(key, features)

    def clear(self) -> None:
        self._all.clear()


def windows(
    tasks: Iterable[Task], wishes: Callable[[Task], list[Wish]], size: Callable[[Wish], int], most: int | None = None
) -> Iterator[list[Task]]:
    """The tasks in their order, cut where the features of one piece would take more than `most` bytes (`MEMORY`)."""
    most = MEMORY if most is None else most
    window: list[Task] = []
    known: set[Wish] = set()
    held = 0
    for task in tasks:
        new = [wish for wish in dict.fromkeys(wishes(task)) if wish not in known]
        more = sum(map(size, new))
        if window and held + more > most:
            yield window
            window, known, held = [], set(), 0
            new = wishes(task)
            more = sum(map(size, dict.fromkeys(new)))
        window.append(task)
        known.update(new)
        held += more
    if window:
        yield window
