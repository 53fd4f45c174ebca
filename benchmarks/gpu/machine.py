"""What the machine can do: the floors under everything else."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import models, timing
from .report import Report

ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def run(report: Report, device: torch.device, toy: bool) -> None:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        report.remark(f"{torch.cuda.get_device_name()}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free")
    report.table("rates", ["what", ">milliseconds", ">rate", "unit"])
    _copies(report, device, toy)
    side = 64 if toy else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        taken = each(lambda a=a, b=b: a @ b, device, 20 if dtype.itemsize == 2 else 4)
        what, found = f"matmul of {side}², {str(dtype).removeprefix('torch.')}", rate(2 * side**3 / taken)
        report.row("rates", what, f"{1000 * taken:.2f}", found, "TFLOP/s")
    small = torch.zeros(16, device=device)
    taken = each(lambda: small.add_(1), device, 2000)
    report.row("rates", "one small kernel, from Python", f"{1000 * taken:.4f}", f"{taken * 1e6:.1f}", "microseconds")
    _matmuls(report, device, toy)
    _attention(report, device, toy)


def _copies(report: Report, device: torch.device, toy: bool) -> None:
    source = torch.empty(2**22 if toy else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = each(lambda: target.copy_(source), device)
    found = rate(2 * source.numel() / taken)
    report.row("rates", "copy on the device, read and written", f"{1000 * taken:.2f}", found, "TB/s")
    host = torch.empty(2**20 if toy else 2**30, dtype=torch.uint8, pin_memory=device.type == "cuda")
    taken = each(lambda: source[: len(host)].copy_(host, non_blocking=True), device, 3)
    report.row("rates", "copy from pinned memory", f"{1000 * taken:.2f}", rate(len(host) / taken), "TB/s")


def _matmuls(report: Report, device: torch.device, toy: bool) -> None:
    """The products of a block."""
    config = models.geometry(1, toy)
    shapes = {"qkv": (config.dim, 3 * config.dim), "out": (config.dim, config.dim)}
    shapes |= {"w1": (config.dim, config.ffn_dim), "w2": (config.ffn_dim, config.dim)}
    report.table("a block's products, bf16", ["tokens", *(f">{name}, TFLOP/s" for name in shapes)])
    for tokens in (64,) if toy else (1088, 4160, 16448):
        cells = []
        for inner, outer in shapes.values():
            x = torch.randn(tokens, inner, device=device, dtype=torch.bfloat16)
            weight = torch.randn(outer, inner, device=device, dtype=torch.bfloat16)
            taken = each(lambda x=x, weight=weight: F.linear(x, weight), device)
            cells.append(f"{2 * tokens * inner * outer / taken / 1e12:.0f}")
        report.row("a block's products, bf16", tokens, *cells)


def _attention(report: Report, device: torch.device, toy: bool) -> None:
    heads, width = (2, 128) if toy else (30, 128)
    report.table("attention, bf16", ["tokens", *(f">{name}, ms" for name in ("torch's choice", *ATTENTION))])
    report.table("the first call of a length, bf16", ["tokens", *(f">{name}, ms" for name in ATTENTION)])
    for tokens in (64,) if toy else (1088, 4160, 16448):
        # as a block hands them over: views of one [B, N, 3, heads, head_dim]
        qkv = torch.randn(1, tokens, 3, heads, width, device=device, dtype=torch.bfloat16)
        attend = partial(F.scaled_dot_product_attention, *(part.transpose(1, 2) for part in qkv.unbind(2)))
        cells = [f"{1000 * each(attend, device):.3f}"]
        for kernel in ATTENTION.values():
            try:
                with sdpa_kernel(kernel):
                    cells.append(f"{1000 * each(attend, device):.3f}")
            except RuntimeError:
                cells.append("no kernel")
        report.row("attention, bf16", tokens, *cells)
    for tokens in (32,) if toy else (4128, 4192):  # some kernels make a plan for each length
        q, k, v = torch.randn(3, 1, heads, tokens, width, device=device, dtype=torch.bfloat16).unbind(0)
        cells = []
        for kernel in ATTENTION.values():
            try:
                with sdpa_kernel(kernel):
                    attend = partial(F.scaled_dot_product_attention, q, k, v)
                    cells.append(f"{1000 * timing.seconds(attend, device):.1f}")
            except RuntimeError:
                cells.append("no kernel")
        report.row("the first call of a length, bf16", tokens, *cells)


def each(call: Callable[[], Any], device: torch.device, count: int = 10) -> float:
    """Seconds of one of so many calls in a row, which fill a GPU's queue; the median of three rows."""
    call()
    rows = [timing.seconds(lambda: [call() for _ in range(count)], device) for _ in range(3)]
    return statistics.median(rows) / count


def rate(per_second: float) -> str:
    return f"{per_second / 1e12:.3g}"
