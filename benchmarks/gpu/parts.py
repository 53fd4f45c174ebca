"""The autoencoder and the text encoder beside their peers."""

from __future__ import annotations

import statistics

import torch

from .. import memory, text, timing, vae
from .report import Report

SIZES = (1024, 2048)


def run(report: Report, device: torch.device, toy: bool) -> None:
    _autoencoder(report, device, toy)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _encoder(report, device, toy)


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
