from __future__ import annotations

import pytest
import torch

from zimage_core.config import SchedulerConfig
from zimage_core.sampling.schedule import euler_step, sigmas

TURBO = SchedulerConfig(3.0, False, 0.5, 1.15, 256, 4096)
BASE = SchedulerConfig(6.0, False, 0.5, 1.15, 256, 4096)


def test_published_schedules():
    turbo = [1.0, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0.0]
    base = [1.0, 0.976744, 0.947368, 0.909091, 0.857143, 0.782609, 0.666667, 0.461538, 0.0]
    assert torch.allclose(sigmas(8, TURBO, 4096), torch.tensor(turbo), atol=1e-6)
    assert torch.allclose(sigmas(8, BASE, 4096), torch.tensor(base), atol=1e-6)


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="steps is 0"):
        sigmas(0, TURBO, 4096)


def test_euler_is_exact_on_straight_paths():
    start, end = torch.randn(1, 16, 2, 2), torch.randn(1, 16, 2, 2)
    x, levels = start, sigmas(5, TURBO, 4)
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        x = euler_step(x, start - end, sigma, sigma_next)
    assert torch.allclose(x, end, atol=1e-6)
