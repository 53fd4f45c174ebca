"""float16 against float32, where activations fit it and where they don't."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from zimage_core.backends import half
from zimage_core.model import numerics, transformer
from zimage_core.model.transformer import Block, ZImageTransformer
from zimage_core.weights.snapshot import open_component

from . import test_blocks
from .test_blocks import relative
from .test_pipeline import NANO

model = test_blocks.model  # a fixture

CAPTIONS = {"one": [20], "batch": [20, 20], "mixed lengths": [5, 40]}
Change = Callable[[Block], None]


def given(case: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Small: many CPUs multiply float16 slowly."""
    generator = torch.Generator().manual_seed(1)
    count, width = len(CAPTIONS[case]), test_blocks.WIDTHS["cap_feat_dim"]
    latents = torch.randn(count, 16, 8, 8, generator=generator)
    t = torch.rand(count, generator=generator)
    return latents, t, [torch.randn(length, width, generator=generator) for length in CAPTIONS[case]]


def scaled(path: str, factor: float, first_row: int = 0) -> Change:
    def change(block: Block) -> None:
        block.get_parameter(path).data[first_row:] *= factor

    return change


def both(*changes: Change) -> Change:
    def change(block: Block) -> None:
        for each in changes:
            each(block)

    return change


# what is made larger in every block, refiners of captions included, and the least peak that float32 then has
INFLATED = {
    "gate": (scaled("feed_forward.w1.weight", 2e4), 1e5),
    "up": (scaled("feed_forward.w3.weight", 2e4), 1e5),
    "product": (both(scaled("feed_forward.w1.weight", 100), scaled("feed_forward.w3.weight", 100)), 1e5),
    "down": (scaled("feed_forward.w2.weight", 1e4), 1e5),
    "values": (scaled("attention.qkv.weight", 2e4, first_row=2 * 96), 1e5),
    "attention's output": (scaled("attention.out.weight", 4e4), 1e5),
}


def inflated(model: ZImageTransformer, change: Change) -> ZImageTransformer:
    changed = copy.deepcopy(model).requires_grad_(False)
    for block in changed.modules():
        if isinstance(block, Block):
            change(block)
    return changed


def evaluated(exact: ZImageTransformer, case: str = "one", **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of the same weights in float32, and in float16 with the settings as attributes."""
    short = copy.deepcopy(exact).half()
    exact = copy.deepcopy(short).float()
    for name, value in settings.items():
        setattr(short, name, value)
    with torch.inference_mode():
        latents, t, cap_feats = given(case)
        return exact(latents, t, cap_feats), short(latents.half(), t, [feats.half() for feats in cap_feats]).float()


def peak(model: ZImageTransformer) -> float:
    """The largest number that goes into or comes out of a matmul."""
    found = [0.0]

    def look(_layer, arguments, result):
        found.append(max(arguments[0].abs().max().item(), result.abs().max().item()))

    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    with torch.no_grad():
        model(*given("one"))
    for hook in hooks:
        hook.remove()
    return max(found)


COMPILED = pytest.param({"compiled": True}, marks=pytest.mark.slow)


def saturating(monkeypatch) -> None:
    """Blocks run as they do when somebody has changed them: what float16 can't hold is cut off."""
    monkeypatch.setattr(transformer, "is_as_built", lambda _block: False)


@pytest.mark.parametrize("name", INFLATED)
@pytest.mark.parametrize(
    "settings", [{}, {"sums_fit_half": True}, COMPILED], ids=["float32 sums", "float16 sums", "compiled"]
)
def test_overflow_changes_nothing(model, name, settings):
    change, least = INFLATED[name]
    exact = inflated(model, change)
    assert peak(exact) >= least
    reference, ours = evaluated(exact, **settings)
    assert ours.isfinite().all() and relative(ours, reference) <= 2e-3


@pytest.mark.parametrize("name", INFLATED)
def test_cutting_off_does(model, name, monkeypatch):
    """So the weights above are a test."""
    exact = inflated(model, INFLATED[name][0])
    saturating(monkeypatch)
    assert relative(*reversed(evaluated(exact))) > 0.05


@pytest.mark.parametrize("settings", [{}, {"sums_fit_half": True}, COMPILED], ids=str)
@pytest.mark.parametrize("case", ["one", "batch", "mixed lengths"])
def test_where_nothing_overflows_it_is_no_further_from_float32(model, monkeypatch, case, settings):
    exact = copy.deepcopy(model).requires_grad_(False)
    reference, ours = evaluated(exact, case, **settings)
    saturating(monkeypatch)
    _, before = evaluated(exact, case, sums_fit_half=True)
    assert relative(ours, reference) <= 1.05 * relative(before, reference)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sum_beyond_float16_is_carried_in_float32(model, compiled):
    """Gains that make what a block adds larger than float16 holds; a probe of the weights tells."""
    exact = copy.deepcopy(model).requires_grad_(False)
    assert numerics.largest_sum(exact.get_parameter, exact.config) < numerics.SUM_FITS
    for block in exact.layers:
        block.ffn_norm2.weight *= 2e4
    assert numerics.largest_sum(exact.get_parameter, exact.config) > numerics.SUM_FITS
    reference, ours = evaluated(exact, compiled=compiled)
    assert relative(ours, reference) <= 5e-3
    assert not evaluated(exact, sums_fit_half=True)[1].isfinite().all()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_float32_tokens_of_float16_are_not_taken_for_float32(model, monkeypatch, compiled):
    """On a CPU those run in rows, large ones compiled as well."""
    monkeypatch.setattr(test_blocks.cpu_rows, "SMALL", 1)
    exact = copy.deepcopy(model).requires_grad_(False)
    assert relative(*reversed(evaluated(exact, compiled=compiled))) <= 3e-3


def test_no_token_exceeds_the_bound(model):
    exact, found = copy.deepcopy(model).requires_grad_(False), [0.0]

    def look(_block, _arguments, result):
        found.append(result.abs().max().item())

    for block in exact.modules():
        if isinstance(block, Block):
            block.register_forward_hook(look)
    with torch.no_grad():
        for case in ("one", "mixed lengths"):
            exact(*given(case))
    bound = numerics.largest_sum(exact.get_parameter, exact.config)
    assert 0.02 * bound < max(found) <= bound


def test_loading_in_float16_probes_the_weights(monkeypatch):
    component = open_component(NANO, "transformer")
    assert component.build(dtype=torch.float16).sums_fit_half
    monkeypatch.setattr(numerics, "SUM_FITS", 10.0)
    assert not component.build(dtype=torch.float16).sums_fit_half


def test_a_gate_is_silu_wherever_float16_has_numbers():
    a = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16)
    a = a[a.isfinite()]
    ours = half.gated(a * half.SHRINK, torch.full_like(a, half.SHRINK))
    exact = torch.nn.functional.silu(a.double()) * half.SHRINK**2
    spacing = (exact.abs() * 2**-10).clamp(min=2.0**-24)  # at most what two float16 numbers differ by
    assert ((ours.double() - exact).abs() <= spacing).all()
    assert half.gated(a, a).isfinite().float().mean() > 0.5


def test_a_changed_block_takes_part_in_float16(model):
    """As others know it: tokens in one dtype, whatever they are carried in."""
    exact, seen = copy.deepcopy(model).requires_grad_(False), []

    class Halved(torch.nn.Module):
        def forward(self, x, *_):
            seen.append(x.dtype)
            return x * 0.5

    exact.layers[1] = Halved()
    reference, ours = evaluated(exact)
    assert seen == [torch.float32, torch.float16] and relative(ours, reference) <= 4e-3
