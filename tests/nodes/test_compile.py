"""torch.compile around the whole model or each block, as other nodes put it there: one graph, and few compilations."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounter

SIZES = {"dim": 256, "n_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 48, "in_channels": 16}
# latent height and width, caption length; the first changes one at a time, and some pad neither image nor caption
SHAPES = [(12, 20, 40), (12, 28, 40), (28, 12, 70), (32, 36, 96), (20, 30, 33), (14, 14, 150)]
# what ComfyUI's own Z-Image takes for them, counted in the same way: of the whole model first the sizes as they are,
# then each that varies; of blocks also with and without modulation
NATIVE = {"whole": 3, "blocks": 4}


def attention(_replaced, q, k, v, _heads, mask=None, **_):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.fixture
def model(pack):
    def core(module: str):
        return importlib.import_module(f"zimage_pack.zimage_core.{module}")

    config = core("config").TransformerConfig(
        **{**core("weights.specs").PUBLISHED_TRANSFORMER, "patch_size": 2, **SIZES}
    )
    operations = importlib.import_module("comfy.ops").disable_weight_init
    with torch.inference_mode(False), torch.no_grad():
        model = pack.bridge.model.ZImageNextDiT(config, operations=operations, device="cpu", dtype=torch.float32)
        for parameter in model.requires_grad_(False).parameters():
            parameter.normal_(0, 0.1)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield model.eval()
        torch._dynamo.reset()


def compiled(module, backend, fullgraph: bool = False):
    """As TorchCompileModel does it."""
    unguarded = {"guard_filter_fn": lambda entries: ["transformer_options" not in entry.name for entry in entries]}
    return torch.compile(module, backend=backend, options=unguarded, fullgraph=fullgraph)


def call(model, height: int, width: int, tokens: int, batch: int = 1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 16, height, width, generator=generator)
    captions = torch.randn(batch, tokens, SIZES["cap_feat_dim"], generator=generator)
    options = {"optimized_attention_override": attention}
    return model(x, torch.full((batch,), 0.5), captions, num_tokens=tokens, transformer_options=options)


@pytest.mark.parametrize("part", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_new_sizes_and_prompts_are_compiled_no_more_often_than_natively(model, part):
    counter = CompileCounter()
    expected = [call(model, *shape) for shape in SHAPES]
    if part == "whole":
        run = compiled(model, counter, fullgraph=True)
    else:
        run = model
        for blocks in (model.noise_refiner, model.context_refiner, model.layers):
            for index, block in enumerate(blocks):
                blocks[index] = compiled(block, counter, fullgraph=True)
    for shape, reference in zip(SHAPES, expected, strict=True):
        assert torch.allclose(call(run, *shape), reference, atol=1e-4)
    assert counter.frame_count <= NATIVE[part]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_batches_and_the_cores_own_model_are_one_graph_as_well(model):
    """The first call takes sizes as they are, the second leaves open what has changed, and that is the last one."""
    counter = CompileCounter()
    run = torch.compile(super(type(model), model).forward, backend=counter, fullgraph=True)
    for batch, (height, width, tokens) in zip((2, 3, 4, 5), SHAPES[:1] + SHAPES[2:], strict=False):
        latents, captions = torch.randn(batch, 16, height, width), torch.randn(batch, tokens, SIZES["cap_feat_dim"])
        out = run(latents, torch.full((batch,), 0.5), captions)
        with torch.no_grad():
            reference = super(type(model), model).forward(latents, torch.full((batch,), 0.5), captions)
        assert torch.allclose(out, reference, atol=1e-4)
    assert counter.frame_count <= 2
