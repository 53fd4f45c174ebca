"""What a control network adds to a step at the published geometry, beside ComfyUI's own."""

from __future__ import annotations

import torch

from .. import control, models, step
from .report import Report

CASES = [step.Case(1024, 40), step.Case(1024, 40, guided=True)]
REPEATS = 5


def run(report: Report, device: torch.device, toy: bool) -> None:
    config = models.geometry(2 if toy else 30, toy)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    ours = models.core(config, device, dtype)
    native, nodes, networks = models.native(ours), models.of_nodes(ours), control.networks(ours)
    report.table("milliseconds", control.COLUMNS)
    for case in step.TOY_CASES if toy else CASES:
        steps = control.calls(step.inputs(case, config, device, dtype), native, nodes, networks)
        found = control.measured(steps, 1 if toy else REPEATS, device)
        report.row("milliseconds", *control.row(case, found, 1000.0))
