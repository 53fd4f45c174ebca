"""The other ways to run a block, in rows on a CPU and with compiled parts, against the block itself."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
import torch._inductor.config

from zimage_core.backends import compiled as parts
from zimage_core.backends import cpu_rows
from zimage_core.backends.operations import Modulation, Tokens, read_gain
from zimage_core.config import TransformerConfig
from zimage_core.model import transformer
from zimage_core.model.attention import attention
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.weights.specs import PUBLISHED_TRANSFORMER

WIDTHS = {"dim": 96, "n_heads": 3, "axes_dims": (8, 12, 12), "cap_feat_dim": 40, "n_layers": 3, "n_refiner_layers": 2}
# (caption lengths, latent height, latent width): 576 image tokens are several blocks of rows
CASES = {
    "one": ([40], 12, 20),
    "several row blocks": ([70], 48, 48),
    "batch": ([33, 33], 16, 16),
    "mixed lengths": ([5, 40, 96], 10, 14),
}


@pytest.fixture(scope="module")
def model() -> ZImageTransformer:
    config = TransformerConfig(**{**PUBLISHED_TRANSFORMER, **WIDTHS, "in_channels": 16, "patch_size": 2})
    model = ZImageTransformer(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = noise * scale + (1 if parameter.ndim == 1 else 0)
    return model.eval()


def given(case: str, dtype: torch.dtype = torch.float32):
    lengths, height, width = CASES[case]
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(lengths), 16, height, width, generator=generator)
    t = torch.rand(len(lengths), generator=generator)
    cap_feats = [torch.randn(length, WIDTHS["cap_feat_dim"], generator=generator) for length in lengths]
    return latents.to(dtype), t, [feats.to(dtype) for feats in cap_feats]


def as_module(model, *arguments, **settings) -> torch.Tensor:
    with torch.enable_grad():
        return model(*arguments, **settings).detach()


def in_rows(model, *arguments, **settings) -> torch.Tensor:
    with torch.inference_mode():
        return model(*arguments, **settings)


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).double().norm() / reference.double().norm()).item()


SMALL = cpu_rows.SMALL  # everything here is smaller, and whole batches run


@pytest.fixture(autouse=True)
def _small_ones_run_in_rows_too(monkeypatch):
    monkeypatch.setattr(cpu_rows, "SMALL", 0)


@pytest.fixture
def calls(monkeypatch) -> list[int | None]:
    """`queries` of each block that ran in rows."""
    found: list[int | None] = []
    by_item = cpu_rows.RowOperations.by_item

    def counted(self, run, x, tokens, modulation):
        found.append(tokens.queries)
        return by_item(self, run, x, tokens, modulation)

    monkeypatch.setattr(cpu_rows.RowOperations, "by_item", counted)
    return found


@pytest.mark.parametrize("small", [0, SMALL])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_block_in_float32(model, case, small, calls, monkeypatch):
    monkeypatch.setattr(cpu_rows, "SMALL", small)
    latents, t, cap_feats = given(case)
    before = latents.clone(), [feats.clone() for feats in cap_feats]
    reference = as_module(model, latents, t, cap_feats)
    assert calls == []
    assert relative(in_rows(model, latents, t, cap_feats), reference) <= 1e-6
    tokens = latents.shape[2] * latents.shape[3] // 4
    assert calls == [None] * 6 + [tokens]  # refiners and layers; the last one for the image's tokens
    assert torch.equal(latents, before[0]) and all(map(torch.equal, cap_feats, before[1]))


@pytest.mark.slow
def test_bfloat16_is_no_further_from_float32_than_the_block(monkeypatch):
    """Distances are summed over models and cases: a single one is luck."""
    ours, theirs = dict.fromkeys((0, SMALL), 0.0), 0.0
    config = TransformerConfig(**{**PUBLISHED_TRANSFORMER, **WIDTHS, "in_channels": 16, "patch_size": 2})
    for seed in range(2):
        torch.manual_seed(seed)
        exact = ZImageTransformer(config).eval()
        rounded = copy.deepcopy(exact).bfloat16()
        exact.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
        for case in CASES:
            latents, t, cap_feats = given(case, torch.bfloat16)
            reference = as_module(exact, latents.float(), t, [feats.float() for feats in cap_feats])
            for small in ours:
                monkeypatch.setattr(cpu_rows, "SMALL", small)
                ours[small] += relative(in_rows(rounded, latents, t, cap_feats).float(), reference)
            theirs += relative(as_module(rounded, latents, t, cap_feats).float(), reference)
    assert all(0 < distance <= theirs for distance in ours.values())


@pytest.mark.parametrize("case", CASES)
def test_captions_refined_once_serve_every_step_and_size(model, case):
    latents, t, cap_feats = given(case)
    with torch.inference_mode():
        captions = model.refine_captions(cap_feats, torch.float32)
        for _ in range(2):  # nothing of them may be overwritten by a step
            for x in (latents, latents[..., :8, :10]):
                assert torch.equal(model(x, t, captions), model(x, t, cap_feats))
            stretched = {"scale_x": 0.5}
            assert torch.equal(
                model(latents, t, captions, rope_options=stretched),
                model(latents, t, cap_feats, rope_options=stretched),
            )
    assert len(captions.image_rotations) == 3


@pytest.mark.parametrize("case", CASES)
def test_large_images_with_captions_of_different_lengths_run_one_by_one(model, monkeypatch, case):
    latents, t, cap_feats = given(case)
    with torch.inference_mode():
        captions = model.refine_captions(cap_feats, torch.float32)
        expected = model(latents, t, captions)
    masks = []

    def noted(q, k, v, mask=None):
        masks.append((len(q), mask))
        return attention(q, k, v, mask)

    monkeypatch.setattr(transformer, "APART", latents.shape[2] * latents.shape[3] // 4)
    monkeypatch.setattr(cpu_rows, "suits", lambda *_: False)
    with torch.inference_mode():
        for _ in range(2):  # rotations are kept from step to step, here as well
            assert relative(model(latents, t, captions, attention=noted), expected) <= 1e-6
    batch = 1 if case == "mixed lengths" else len(latents)
    assert masks and all(call == (batch, None) for call in masks)
    assert [len(item.image_rotations) for item in captions.items] == ([1] * 3 if case == "mixed lengths" else [])
    masks.clear()
    monkeypatch.setattr(transformer, "APART", latents.shape[2] * latents.shape[3] // 4 + 1)
    with torch.inference_mode():
        assert relative(model(latents, t, captions, attention=noted), expected) <= 1e-6
    assert any(mask is not None for _, mask in masks) == (case == "mixed lengths")


@pytest.mark.parametrize("case", ["one", "batch"])
def test_hook_sees_and_changes_the_tokens(model, case):
    """What a hook writes into img and txt counts, and img_input is what entered the stage."""
    latents, t, cap_feats = given(case)
    seen: dict[str, list] = {}

    def hook_of(kind):
        def hook(stage, index, state):
            state["img"][:, 0] += index + 1
            if stage == "layers":
                state["txt"][:, 1] -= 1
            seen.setdefault(kind, []).append((stage, index, state["img_input"].clone(), state["txt"].clone()))

        return hook

    with torch.no_grad():
        latents, t = latents.clone(), t.clone()
    reference = _hooked_module(model, latents, t, cap_feats, hook_of("module"))
    assert relative(in_rows(model, latents, t, cap_feats, patch_tokens=hook_of("rows")), reference) <= 1e-6
    assert relative(as_module(model, latents, t, cap_feats), reference) > 1e-3
    for ours, theirs in zip(seen["rows"], seen["module"], strict=True):
        assert ours[:2] == theirs[:2]
        assert relative(ours[2], theirs[2]) <= 1e-6 and relative(ours[3], theirs[3]) <= 1e-6


def _hooked_module(model, latents, t, cap_feats, hook):
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(cpu_rows, "suits", lambda *_: False)
        return model(latents, t, cap_feats, patch_tokens=hook)


def test_hook_that_reads_nothing_spares_the_last_captions(model, calls):
    latents, t, cap_feats = given("one")

    stages: list[str] = []
    told = in_rows(model, latents, t, cap_feats, after_block=lambda stage, _index: stages.append(stage))
    assert torch.equal(told, in_rows(model, latents, t, cap_feats))
    assert stages == ["noise_refiner"] * 2 + ["layers"] * 3
    assert calls[6] == 60 and calls[13] == 60
    calls.clear()
    in_rows(model, latents, t, cap_feats, patch_tokens=lambda *_: None)
    assert calls == [None] * 7


@pytest.mark.parametrize("way", ["forward", "hook", "module"])
def test_a_block_that_somebody_replaced_is_called(model, monkeypatch, way, calls):
    """Nodes that skip, patch or compile single blocks put something in their place."""
    latents, t, cap_feats = given("one")
    plain = in_rows(model, latents, t, cap_feats)
    changed = copy.deepcopy(model)
    block = changed.layers[1]
    if way == "forward":
        block.forward = lambda x, *_: x
    elif way == "hook":
        block.register_forward_hook(lambda module, inputs, output: inputs[0])
    else:

        class Skip(torch.nn.Module):
            def forward(self, x, *_):
                return x

        changed.layers[1] = Skip()
    calls.clear()
    skipped = in_rows(changed, latents, t, cap_feats)
    assert len(calls) == 6 and relative(skipped, plain) > 1e-3
    expected = copy.deepcopy(model)
    del expected.layers[1]
    expected.config = dataclasses.replace(model.config, n_layers=2)
    assert relative(skipped, in_rows(expected, latents, t, cap_feats)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_as_modules(model, dtype, calls):
    latents, t, cap_feats = given("one", dtype)
    same = copy.deepcopy(model).to(dtype)
    assert torch.equal(in_rows(same, latents, t, cap_feats), as_module(same, latents, t, cap_feats))
    assert calls == []


# Compiled


@pytest.fixture
def compiled(model: ZImageTransformer, monkeypatch) -> ZImageTransformer:
    monkeypatch.setattr(model, "compiled", True)
    return model


def as_on_a_gpu(model, *arguments) -> torch.Tensor:
    """Whole batches through `CompiledOperations`, as where row blocks don't suit."""
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setattr(cpu_rows, "suits", lambda *_: False)
        return model(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [in_rows, as_on_a_gpu])
