"""What tests in several folders share."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # torch reads the environment when it is imported, and conftest.py sets that
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "nano" / "snapshot"
PUBLISHED = json.loads((ROOT / "tests" / "published_configs.json").read_text())  # Z-Image Turbo's


def tracked(*options: str) -> set[str]:
    """The repository's files, or those that `git ls-files` lists with these options; skips where there is no git."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, check=True).stdout
    return {name for name in os.fsdecode(listed).split("\0") if name and (ROOT / name).is_file()}


def relative(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||, in float64."""
    reference = reference.double()
    return ((ours.double() - reference).norm() / reference.norm()).item()


def enlarge(weight: Tensor) -> None:
    """To just what float16 can hold."""
    weight.data = (weight.float() * (6e4 / weight.float().abs().max())).to(weight.dtype)
