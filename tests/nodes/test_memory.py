"""Two devices: the host's real partial loading and eviction, with an accelerator that is faked on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import provision
import pytest


@pytest.fixture(scope="module")
def report() -> dict:
    """What `two_devices.py` saw; in a process of its own, as its device stays registered with torch."""
    if not (provision.newest() / "main.py").is_file():
        pytest.skip(f"there is no ComfyUI in {provision.newest()}; `make setup` provisions one")
    script = Path(__file__).with_name("two_devices.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_full_and_partial_budgets_give_the_same_latents(report):
    whole, *parts = report["budgets"]
    assert whole["loaded"] == report["size"]
    assert len(parts) == 3
    loaded = [run["loaded"] for run in report["budgets"]]
    assert loaded == sorted(loaded, reverse=True) and len(set(loaded)) == 4
    moved = [run["moved"] for run in report["budgets"]]
    assert moved == sorted(moved)  # what is not loaded travels at every step
    assert all(run["difference"] <= 1e-5 for run in report["budgets"])


def test_encoder_transformer_and_vae_evict_each_other(report):
    loaded = report["eviction"]["loaded"]
    assert loaded["encode"] == ["clip"]
    assert "clip" not in loaded["sample"] and "model" in loaded["sample"]
    assert "clip" not in loaded["decode"] and "vae" in loaded["decode"]
    assert all(difference <= 1e-4 for difference in report["eviction"]["differences"])


def test_decode_that_runs_out_of_memory_falls_back_to_tiles(report):
    tiles = report["out of memory"]["tiles"]
    assert tiles[0] == [16, 16] and len(tiles) > 4
    assert all(height * width <= 64 for height, width in tiles[1:])
    assert report["out of memory"]["mean difference"] < 0.1
