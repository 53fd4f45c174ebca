"""The autoencoder and the text encoder beside their peers, and passes over a block's tokens in one kernel or two."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F

from zimage_core.backends import fused

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
    """Triton's kernels beside torch's own functions."""
    title = "passes over the tokens of a block, 1024²"
    report.table(title, ["pass", "dtype", ">ms in one kernel", ">ms by torch", ">difference"])
    for dtype in (torch.bfloat16, torch.float16):
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        x, h = torch.randn(2, 1, TOKENS, 3840, **place)
        gain, gate = torch.randn(3840, **place), torch.randn(1, 1, 3840, **place)
        a, b, own = torch.randn(3, 1, TOKENS, 10240, **place)
        own.copy_(a)
        passes: dict[str, timing.Calls] = {
            "silu(a) * b": {
                "ours": lambda a=own, b=b: fused.gated_(a, b),
                "torch": lambda a=a, b=b: F.silu(a, inplace=True).mul_(b),
            },
            "x + gate * norm(h)": {
                "ours": lambda x=x, h=h, gain=gain, gate=gate: fused.add_normed(x, h, gain, gate, 1e-5),
                "torch": lambda x=x, h=h, gain=gain, gate=gate: torch.addcmul(
                    x, gate, F.rms_norm(h, h.shape[-1:], gain, 1e-5)
                ),
            },
        }
        for name, calls in passes.items():
            found = {of: call() for of, call in calls.items()}  # which overwrites `a`: each time it is another one
            if found["ours"] is None:
                report.remark(f"{name}: Triton does not run here")
                continue
            off = ((found["ours"] - found["torch"]).float().norm() / found["torch"].float().norm()).item()
            times = timing.alternating(calls, 20, device)
            cells = [f"{1000 * statistics.median(times[of]):.3f}" for of in ("ours", "torch")]
            report.row(title, name, str(dtype).removeprefix("torch."), *cells, f"{off:.1e}")
