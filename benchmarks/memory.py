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
    before, over = anonymous(), threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            found[0] = max(found[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found[0] = max(found[0], anonymous() - before)


def _trim() -> None:
    """Gives freed memory back to the system, else work that reuses it would seem to need none (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)


def anonymous() -> int:
    """Bytes of this process that no file backs (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
