"""Where the time of a step goes: kernels, the gaps between them, and whether anything waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .. import step
from .report import Report

SIZES = (512, 1024)
MOST = 12  # kernels of a list


def look(report: Report, built: dict[str, Any], device: torch.device, toy: bool) -> None:
    """Into one table, a step of each network at two sizes; the longest kernels of some; waits of all."""
    config = built["core"].config
    columns = ["image", "", ">kernels", ">busy, ms", ">gaps, ms", ">values read by Python", ">copies across the bus"]
    report.table("one step", columns)
    for size in (64,) if toy else SIZES:
        given = step.inputs(step.Case(size, 40), config, device, next(built["core"].parameters()).dtype)
        for name, call in step.calls(built, given).items():
            call()  # compiles, and warms up
            found = _profiled(call, device)
            report.row("one step", f"{size}²", name, *found[0])
            if found[1] and name in ("core", "nodes", "native") and size == 1024:
                report.table(f"kernels of {name} at {size}²", ["kernel", ">times", ">ms"])
                for kernel, (times, milliseconds) in found[1]:
                    report.row(f"kernels of {name} at {size}²", f"`{kernel[:90]}`", times, f"{milliseconds:.2f}")
    if device.type == "cuda":
        for name, call in step.calls(built, given).items():
            report.remark(f"two steps of {name} where waiting for the device is an error: {_without_waits(call)}")


def _profiled(call: Callable[[], Any], device: torch.device) -> tuple[list[str], list[Any]]:
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as found:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = [event for event in found.events() if "CUDA" in str(event.device_type)]
    kernels = [event for event in events if not event.name.startswith(("Memcpy", "Memset"))]
    if not kernels:
        return ["", "", "", "", ""], []
    busy = sum(event.time_range.elapsed_us() for event in events) / 1000
    span = (max(e.time_range.end for e in events) - min(e.time_range.start for e in events)) / 1000
    copies = sum(event.name.startswith("Memcpy") and "DtoD" not in event.name for event in events)
    runtime = Counter(event.name for event in found.events())
    read = runtime["aten::_local_scalar_dense"]  # of a tensor of the device, or of a CPU's, which waits for nothing
    times: Counter[str] = Counter(event.name for event in kernels)
    lasted: Counter[str] = Counter()
    for event in kernels:
        lasted[event.name] += event.time_range.elapsed_us()
    longest = [(name, (times[name], micros / 1000)) for name, micros in lasted.most_common(MOST)]
    return [str(len(kernels)), f"{busy:.1f}", f"{max(0.0, span - busy):.1f}", str(read), str(copies)], longest


def _without_waits(call: Callable[[], Any]) -> str:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        call()
        return "none"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
