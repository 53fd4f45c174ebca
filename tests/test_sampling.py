"""The loop with models whose result is known beforehand."""

from __future__ import annotations

import pytest
import torch

from zimage_core.config import SchedulerConfig
from zimage_core.sampling import loop
from zimage_core.sampling.schedule import sigmas

SCHEDULE = SchedulerConfig(3.0, False, 0.5, 1.15, 256, 4096)
NOISE = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
CAPTIONS = [torch.zeros(3, 8), torch.zeros(5, 8)]


class Straight:
    """A model that knows the image: its velocity towards it is image - noise. Records what it is asked."""

    def __init__(self):
        self.times, self.batches, self.dtypes = [], [], []

    def __call__(self, latents, t, cap_feats):
        assert len(latents) == len(t) == len(cap_feats)
        self.times.append(t[0].item())
        self.batches.append(len(latents))
        self.dtypes.append(latents.dtype)
        return (IMAGE - NOISE).repeat(len(latents) // 2, 1, 1, 1).to(latents.dtype)


def test_it_arrives_at_the_image_and_time_runs_upwards():
    model = Straight()
    result = loop.denoise(model, NOISE, sigmas(8, SCHEDULE, 4), CAPTIONS)
    assert torch.allclose(result, IMAGE, atol=1e-5)
    assert model.times == sorted(model.times) and model.times[0] == 0.0 and model.times[-1] == pytest.approx(0.7)
    assert model.batches == [2] * 8


def test_a_curved_field_is_integrated_to_first_order():
    """dx/dsigma = x gives x(0) = x(1) / e; Euler's error halves as the steps double."""

    def model(latents, t, cap_feats):
        return -latents

    even = SchedulerConfig(1.0, False, 0.5, 1.15, 256, 4096)
    errors = []
    for steps in (50, 100, 200):
        result = loop.denoise(model, NOISE, sigmas(steps, even, 4), CAPTIONS)
        errors.append((result - NOISE / torch.e).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_the_model_computes_in_its_dtype_and_the_loop_in_float32():
    model = Straight()
    result = loop.denoise(model, NOISE, sigmas(4, SCHEDULE, 4), CAPTIONS, dtype=torch.bfloat16)
    assert set(model.dtypes) == {torch.bfloat16} and result.dtype == torch.float32


def test_guidance_formula():
    positive, negative = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    guided = loop.guided_velocity(positive, negative, 2.0, 0.0)
    assert torch.allclose(guided, 3 * positive - 2 * negative, atol=1e-5)


def test_normalization_caps_each_item_and_never_amplifies():
    positive = torch.ones(2, 16, 4, 4)
    negative = torch.stack((-torch.ones(16, 4, 4), 0.9 * torch.ones(16, 4, 4)))
    guided = loop.guided_velocity(positive, negative, 1.0, 1.0)
    norms = guided.flatten(1).norm(dim=1) / positive.flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.tensor([1.0, 1.0]))  # 3 and 1.1 times before
    loose = loop.guided_velocity(positive, negative, 1.0, 2.0)
    norms = loose.flatten(1).norm(dim=1) / positive.flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.tensor([2.0, 1.1]))


def test_truncation_switches_guidance_off_late():
    model = Straight()
    loop.denoise(model, NOISE, sigmas(8, SCHEDULE, 4), CAPTIONS, CAPTIONS, guidance_scale=2.0, cfg_truncation=0.25)
    # 1 - sigma is 0, .045, .1, .167, .25, .357, .5, .7: guidance doubles the batch up to .25
    assert model.batches == [4, 4, 4, 4, 4, 2, 2, 2]


def test_no_guidance_never_runs_the_negative():
    model = Straight()
    loop.denoise(model, NOISE, sigmas(3, SCHEDULE, 4), CAPTIONS, CAPTIONS, guidance_scale=0.0)
    assert model.batches == [2, 2, 2]


def test_guidance_without_a_negative_is_an_error():
    with pytest.raises(ValueError, match="guidance needs negative captions"):
        loop.denoise(Straight(), NOISE, sigmas(3, SCHEDULE, 4), CAPTIONS, guidance_scale=1.0)


def test_callback_sees_each_step_and_can_cancel():
    seen = []

    def callback(step, steps, latents, estimate):
        seen.append((step, steps))
        assert torch.allclose(estimate, IMAGE, atol=1e-5)
        return step < 3

    with pytest.raises(loop.Cancelled, match="after step 3 of 8"):
        loop.denoise(Straight(), NOISE, sigmas(8, SCHEDULE, 4), CAPTIONS, callback=callback)
    assert seen == [(1, 8), (2, 8), (3, 8)]
