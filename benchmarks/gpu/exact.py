"""One forward at the published geometry against float32 on the CPU; and in float16 where it overflows unguarded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zimage_core.model.transformer import ZImageTransformer

from .. import models, step
from .report import Report
from .steps import everybody

CASES = [step.Case(256, 40), step.Case(256, 400)]  # of more tokens the CPU takes long
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INFLATED = 4096.0  # a power of two: w3's product then exceeds float16, which ends at 65504, in every block


def run(report: Report, device: torch.device, toy: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64  # nobody else computes in every dtype in one process
    config = models.geometry(1 if toy else 30, toy)
    exact = models.core(config, device, torch.float32)
    for parameter in exact.parameters():
        parameter.copy_(parameter.bfloat16())  # so that every dtype holds the same numbers
    names = ["core", "nodes", "nodes compiled", "native", "diffusers"]
    cases = step.TOY_CASES[:1] if toy else CASES
    title = "||difference|| / ||float32 on the CPU||"
    report.table(title, ["weights", "image", "dtype", *(f">{name}" for name in names)])
    reference = _on_cpu(exact)
    for weights in ("drawn", f"w3 times {INFLATED:.0f}"):
        if weights != "drawn":
            for layer in [*exact.layers, *reference.layers]:
                layer.feed_forward.w3.weight.mul_(INFLATED)
            cases = cases[:1]
        expected = {}
        for case in cases:
            given = step.inputs(case, config, torch.device("cpu"), torch.float32)
            given.latents.copy_(given.latents.bfloat16())
            for feats in given.cap_feats:
                feats.copy_(feats.bfloat16())
            expected[case] = given, reference(given.latents, given.t, given.cap_feats)
        for dtype in DTYPES if weights == "drawn" else DTYPES[-1:]:  # bfloat16 holds what float32 does
            built = everybody(_cast(exact, dtype))
            # compiling takes longer than all the rest; the core's compiled blocks are those of the nodes
            left_out = "compiled" if dtype == torch.float32 or toy else "core compiled"
            built = {name: model for name, model in built.items() if left_out not in name}
            for case, (given, result) in expected.items():
                there = step.Inputs(
                    given.latents.to(device, dtype),
                    given.t.to(device),
                    [feats.to(device, dtype) for feats in given.cap_feats],
                )
                found = {name: _error(call, result) for name, call in step.calls(built, there).items()}
                cells = [found.get(name, "") for name in names]
                report.row(title, weights, case, str(dtype).removeprefix("torch."), *cells)
            del built


def _on_cpu(model: ZImageTransformer) -> ZImageTransformer:
    copy = ZImageTransformer(model.config, device="meta")
    copy.load_state_dict({name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}, assign=True)
    return copy.requires_grad_(False).eval()


def _cast(model: ZImageTransformer, dtype: torch.dtype) -> ZImageTransformer:
    copy = ZImageTransformer(model.config, device="meta")
    copy.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()}, assign=True)
    return copy.requires_grad_(False).eval()


def _error(call: Any, expected: Tensor) -> str:
    try:
        result = call().float().cpu()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}"
    if not result.isfinite().all():
        return "not finite"
    return f"{((result - expected).norm() / expected.norm()).item():.1e}"
