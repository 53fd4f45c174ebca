"""Two passes over the tokens in one: what Triton's interpreter computes, what its compiler makes for GPUs, and when."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zimage_core.backends import fused

ROOT = Path(__file__).resolve().parents[1]
ROUNDED = {"float32": 1e-7, "bfloat16": 4e-3, "float16": 2.5e-4}  # once; bfloat16 is cut off by the interpreter


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    """dtype -> how far off each case is."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return json.loads(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True).stdout)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_a_kernel_rounds_once(interpreted, dtype):
    assert len(interpreted[dtype]) >= 8 and max(interpreted[dtype]) <= ROUNDED[dtype]


@pytest.mark.parametrize("target", [("cuda", 75), ("cuda", 80), ("cuda", 90), ("cuda", 120), ("hip", "gfx1100")])
def test_the_compiler_knows_what_to_make_for_a_gpu(target, tmp_path, monkeypatch):
    """Machine code for Turing to Blackwell and an AMD GPU, which needs none of them."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from zimage_core.backends import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers, sizes = ["out", "x", "h", "gain", "gate"], ["width", "x_item", "x_row", "h_item", "h_row"]
    sizes += ["gate_item", "gate_row"]
    sources = {
        triton_kernels.gated_kernel: (
            {"a": "*bf16", "b": "*bf16", "factor": "fp32", "count": "i32", "PIECE": "constexpr"},
            {"PIECE": triton_kernels.PIECE},
        ),
        triton_kernels.add_normed_kernel: (
            dict.fromkeys(numbers, "*bf16")
            | {"eps": "fp32"}
            | dict.fromkeys(sizes, "i32")
            | dict.fromkeys(["HAS_GATE", "WIDTH"], "constexpr"),
            {"HAS_GATE": True, "WIDTH": 4096},
        ),
    }
    for kernel, (signature, constants) in sources.items():
        ordered = {name: signature[name] for name in kernel.arg_names}
        made = compile(ASTSource(kernel, ordered, constants), target=GPUTarget(*target, 32))
        assert made.asm["cubin" if target[0] == "cuda" else "hsaco"]


@pytest.fixture
def on_gpu():
    with torch.no_grad(), FakeTensorMode():
        yield


def pair(device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.empty(1, 4, 64, device=device, dtype=dtype), torch.empty(1, 4, 64, device=device, dtype=dtype)


def test_on_a_gpu_they_run(on_gpu):
    a, b = pair()
    assert fused.gated_(a, b) is a
    gain = torch.empty(64, device="cuda")
    found = fused.add_normed(a[:, :3], b[:, :3], gain, torch.empty(1, 1, 64, device="cuda"), 1e-5)
    assert found.shape == (1, 3, 64) and found.dtype == a.dtype and found.is_contiguous()


def test_elsewhere_torchs_own_functions_do(on_gpu):
    assert fused.gated_(*pair("cpu")) is None
    a, b = pair()
    assert fused.gated_(a[..., ::2], b[..., ::2]) is None and fused.gated_(a, b[:, :1]) is None
    with torch.enable_grad():
        assert fused.gated_(a, b) is None
    gain = torch.empty(64)
    assert fused.add_normed(a, b, gain, None, 1e-5) is None  # on another device
    assert fused.add_normed(a, b[:, :1], gain.cuda(), None, 1e-5) is None


def test_one_that_fails_is_told_of_once_and_never_called_again(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_broken", False)
    with torch.no_grad(), caplog.at_level(logging.INFO, logger=fused.logger.name):
        for _ in range(2):
            if fused._called("gated_", *pair("cpu"), 1.0) is None:  # there is none for a CPU
                break
        assert fused._broken
        with FakeTensorMode():
            assert fused.gated_(*pair()) is None
    (record,) = caplog.records
    assert "Triton does not work here (NotImplementedError: " in record.getMessage()


def test_too_little_memory_is_no_fault_of_theirs(monkeypatch):
    def gated_(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.ops, fused.SPACE, SimpleNamespace(gated_=gated_))
    with torch.no_grad(), FakeTensorMode(), pytest.raises(torch.OutOfMemoryError):
        fused.gated_(*pair())
    assert not fused._broken