def test_compiled_equals_the_block_in_float32(compiled, monkeypatch, case, way):
    latents, t, cap_feats = given(case)
    ours = way(compiled, latents, t, cap_feats)
    monkeypatch.setattr(compiled, "compiled", False)
    assert relative(ours, as_module(compiled, latents, t, cap_feats)) <= 1e-6


@pytest.mark.slow
def test_small_ones_are_compiled_as_a_whole(compiled, monkeypatch, calls):
    monkeypatch.setattr(cpu_rows, "SMALL", SMALL)
    latents, t, cap_feats = given("batch")
    ours = in_rows(compiled, latents, t, cap_feats)
    monkeypatch.setattr(compiled, "compiled", False)
    assert calls == [] and relative(ours, as_module(compiled, latents, t, cap_feats)) <= 1e-6


@pytest.mark.slow
def test_one_compilation_serves_all_layers_sizes_and_prompts(compiled):
    for case in ("one", "mixed lengths"):  # items alone and in a batch: whatever has to be compiled
        in_rows(compiled, *given(case))
    before = _graphs()
    for case in ("one", "several row blocks", "mixed lengths"):
        in_rows(compiled, *given(case))
    assert before > 0 and _graphs() == before


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_no_compiler_is_a_warning_not_an_error(caplog):
    def double(x):
        return x.sin() * 2

    function = parts.Compiled(double)
    x = torch.randn(5, 7)
    without = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True})
    with without, caplog.at_level(logging.WARNING):
        assert torch.equal(function(x), double(x))
        assert torch.equal(function(x), double(x))
    # other tests may have made torch's own loggers speak
    (record,) = (record for record in caplog.records if record.name == parts.logger.name)
    assert "torch.compile does not work here, so double runs without" in record.getMessage()


