"""Features are kept in what the transformer computes in, so that a cached prompt gives the same image."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zimage_core.config import TransformerConfig
from zimage_core.model.transformer import ZImageTransformer

from ..helpers import NANO
from ..test_config import TURBO
from .prompts import encode, entries, random, restart


@pytest.fixture
def gpu(comfy, monkeypatch):
    """Tells ComfyUI's policy that it has a GPU of a generation, and flags from its command line."""
    mm = comfy.model_management

    def become(major: int, *flags: str) -> None:
        properties = SimpleNamespace(major=major, minor=0, name="some GPU", total_memory=24 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        monkeypatch.setattr(mm, "cpu_state", mm.CPUState.GPU)
        monkeypatch.setattr(mm, "get_torch_device", lambda: torch.device("cuda"))
        monkeypatch.setattr(mm, "get_total_memory", lambda *_, **__: 24 * 2**30)
        for flag in flags:
            monkeypatch.setattr(mm.args, flag, True)

    return become


def test_the_cpu_computes_in_float32(pack):
    assert pack.bridge.prompts.cache_dtype() == torch.float32


@pytest.mark.parametrize(
    ("major", "flags", "expected"),
    [
        (9, (), torch.bfloat16),
        (8, (), torch.bfloat16),
        (7, (), torch.float32),  # ours computes in float16, but ComfyUI's own model may do so in float32
        (9, ("fp32_unet",), torch.float32),
        (9, ("fp64_unet",), torch.float32),
        (9, ("bf16_unet",), torch.bfloat16),
        (9, ("fp16_unet",), torch.float16),
        (9, ("fp8_e4m3fn_unet",), torch.bfloat16),
        (9, ("fp8_e5m2_unet",), torch.bfloat16),
    ],
    ids=str,
)
def test_features_are_kept_in_what_the_transformer_computes_in(pack, gpu, major, flags, expected):
    source = pack.bridge.model.open_model(NANO)
    gpu(major, *flags)
    config = pack.bridge.model.ZImageModelConfig(source)
    supported = config.supported_inference_dtypes
    storage, compute = pack.bridge.model._dtypes(None, source.component, supported, torch.device("cuda"))
    kept = pack.bridge.prompts.cache_dtype()
    assert kept == expected
    if (compute or storage).itemsize <= kept.itemsize:
        assert kept in (compute or storage, torch.float32)


def test_the_size_that_the_policy_is_asked_for_is_the_published_one(pack):
    network = ZImageTransformer(TransformerConfig.from_dict(TURBO, "config.json"), device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == pack.bridge.prompts.PARAMETERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_features_are_rounded_once_as_the_transformer_would(pack, comfy, user, model, monkeypatch, dtype):
    clip, transformer = pack.bridge.clip.load_clip(model), pack.bridge.model.load_model(model)
    exact = encode(pack, clip, cache=False)
    monkeypatch.setattr(pack.bridge.prompts, "cache_dtype", lambda: dtype)
    miss = encode(pack, clip)
    hit = encode(pack, clip)
    restart(pack, comfy)
    for features in (miss, hit, encode(pack, clip)):
        assert features.dtype == torch.float32 and torch.equal(features, exact.to(dtype).float())
    assert not torch.equal(miss, exact) and torch.equal(encode(pack, clip, cache=False), exact)
    (file,) = user.glob("*.safetensors")
    assert file.stat().st_size <= 2.1 * exact.numel() + 300  # a width of 128 makes the header count
    monkeypatch.setattr(pack.bridge.prompts, "cache_dtype", lambda: torch.float32)
    assert torch.equal(encode(pack, clip), exact)

    transformer.set_model_compute_dtype(dtype)
    comfy.model_management.load_models_gpu([transformer])
    arguments = {"num_tokens": exact.shape[1], "transformer_options": {}}
    outputs = [
        transformer.model.apply_model(random(1, 16, 8, 8), torch.tensor([0.7]), c_crossattn=features, **arguments)
        for features in (exact, miss)
    ]
    assert torch.equal(*outputs)
    transformer.detach()


def test_features_beyond_float16_are_handed_out_whole(pack, user, model, monkeypatch):
    clip = pack.bridge.clip.load_clip(model, torch.float32)
    last = clip.cond_stage_model.encoder.model.layers[-2].mlp.down_proj
    last.weight = torch.nn.Parameter(last.weight * 1e7, requires_grad=False)
    monkeypatch.setattr(pack.bridge.prompts, "cache_dtype", lambda: torch.float16)
    features = encode(pack, clip)
    assert features.isfinite().all() and features.abs().max() > 65504 and entries(user) == 0
