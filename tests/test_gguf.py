"""GGUF files: every type bit for bit as ggml's own package reads it, weights packed in memory, LoRA on top."""

from __future__ import annotations

import builtins
import math

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zimage_core.errors import CheckpointError
from zimage_core.weights import gguf_dequant

from .helpers import NANO
from .traffic import Traffic

CONFIGS = {kind: (NANO / kind / "config.json").read_text() for kind in ("transformer", "text_encoder")}
STRINGS = {f"zimage.{kind}.config": config for kind, config in CONFIGS.items()}
PROMPT = "two red stars on a blue background"
LLAMA_CPP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


# Types


def kinds() -> list[str]:
    return [name for name in gguf_dequant.TYPES if name not in gguf_dequant.PLAIN]


@pytest.mark.parametrize("name", kinds())
def test_types_expand_bit_for_bit_as_the_package_does(name):
    kind = getattr(gguf.GGMLQuantizationType, name)
    entry = gguf_dequant.TYPES[name]
    assert (entry.number, entry.values, entry.bytes) == (kind.value, *gguf.GGML_QUANT_SIZES[kind])
    raw = np.random.default_rng(0).integers(0, 256, (64, entry.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
        found = gguf_dequant.expand(name, torch.from_numpy(raw), (64, entry.values)).numpy()
    assert np.isfinite(expected).mean() > 0.5
    assert np.array_equal(found, expected, equal_nan=True)


def test_all_types_of_the_package_are_known():
    readable = {kind.name for kind in gguf.quants._type_traits}
    assert readable - gguf_dequant.TYPES.keys() - {"Q1_0"} == set()


def test_rare_types_ask_for_the_package(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    raw = torch.zeros(66, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="IQ2_XXS need the gguf package: pip install gguf"):
        gguf_dequant.expand("IQ2_XXS", raw, (1, 256))
    assert gguf_dequant.expand("Q8_0", torch.zeros(34, dtype=torch.uint8), (1, 32)).shape == (1, 32)


# What they cost. Bytes per weight with nothing in between: 3.1 of Q8_0 in bf16, 2.6 of Q4_K, 2.8 of Q6_K


def written() -> list[str]:
    """The types that are expanded here, not by the package."""
    return [name for name, kind in gguf_dequant.TYPES.items() if kind.expand is not None]


def random_blocks(name: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count * gguf_dequant.TYPES[name].bytes,), generator=generator, dtype=torch.uint8)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and np.array_equal(one.float().numpy(), other.float().numpy(), equal_nan=True)


@pytest.mark.parametrize("name", written())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_way_of_expanding_gives_the_same_bits(name, dtype):
    """At once in another dtype, as a part of what somebody else compiles, and from bytes at an odd place."""
    shape, raw = (8, gguf_dequant.TYPES[name].values), random_blocks(name, 8)
    expected = gguf_dequant.expand(name, raw, shape).to(dtype)
    assert same(gguf_dequant.expand(name, raw, shape, dtype), expected)
    if dtype == torch.bfloat16 and name in ("Q8_0", "Q5_0", "Q4_K", "Q6_K", "IQ4_XS"):
        torch._dynamo.reset()
        traced = torch.compile(gguf_dequant.expand, backend="eager", fullgraph=True, dynamic=False)
        assert same(traced(name, raw, shape, dtype), expected)
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), raw])[1:]
    assert same(gguf_dequant.expand(name, odd, shape, dtype), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name, most", [("Q8_0", 6), ("Q4_K", 8), ("Q6_K", 8)])
def test_compiled_is_one_pass_for_all_sizes_and_the_same_bits(name, most):
    kind = gguf_dequant.TYPES[name]
    compiled = gguf_dequant.Compiled(kind.expand)
    torch._logging.set_logs(inductor_metrics=True)  # else inductor doesn't count
    torch._inductor.metrics.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            for count in (64, 96):
                blocks = random_blocks(name, count).reshape(count, -1)
                assert same(compiled(blocks, torch.bfloat16), kind.expand(blocks, torch.bfloat16))
    finally:
        torch._logging.set_logs()
    assert compiled.works and torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 1
    assert 0 < torch._inductor.metrics.num_bytes_accessed / (64 * kind.values) <= most


@pytest.mark.parametrize("name, most", [("Q8_0", 3.4), ("Q4_K", 8.8), ("Q6_K", 17.5), ("Q4_0", 10), ("Q5_K", 16)])
def test_uncompiled_moves_little_and_waits_for_nothing(name, most):
    shape = (256, 3840)
    with FakeTensorMode():
        raw = torch.empty(gguf_dequant.size(name, shape), dtype=torch.uint8, device="cuda")
        with Traffic() as seen:
            weight = gguf_dequant.expand(name, raw, shape, torch.bfloat16)
    assert seen.bytes / weight.numel() <= most and seen.peak / weight.numel() <= 3.5
    assert seen.copies == seen.waits == [] and weight.device.type == "cuda"
    assert gguf_dequant.Compiled.works  # which was not tried on a tensor that is none


def test_tables_stay_on_their_device():
    gguf_dequant.expand("IQ4_NL", random_blocks("IQ4_NL", 2), (2, 32))
    table = gguf_dequant._tables[torch.device("cpu")]
    with FakeTensorMode():
        raw = torch.empty(gguf_dequant.size("IQ4_XS", (2, 256)), dtype=torch.uint8, device="cuda")
        gguf_dequant.expand("IQ4_XS", raw, (2, 256))
    gguf_dequant.expand("IQ4_XS", random_blocks("IQ4_XS", 2), (2, 256))
    assert list(gguf_dequant._tables.values()) == [table] and type(table) is Tensor


def test_where_nothing_can_be_compiled_it_is_said_once(monkeypatch, caplog):
    def program(blocks: Tensor, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("no compiler here")
        return blocks.to(dtype)

    monkeypatch.setattr(gguf_dequant.Compiled, "works", True)
    blocks = torch.arange(64, dtype=torch.uint8).reshape(2, 32)
    for _ in range(2):
        assert same(gguf_dequant.Compiled(program)(blocks, torch.float32), blocks.float())
        assert not gguf_dequant.Compiled.works
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"][:1]
    assert message.startswith("torch.compile does not work here, so GGUF weights are expanded without: ")


def test_parts_of_one_type_are_expanded_together():
    parts = [("Q8_0", (3, 64)), ("Q8_0", (2, 64)), ("Q4_0", (4, 64))]
    raws = [random_blocks(name, math.prod(shape) // 32) for name, shape in parts]
    expected = [gguf_dequant.expand(name, raw, shape) for (name, shape), raw in zip(parts, raws, strict=True)]
    with Traffic() as seen:
        found = gguf_dequant.expand_stacked(parts, torch.cat(raws), torch.float32)
    assert torch.equal(found, torch.cat(expected))
    with Traffic() as again:
        gguf_dequant.expand_stacked(parts[:2], torch.cat(raws[:2]), torch.float32)
    assert again.launches < seen.launches
