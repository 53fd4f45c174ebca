"""Captions are refined once per run, in the real host."""

from __future__ import annotations

import pytest
import torch

from . import test_attention

parts = test_attention.parts
positive = test_attention.positive
sample = test_attention.sample


@pytest.fixture
def refined(parts, monkeypatch) -> list[int]:
    """Tokens of each caption that was refined."""
    found: list[int] = []
    network = parts.model.model.diffusion_model
    refine = network.refine_captions

    def counted(features, *arguments, **settings):
        found.append(features.shape[1])
        return refine(features, *arguments, **settings)

    monkeypatch.setattr(network, "refine_captions", counted)
    return found


def test_captions_are_refined_once_per_run_and_not_kept(sample, parts, refined):
    first = sample()
    assert len(refined) == 1
    captions = parts.model.model.diffusion_model.run_captions
    assert captions.known == [] and captions.patcher is None
    assert torch.equal(sample(), first)
    assert len(refined) == 2


def test_captions_that_change_during_the_run_are_refined_anew(sample, parts, refined):
    model = parts.model.clone()
    weight = iter([1.0, 1.0, 0.5])

    def wrapper(apply_model, given):
        c = dict(given["c"])
        c["c_crossattn"] = c["c_crossattn"] * next(weight)
        return apply_model(given["input"], given["timestep"], **c)

    model.set_model_unet_function_wrapper(wrapper)
    changed = sample(model=model)
    assert len(refined) == 2
    assert not torch.equal(changed, sample())


def test_captions_follow_an_override_that_may_change(sample, parts, refined):
    model = parts.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k)
    sample(model=model)
    assert len(refined) == 3


def test_captions_are_dropped_after_an_error(sample, parts, refined):
    model = parts.model.clone()

    def wrapper(apply_model, given):
        apply_model(given["input"], given["timestep"], **given["c"])
        raise RuntimeError("from another node")

    model.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(RuntimeError, match="from another node"):
        sample(model=model)
    assert len(refined) == 1
    assert parts.model.model.diffusion_model.run_captions.known == []
