"""What others put into a block counts, whichever way blocks run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._inductor.config

from zimage_core.backends import cpu_rows
from zimage_core.model import block as block_module

from . import test_blocks
from .test_blocks import SMALL, as_module, as_on_a_gpu, given, in_rows, relative

_small_ones_run_in_rows_too = test_blocks._small_ones_run_in_rows_too
calls = test_blocks.calls
model = test_blocks.model


class Around(torch.nn.Module):
    """Another module in a part's place; what it makes of the part's result is no gain."""

    def __init__(self, part: torch.nn.Module):
        super().__init__()
        self.part = part

    def forward(self, *arguments, **settings):
        return 1.5 * self.part(*arguments, **settings) + 0.1


class Rolled(torch.nn.Module):
    def forward(self, weight):
        return weight.roll(1, dims=-1)


def replace_forward(parent, name, part):
    forward = part.forward
    part.forward = lambda *arguments, **settings: 1.5 * forward(*arguments, **settings) + 0.1


def replace_module(parent, name, part):
    setattr(parent, name, Around(part))


def replace_class(parent, name, part):
    class Changed(type(part)):
        def forward(self, *arguments, **settings):
            return 1.5 * super().forward(*arguments, **settings) + 0.1

    part.__class__ = Changed


def hook(parent, name, part):
    part.register_forward_hook(lambda module, given, output: 1.5 * output + 0.1)


def pre_hook(parent, name, part):
    part.register_forward_pre_hook(lambda module, given: (1.5 * given[0] + 0.1, *given[1:]))


def global_hook(parent, name, part):
    def scaled(module, given, output):
        return 1.5 * output + 0.1 if module is part else None

    torch.nn.modules.module.register_module_forward_hook(scaled)


def parametrization(parent, name, part):
    torch.nn.utils.parametrize.register_parametrization(part, "weight", Rolled())


WAYS = [replace_forward, replace_module, replace_class, hook, pre_hook, global_hook, parametrization]
PARTS = ["attention", "feed_forward", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"]
PARTS += ["attention.qkv", "attention.q_norm", "attention.k_norm", "attention.out"]
PARTS += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation", "adaLN_modulation.0"]


@pytest.fixture
def _no_global_hooks():
    yield
    torch.nn.modules.module._global_forward_hooks.clear()


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("_no_global_hooks")
@pytest.mark.parametrize(
    ("path", "change"),
    [
        pytest.param(
            path,
            change,
            marks=() if path == "rows" else pytest.mark.slow,
        )
        for path in ("rows", "small rows", "compiled rows", "compiled")
        for change in WAYS
    ],
)
def test_whatever_somebody_puts_into_a_block_counts(model, path, change, monkeypatch):
    """Whichever way blocks run, the result is that of the forwards, as in a training run."""
    monkeypatch.setattr(cpu_rows, "SMALL", SMALL if path == "small rows" else 0)
    run = as_on_a_gpu if path == "compiled" else in_rows
    inputs = given("one")
    plain = run(model, *inputs)
    for stage, index in (("layers", -1), ("context_refiner", 0)):
        for part in PARTS:
            if change is parametrization and part in ("attention", "feed_forward", "adaLN_modulation"):
                continue  # they have no weight of their own
            if stage == "context_refiner" and (part.startswith("adaLN") or path == "compiled rows"):
                continue
            changed = copy.deepcopy(model)
            block = getattr(changed, stage)[index]
            path_to, _, name = part.rpartition(".")
            parent = block.get_submodule(path_to)
            change(parent, name, getattr(parent, name))
            changed.compiled = "compiled" in path
            ours = run(changed, *inputs)
            reference = as_module(changed, *inputs)
            torch.nn.modules.module._global_forward_hooks.clear()
            assert relative(ours, reference) <= 1e-6, (stage, index, part)
            assert relative(ours, plain) > 1e-5, (stage, index, part)


def test_blocks_that_nobody_changed_run_in_rows(model, calls):
    changed = copy.deepcopy(model)
    changed.layers[1].attention.q_norm.register_forward_hook(lambda module, given, output: 2 * output)
    in_rows(changed, *given("one"))
    assert len(calls) == 6
    calls.clear()
    packed = copy.deepcopy(model)
    packed.layers[1].feed_forward.w1.__class__ = type("Packed", (torch.nn.Linear,), {})
    monkeypatched = {*block_module.LINEAR_KINDS, type(packed.layers[1].feed_forward.w1)}
    with pytest.MonkeyPatch.context() as patched:  # as `packed` tells its own
        patched.setattr(block_module, "LINEAR_KINDS", monkeypatched)
        in_rows(packed, *given("one"))
    assert len(calls) == 7


def test_a_forward_that_is_put_back_is_the_own_one(model, calls):
    changed = copy.deepcopy(model)
    norm = changed.layers[1].attention.q_norm
    for forward, rows in ((norm.forward, 7), (model.layers[0].attention.q_norm.forward, 6)):
        norm.forward = forward
        in_rows(changed, *given("one"))
        assert len(calls) == rows
        calls.clear()


def test_each_norm_has_its_own_eps(model):
    changed = copy.deepcopy(model)
    for name in ("attention_norm2", "ffn_norm1", "ffn_norm2"):
        getattr(changed.layers[0], name).eps = 10.0
    ours = in_rows(changed, *given("one"))
    assert relative(ours, as_module(changed, *given("one"))) <= 1e-6
    assert relative(ours, in_rows(model, *given("one"))) > 1e-3


def test_a_default_device_does_not_matter(model):
    """What is kept between calls is made where the weights are, whoever calls first."""
    cpu_rows._constant.cache_clear()
    latents, t, cap_feats = given("one")
    with torch.device("meta"):
        cpu_rows._constant(model.config.norm_eps)
    assert in_rows(model, latents, t, cap_feats).isfinite().all()
