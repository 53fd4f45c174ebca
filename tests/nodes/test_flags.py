"""ComfyUI's own flags mean for our loaders what they mean for the stock ones: `flags.py` looks at both under each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # test_dtypes.py has flags of precision inside one process


@pytest.fixture(scope="module")
def report(pack) -> list[dict[str, Any]]:
    """`pack` skips where there is no ComfyUI."""
    script = Path(__file__).with_name("flags.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def row(report: list[dict[str, Any]], device: str, *flags: str) -> dict[str, Any]:
    return next(row for row in report if row["device"] == device and {*flags} <= {*row["flags"]})


def differing(found: dict[str, Any], kind: str) -> dict[str, Any]:
    ours, stock = found[kind]
    return {name: (ours[name], stock[name]) for name in ours if ours[name] != stock[name]}


def test_every_row_was_loaded(report):
    assert [row for row in report if "ended" in row or "error" in row] == []


def test_precision_and_devices_are_the_stock_loaders(report):
    """But for what is said here, each with its reason."""
    for found in report:
        flags = found["flags"]
        transformer, scaled, encoder = (differing(found, kind) for kind in ("transformer", "scaled", "encoder"))
        if found["device"] == "cpu" and not any("unet" in flag or "force-fp" in flag for flag in flags):
            # without a flag for it, we don't make float32 of bfloat16: a CPU computes in float32 either way
            assert transformer.keys() == {"stored", "plain", "dtype"}, flags
            assert "bfloat16" in transformer["stored"][0] and scaled.pop("dtype"), flags
            transformer = {}
        if "--fp8_e4m3fn-unet" in flags or "--fp8_e5m2-unet" in flags:
            scaled.pop("dtype")  # norms of a quantized model stay as they are
        if "--gpu-only" in flags or "--highvram" in flags:  # when, not where: at once, or when first used
            scaled, encoder = {}, {}
        assert (transformer, scaled, encoder, differing(found, "vae")) == ({}, {}, {}, {}), flags


@pytest.mark.parametrize(
    "flags, stored, computed",
    [
        ([], "bfloat16", "bfloat16"),
        (["--force-fp32"], "float32", "float32"),
        (["--force-fp16"], "float16", "float16"),
        (["--fp32-unet"], "float32", "float32"),
        (["--fp64-unet"], "float64", "float64"),
        (["--fp8_e4m3fn-unet"], "float8_e4m3fn", "bfloat16"),
        (["--force-fp32", "--bf16-unet"], "bfloat16", "float32"),
    ],
)
def test_the_comparison_sees_the_flags(report, flags, stored, computed):
    ours, _stock = row(report, "gpu", *flags)["transformer"]
    assert (ours["stored"], ours["computed"]) == (f"torch.{stored} cpu", f"torch.{computed}")


def test_latents_come_out_as_from_the_stock_sampler(report):
    for found in report:
        if "sampled" in found:
            ours, stock = found["sampled"]
            assert ours == stock and ours.endswith("True"), found["flags"]
    assert row(report, "cpu", "--fp16-intermediates")["sampled"][0].startswith("torch.float16")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_without_mapping_an_overwritten_file_does_no_harm(report, device):
    """Transformer (plain and quantized), text encoder, VAE, and a LoRA of both: mapped, the process would end."""
    assert row(report, device, "--disable-mmap")["survives"] is True
