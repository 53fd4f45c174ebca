"""What memory a device has left, and giving freed memory back: the only places that look beside torch."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had without swapping; None where nobody tells."""
    if device.type == "cuda":  # what torch holds without using it is free as well
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and (told := Path("/proc/meminfo")).exists():
        found = (line.split() for line in told.read_text().splitlines())
        return next((int(words[1]) * 1024 for words in found if words[0] == "MemAvailable:"), None)
    return None


def give_back() -> None:
    """Returns freed memory to the system. glibc keeps blocks below 32 MB, in pieces that the next band may not fit."""
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    """glibc's; one that does nothing with another C library."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if found is None:
        return lambda pad: 0
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found
