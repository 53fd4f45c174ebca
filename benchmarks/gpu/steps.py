"""One step of the transformer at the published geometry: everybody on the same weights, in turn, and then profiled."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch

from zimage_core.model.patchify import padded

from .. import models, step, timing
from . import profile
from .report import Report

CASES = [step.Case(512, 40), step.Case(1024, 40), step.Case(1024, 400), step.Case(2048, 40)]
OTHERS = ("native", "diffusers")
REPEATS = 10


def run(report: Report, device: torch.device, toy: bool) -> None:
    config = models.geometry(1 if toy else 30, toy)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    built = everybody(models.core(config, device, dtype))
    report.table("milliseconds", ["image", *(f">{name}" for name in built), ">floor"])
    ours = [name for name in built if name not in OTHERS]
    report.table("to the faster of native and diffusers", ["image", *(f">{name}" for name in ours)])
    report.table("MB beside the weights", ["image", *(f">{name}" for name in built)])
    report.table("differs from core, relative", ["image", *(f">{name}" for name in built)])
    for case in step.TOY_CASES if toy else CASES:
        given = step.inputs(case, config, device, dtype)
        found = step.measure(built, given, 1 if toy else REPEATS)
        tokens = padded((case.size // 16) ** 2)
        floor = step.operations(config, case) / step.matmul_rate(config, device, dtype, tokens)
        median = {name: statistics.median(times) for name, times in found.seconds.items()}
        report.row("milliseconds", case, *(f"{1000 * median[name]:.1f}" for name in built), f"{1000 * floor:.1f}")
        peer = timing.faster({name: found.seconds[name] for name in ("", *OTHERS) if name}, "")
        ratios = [timing.ratio(found.seconds, name, peer) for name in ours]
        report.row("to the faster of native and diffusers", f"{case} ({peer})", *ratios)
        report.row("MB beside the weights", case, *(f"{found.peak[name] / 1e6:,.0f}" for name in built))
        report.row("differs from core, relative", case, *(f"{found.off[name]:.1e}" for name in built))
    built.pop("diffusers")
    profile.look(report, built, device, toy)


def everybody(ours: Any) -> dict[str, Any]:
    """Implementation -> network, on the weights of `ours`: the core's and that of our nodes, each compiled as well."""
    compiled = copy.copy(ours)  # the same parameters
    compiled.compiled = True
    mine = {"core": ours, "core compiled": compiled}
    mine |= {"nodes": models.of_nodes(ours), "nodes compiled": models.of_nodes(ours, compiled=True)}
    return mine | {"native": models.native(ours), "diffusers": models.diffusers(ours)}
