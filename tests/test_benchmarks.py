"""The benchmarks run, at toy size; what they measure is in benchmarks/RESULTS.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results

ROOT = Path(__file__).resolve().parents[1]


def test_loading_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.loading", "--toy", "--layers", "1", "--repeats", "1"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    loaders = {tuple(cell.strip() for cell in row) for row in rows}
    assert {("bf16 file", "core"), ("bf16 file", "our nodes"), ("fp32 folder to bf16", "diffusers")} <= loaders
    assert list(tmp_path.iterdir()) == []


def test_step_runs():
    """It ends with an error where the three implementations disagree."""
    command = [sys.executable, "-m", "benchmarks.step", "--toy", "--repeats", "1", "--dtype", "fp32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(" | ")[1] for line in done.stdout.splitlines() if line.startswith("| fp32")]
    assert set(rows) == {"64², 10 tokens", "64², 40 tokens, guidance"}


def test_results_are_put_between_their_marks(tmp_path, monkeypatch):
    file = tmp_path / "RESULTS.md"
    file.write_text("before\n<!-- a: written by the benchmark -->\nold\n<!-- end of a -->\nafter\n")
    monkeypatch.setattr(results, "FILE", file)
    results.write("a", "python -m a", "| new |")
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| new |" in text and "old" not in text
    assert "`python -m a`" in text and "torch 2." in text
    with pytest.raises(ValueError, match="the marks .* are missing"):
        results.write("b", "", "")


def test_every_section_is_filled():
    text = results.FILE.read_text()
    for name in ("loading", "loading, fewer layers"):
        section = text.split(f"<!-- {name}: written by the benchmark -->")[1].split(f"<!-- end of {name} -->")[0]
        assert "|---" in section
