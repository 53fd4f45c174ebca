"""How much memory a piece of work takes at its peak, and waiting for a device to be done."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def peak(device: torch.device | str = "cpu") -> Iterator[list[int]]:
    """[bytes by which memory grew at most]: a GPU's allocations, or this process's anonymous pages, every 2 ms."""
    device = torch.device(device)
    found = [0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    _trim()
    before = anonymous()
    with peak_of("self", 0.002) as found:
        yield found
    found[0] -= before


@contextmanager
def peak_of(process: int | str, interval: float = 0.02) -> Iterator[list[int]]:
    """[bytes of a process's anonymous pages at most], looked at every so many seconds."""
    found, over = [0], threading.Event()

    def look() -> None:
        found[0] = max(found[0], anonymous(process))

    def watch() -> None:
        while not over.wait(interval):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        look()


def _trim() -> None:
    """Gives freed memory back to the system, else work that reuses it would seem to need none (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)


def anonymous(process: int | str = "self") -> int:
    """Bytes of a process that no file backs (Linux)."""
    with open(f"/proc/{process}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
