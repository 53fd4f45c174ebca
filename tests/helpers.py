"""What tests in several folders share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch reads the environment when it is imported, and conftest.py sets that
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "nano" / "snapshot"
PUBLISHED = json.loads((ROOT / "tests" / "published_configs.json").read_text())  # Z-Image Turbo's


def relative(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||, in float64."""
    reference = reference.double()
    return ((ours.double() - reference).norm() / reference.norm()).item()


def enlarge(weight: Tensor) -> None:
    """To just what float16 can hold."""
    weight.data = (weight.float() * (6e4 / weight.float().abs().max())).to(weight.dtype)
