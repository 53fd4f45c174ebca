"""The noise levels against diffusers' FlowMatchEulerDiscreteScheduler, used as its Z-Image pipeline uses it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

from zimage_core.config import SchedulerConfig
from zimage_core.sampling.schedule import sigmas


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_static_shift(shift):
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    config = SchedulerConfig.from_dict({**reference.config, "_class_name": type(reference).__name__}, "scheduler")
    for steps in range(1, 61):
        reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        ours = sigmas(steps, config, 4096)
        assert ours.dtype == torch.float32 and ours.shape == (steps + 1,)
        assert (ours - reference.sigmas).abs().max() <= 1e-6


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 16384])
def test_dynamic_shift(tokens):
    reference = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    config = SchedulerConfig.from_dict({**reference.config, "_class_name": type(reference).__name__}, "scheduler")
    for steps in range(1, 61):
        mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
        reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        assert (sigmas(steps, config, tokens) - reference.sigmas).abs().max() <= 1e-6
