"""Marks of what workers have begun, in a hidden folder beside the images: what is left of one that died tells of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .folder import Store

FOLDER = ".zimage-attempts"
HERE = "here"  # by which a worker knows that it sees the folder of the one who sent it


class Attempts:
    """Of one run, by its id: what an earlier run has left counts for nothing: its end killed its workers.

    with attempts.mark("batch-3"): ...  # a worker that is killed in there leaves the mark
    attempts.count("batch-3")  # how many were
    """

    def __init__(self, store: Store, run: str):
        self.run = run
        self._store = store
        self._folder = f"{FOLDER}/{run}"

    def begin(self) -> None:
        """By the one who sends work out; earlier runs' marks are gone then."""
        self._store.remove(FOLDER)
        self._store.touch(f"{self._folder}/{HERE}")

    def end(self) -> None:
        self._store.remove(FOLDER)

    def seen(self) -> bool:
        """Whether this machine sees what `begin` made on the other."""
        return HERE in self._store.listed(self._folder)

    def count(self, what: str) -> int:
        return len(self._of(what))

    def left(self) -> list[str]:
        """All that is begun and not ended."""
        return sorted({name.rpartition(".")[0] for name in self._store.listed(self._folder)} - {""})

    @contextlib.contextmanager
    def mark(self, what: str) -> Iterator[None]:
        """Around an attempt. Errors end one as well as success does: only a death leaves its mark."""
        self._store.touch(f"{self._folder}/{what}.{self.count(what)}")
        try:
            yield
        finally:
            self.clear(what)

    def clear(self, what: str) -> None:
        for name in self._of(what):
            self._store.remove(f"{self._folder}/{name}")

    def _of(self, what: str) -> list[str]:
        return [name for name in self._store.listed(self._folder) if name.rpartition(".")[0] == what]
