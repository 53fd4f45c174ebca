"""The memory of the process that the tests run in, as Linux tells it; elsewhere the test is skipped."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

PROCESS = Path("/proc/self")


def anonymous() -> int:
    """Bytes that are not a file's: what mapping a file does not add to."""
    return _read("RssAnon")


def growth(call: Callable[[], object]) -> int:
    """Bytes by which the memory grew at its peak during the call, pages of mapped files included."""
    gc.collect()
    before = _read("VmRSS")
    (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    call()
    return _read("VmHWM") - before


def _read(name: str) -> int:
    if not (PROCESS / "clear_refs").exists():
        pytest.skip("this system does not tell a process's memory")
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