@pytest.mark.parametrize("small", [0, SMALL])
def test_a_batch_of_small_images_goes_whole(model, small, monkeypatch):
    """Item by item it took 1.6 times as long: there as many calls as the arithmetic take time."""
    monkeypatch.setattr(cpu_rows, "SMALL", small)
    batches = []

    def noted(q, k, v, mask=None):
        batches.append((len(q), mask is not None))
        return attention(q, k, v, mask)

    in_rows(model, *given("mixed lengths"), attention=noted)
    assert set(batches) == ({(3, True), (3, False)} if small else {(1, False)})


@pytest.mark.parametrize(
    ("tokens", "width", "parts"), [(96, 192, 1), (288, 3840, 2)], ids=["nano", "the published width at 256x256"]
)
def test_published_widths_go_item_by_item(tokens, width, parts, monkeypatch):
    monkeypatch.setattr(cpu_rows, "SMALL", SMALL)
    x, run = torch.empty(2, tokens, width, device="meta"), []
    known = Tokens(torch.empty(1, tokens, 1, 1, 2, 2, device="meta"), None, [tokens])
    operations = cpu_rows.RowOperations(read_gain, compiled=False)
    operations.by_item(lambda item, *_: run.append(len(item)) or item, x, known, Modulation(*4 * [x[:, :1]]))
    assert run == parts * [2 // parts]
