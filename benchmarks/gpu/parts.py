"""The autoencoder and the text encoder beside their peers, and passes over a block's tokens in one kernel or two."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zimage_core.backends import fused
from zimage_core.backends.half import HalfOperations
from zimage_core.backends.operations import LeanOperations, read_gain

from .. import memory, text, timing, vae
from .report import Report

SIZES = (1024, 2048)
TOKENS = 4160  # of an image of 1024² and a prompt of 40


def run(report: Report, device: torch.device, toy: bool) -> None:
    _autoencoder(report, device, toy)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _encoder(report, device, toy)
    if device.type == "cuda":
        _passes(report, device)


def _autoencoder(report: Report, device: torch.device, toy: bool) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = vae.core(toy, device, dtype)
    report.table("autoencoder", vae.COLUMNS)
    for size in (64,) if toy else SIZES:
        for direction, found in vae.calls(model, *vae.inputs(size, device, dtype)).items():
            for cells in vae.rows(f"{direction} {size}²", found, 1 if toy else 5, device, dtype):
                report.row("autoencoder", *cells)


def _encoder(report: Report, device: torch.device, toy: bool) -> None:
    ours = text.core(3 if toy else 36, toy, device)
    report.table("text encoder", ["prompt", "implementation", ">milliseconds", ">MB beside the weights"])
    others = text.others(ours, toy)
    for length in text.PROMPTS:
        ids = torch.randint(0, ours.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
        calls, peaks = text.calls(ours, others, ids.to(device)), {}
        for name, call in calls.items():
            with memory.peak(device) as peak:
                call()
            peaks[name] = peak[0]
        for name, times in timing.alternating(calls, 1 if toy else 10, device).items():
            taken = f"{1000 * statistics.median(times):.1f}"
            report.row("text encoder", f"{length} tokens", name, taken, f"{peaks[name] / 1e6:,.0f}")


def _passes(report: Report, device: torch.device) -> None:
    """Those that Triton's kernels do, also by torch; in float16 as Turbo has them, with tokens of float32."""
    title = "passes over the tokens of a block, 1024²"
    report.table(title, ["pass", "dtype", ">ms in one kernel", ">ms by torch", ">difference"])
    for dtype, of_tokens, operations in (
        (torch.bfloat16, torch.bfloat16, LeanOperations(read_gain)),
        (torch.float16, torch.float32, HalfOperations(read_gain)),
    ):
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        drawn, b = torch.randn(2, 1, TOKENS, 10240, **place)
        x, h = torch.randn(1, TOKENS, 3840, device=device, dtype=of_tokens), torch.randn(1, TOKENS, 3840, **place)
        a, gate, norm = drawn.clone(), torch.randn(1, 1, 3840, **place), torch.nn.RMSNorm(3840, 1e-5, **place)
        for name, call in {
            "silu(a) * b": partial(operations.gated, a, b),
            "x + gate * norm(h)": partial(operations.add_normed, x, h, norm, gate, operations.shrink**2),
        }.items():
            ways: timing.Calls = {"ours": call, "torch": partial(_by_torch, call)}
            results = []
            for way in ways.values():
                a.copy_(drawn)  # which is overwritten
                results.append(way().float())
                if not fused.enabled:
                    report.remark("Triton does not run here; the log says why")
                    return
            off = ((results[0] - results[1]).norm() / results[1].norm()).item()
            times = timing.alternating(ways, 20, device)
            cells = [f"{1000 * statistics.median(times[of]):.3f}" for of in ("ours", "torch")]
            report.row(title, name, str(dtype).removeprefix("torch."), *cells, f"{off:.1e}")


def _by_torch(call: Callable[[], Tensor]) -> Tensor:
    fused.enabled = False
    try:
        return call()
    finally:
        fused.enabled = True
