"""Two passes over the tokens in one: what Triton's interpreter computes, what its compiler makes for GPUs, and when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zimage_core.backends import fused

ROOT = Path(__file__).resolve().parents[1]
# once; the interpreter cuts bfloat16 off
ROUNDED = {"float32": 1e-7, "bfloat16": 4e-3, "float16": 2.5e-4, "float16 beside float32": 2.5e-4}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    """name of dtypes -> how far off each case is."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return json.loads(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True).stdout)


@pytest.mark.parametrize("dtypes", ROUNDED)
def test_a_pass_rounds_once(interpreted, dtypes):
    assert len(interpreted[dtypes]) == 10 and max(interpreted[dtypes]) <= ROUNDED[dtypes]


TARGETS = [("cuda", 75), ("cuda", 120), ("hip", "gfx1100"), ("cuda", 80), ("cuda", 90)]


@pytest.mark.parametrize(
    "target", [pytest.param(target, marks=[pytest.mark.slow] * (place > 2)) for place, target in enumerate(TARGETS)]
)
def test_the_compiler_knows_what_to_make_for_a_gpu(target, tmp_path, monkeypatch):
    """Machine code for Turing to Blackwell and an AMD GPU, which needs none of them."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from zimage_core.backends import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    strides = ["x_item", "x_row", "h_item", "h_row", "gate_item", "gate_row"]
    made = []
    for tokens, branch in [("bf16", "bf16"), ("fp32", "fp16")]:
        types = dict.fromkeys(["a", "b", "h", "gain", "gate"], f"*{branch}")
        types |= dict.fromkeys(["out", "x"], f"*{tokens}") | dict.fromkeys(["factor", "eps"], "fp32")
        types |= dict.fromkeys(["count", "width", *strides], "i32")
        for kernel, constants in [
            (triton_kernels.gated_kernel, {"PIECE": triton_kernels.PIECE}),
            (triton_kernels.add_normed_kernel, {"HAS_GATE": True, "WIDTH": 4096}),
            (triton_kernels.add_normed_kernel, {"HAS_GATE": False, "WIDTH": 4096}),
        ]:
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            made.append(compile(ASTSource(kernel, signature, constants), target=GPUTarget(*target, 32)))
    assert len(made) == 6 and all(one.asm["cubin" if target[0] == "cuda" else "hsaco"] for one in made)


@pytest.fixture
def on_gpu():
    with torch.no_grad(), FakeTensorMode():
        yield


def pair(
    device: str = "cuda", tokens: int = fused.FEWEST, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    return torch.empty(1, tokens, 64, device=device, dtype=dtype), torch.empty(
        1, tokens, 64, device=device, dtype=dtype
    )


def test_on_a_gpu_they_run(on_gpu):
    a, b = pair(tokens=fused.FEWEST + 1)
    assert fused.gated_(a, b) is a
    gain = torch.empty(64, device="cuda")
    found = fused.add_normed(a[:, :-1], b[:, :-1], gain, torch.empty(1, 1, 64, device="cuda"), 1e-5)
    assert found.shape == (1, fused.FEWEST, 64) and found.dtype == a.dtype and found.is_contiguous()


def test_elsewhere_torchs_own_functions_do(on_gpu, monkeypatch):
    assert fused.gated_(*pair("cpu")) is None and fused.gated_(*pair(tokens=fused.FEWEST - 1)) is None
    a, b = pair(tokens=2 * fused.FEWEST)
    assert fused.gated_(a[..., ::2], b[..., ::2]) is None and fused.gated_(a, b[:, :1]) is None
    with torch.enable_grad():
        assert fused.gated_(a, b) is None
    gain = torch.empty(64)
    assert fused.add_normed(a, b, gain, None, 1e-5) is None  # on another device
    assert fused.add_normed(a, b[:, :1], gain.cuda(), None, 1e-5) is None
    monkeypatch.setattr(fused, "enabled", False)
    assert fused.gated_(a, b) is None


def test_one_that_fails_is_told_of_once_and_never_called_again(monkeypatch, caplog):
    monkeypatch.setattr(fused, "enabled", True)
    with torch.no_grad():
        assert fused._called(fused._GATED, *pair("cpu"), 1.0) is None  # there is none for a CPU
        assert not fused.enabled
        with FakeTensorMode():
            assert fused.gated_(*pair()) is None
    (record,) = caplog.records
    assert "Triton does not work here (NotImplementedError: " in record.getMessage()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton: out of memory")])
def test_too_little_memory_is_no_fault_of_theirs(monkeypatch, error):
    """PyTorch's own is for whoever frees memory; what Triton wants for a kernel is little, and torch has others."""

    def gated_(*_: object) -> None:
        raise error

    monkeypatch.setattr(fused, "_GATED", gated_)
    expected = pytest.raises(type(error)) if isinstance(error, torch.OutOfMemoryError) else nullcontext()
    with torch.no_grad(), FakeTensorMode(), expected:
        assert fused.gated_(*pair()) is None
    assert fused.enabled
