"""One block over any tokens: its time for each token, masks of any shape, by every bundle of operations."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from zimage_core.backends import cpu_rows
from zimage_core.backends.compiled import CompiledOperations
from zimage_core.backends.half import HalfOperations
from zimage_core.backends.operations import PLAIN, LeanOperations, Tokens, read_gain
from zimage_core.model.attention import attention
from zimage_core.model.rope import rotations

from . import test_blocks
from .helpers import relative

model = test_blocks.model  # a fixture

COUNT, QUERIES = 50, 37
BUNDLES = {
    "lean": lambda: LeanOperations(read_gain),
    "rows": lambda: cpu_rows.RowOperations(read_gain, compiled=False),
    "half": lambda: HalfOperations(read_gain),
    "compiled": lambda: CompiledOperations(read_gain),
}


@pytest.fixture(autouse=True)
def _small_ones_run_item_by_item_too(monkeypatch):
    monkeypatch.setattr(cpu_rows, "SMALL", 0)
    monkeypatch.setattr(cpu_rows, "CACHED", 7 * test_blocks.WIDTHS["dim"])  # several pieces


def given(model, batch: int, time: str, mask: str | None, queries: int | None) -> tuple[torch.Tensor, Tokens]:
    generator = torch.Generator().manual_seed(0)
    config = model.config

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    places = (30 * torch.rand(1, COUNT, 3, generator=generator)).round()
    embedded = drawn(batch, config.adaln_dim) if time == "item" else drawn(batch, COUNT, config.adaln_dim)
    masks = {
        None: None,
        "keys": torch.rand(batch, 1, 1, COUNT, generator=generator) < 0.7,
        "pairs": torch.rand(batch, 1, COUNT, COUNT, generator=generator) < 0.7,
        "heads": torch.rand(1, config.n_heads, COUNT, COUNT, generator=generator) < 0.7,
    }
    turns = rotations(places, config.axes_dims, config.rope_theta)
    tokens = Tokens(turns, embedded, [COUNT], mask=masks[mask], queries=queries)
    return drawn(batch, COUNT, config.dim), tokens


def run(block, x: torch.Tensor, tokens: Tokens, operations) -> torch.Tensor:
    with torch.inference_mode():
        return block(x.clone(), tokens, attention, operations)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "compiled")) for name in BUNDLES]
)
@pytest.mark.parametrize(
    ("batch", "time", "mask", "queries"),
    [(1, "token", None, None), (2, "token", "pairs", QUERIES), (2, "item", "heads", QUERIES), (1, "item", "keys", 50)],
)
def test_every_bundle_agrees_with_the_plain_one(model, name, batch, time, mask, queries):
    if name == "compiled" and (batch, time) != (2, "token"):
        pytest.skip("compiling takes long")
    block, (x, tokens) = model.layers[0], given(model, batch, time, mask, queries)
    if name == "half":
        block = copy.deepcopy(block).half()
        exact = copy.deepcopy(block).float()
        tokens_half = dataclasses.replace(tokens, time=tokens.time.half())
        found = run(block, x, tokens_half, BUNDLES[name]())
        expected = run(exact, x, dataclasses.replace(tokens, time=tokens_half.time.float()), PLAIN)
        assert found.dtype == torch.float32 and relative(found, expected) <= 3e-3
        return
    expected = run(block, x, tokens, PLAIN)
    assert expected.shape == (batch, queries or COUNT, model.config.dim)
    assert relative(run(block, x, tokens, BUNDLES[name]()), expected) <= 1e-6


@pytest.mark.parametrize("name", [None, "rows"])
def test_a_time_for_each_token_is_its_own(model, name):
    """Tokens whose times are equal come out as with one time for all; others don't."""
    block, (x, tokens) = model.layers[0], given(model, 1, "item", None, None)
    operations = PLAIN if name is None else BUNDLES[name]()
    whole = run(block, x, tokens, operations)
    by_token = tokens.time.unsqueeze(1).repeat(1, COUNT, 1)
    same = run(block, x, dataclasses.replace(tokens, time=by_token), operations)
    assert relative(same, whole) <= 1e-6
    by_token[:, 20:] = 0
    found = run(block, x, dataclasses.replace(tokens, time=by_token), operations)
    assert relative(found[:, 20:], whole[:, 20:]) > 0.01


@pytest.mark.parametrize("name", [None, "rows"])
def test_what_a_mask_hides_has_no_effect(model, name):
    block, (x, tokens) = model.layers[0], given(model, 1, "item", None, QUERIES)
    operations = PLAIN if name is None else BUNDLES[name]()
    mask = torch.ones(1, 1, COUNT, COUNT, dtype=torch.bool)
    mask[..., :10, 40:] = False  # the first ten don't see the last ten
    tokens = dataclasses.replace(tokens, mask=mask)
    before = run(block, x, tokens, operations)
    x[:, 40:] += 1
    after = run(block, x, tokens, operations)
    assert torch.equal(before[:, :10], after[:, :10]) and not torch.equal(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("mask", [None, "pairs", "heads"])
def test_what_pads_a_batch_is_hidden_beside_any_mask(model, mask):
    """Item by item there is no padding, and the mask is the item's own."""
    block, (x, tokens) = model.layers[0], given(model, 2, "token", mask, None)
    counts = [COUNT, 30]
    own = torch.stack([torch.arange(COUNT) < count for count in counts])[:, None, None]
    tokens = dataclasses.replace(tokens, counts=counts, own=own)
    rows, plain = (run(block, x, tokens, operations) for operations in (BUNDLES["rows"](), PLAIN))
    for item, count in enumerate(counts):
        assert relative(rows[item, :count], plain[item, :count]) <= 1e-6
    x[1, 30:] += 1
    again = run(block, x, tokens, PLAIN)
    assert torch.equal(again[1, :30], plain[1, :30]) and torch.equal(again[0], plain[0])
