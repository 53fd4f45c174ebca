"""Times of several calls side by side, and what is told of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import memory

Calls = Mapping[str, Callable[[], Any]]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call: between two events of a GPU, whose queue is empty before, or by the clock."""
    memory.synchronize(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    started = time.perf_counter()
    call()
    memory.synchronize(device)
    return time.perf_counter() - started


def alternating(calls: Calls, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Each repeat runs every call once, so that what else the machine does meets all of them. Warm them up before."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(seconds(call, device))
    return found


def faster(times: Mapping[str, list[float]], ours: str) -> str:
    """The name of the fastest of the others."""
    return min((name for name in times if name != ours), key=lambda name: statistics.median(times[name]))


def ratio(times: Mapping[str, list[float]], ours: str, theirs: str) -> str:
    """Ratio of the medians, and the range of the ratios repeat by repeat."""
    each = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    median = statistics.median(times[ours]) / statistics.median(times[theirs])
    return f"{median:.3f} ({min(each):.2f}–{max(each):.2f})"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown; columns of numbers, which begin with a >, are on the right."""
    rule = "|".join("---:" if column.startswith(">") else "---" for column in columns)
    head, *lines = (f"| {' | '.join(cells)} |" for cells in ([name.removeprefix(">") for name in columns], *rows))
    return "\n".join([head, f"|{rule}|", *lines])
