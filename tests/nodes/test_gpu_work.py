"""What a step asks of a GPU, counted on fake CUDA tensors at the published size: ours beside ComfyUI's own Z-Image."""

from __future__ import annotations

import importlib
import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from . import fake_cuda

SIZES = {"dim": 3840, "n_heads": 30, "n_refiner_layers": 2, "cap_feat_dim": 2560, "in_channels": 16, "patch_size": 2}
TOKENS = 40
PUBLISHED = Path(__file__).resolve().parents[1] / "published_configs.json"
MB = 10**6


@contextmanager
def on_cuda():
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode():
        yield


def core(module: str):
    return importlib.import_module(f"zimage_pack.zimage_core.{module}")


def config(layers: int, **settings):
    return core("config").TransformerConfig(
        **{**core("weights.specs").PUBLISHED_TRANSFORMER, **SIZES, "n_layers": layers, **settings}
    )


def ours(pack, layers: int, dtype: torch.dtype, compiled: bool = False, sums_fit: bool = True):
    operations = importlib.import_module("comfy.ops").disable_weight_init
    model = pack.bridge.model.ZImageNextDiT(config(layers), operations=operations, device="cuda", dtype=dtype)
    model.compiled, model.sums_fit_half = compiled, sums_fit
    return model


def native(_pack, layers: int, dtype: torch.dtype):
    lumina = importlib.import_module("comfy.ldm.lumina.model")
    return lumina.NextDiT(
        in_channels=16,
        dim=SIZES["dim"],
        n_layers=layers,
        n_heads=SIZES["n_heads"],
        n_kv_heads=SIZES["n_heads"],
        ffn_dim_multiplier=8 / 3,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=SIZES["cap_feat_dim"],
        axes_dims=[32, 48, 48],
        axes_lens=[1536, 512, 512],
        rope_theta=256.0,
        z_image_modulation=True,
        time_scale=1000.0,
        pad_tokens_multiple=32,
        device="cuda",
        dtype=dtype,
        operations=importlib.import_module("comfy.ops").disable_weight_init,
    )


def step(model, dtype: torch.dtype, batch: int = 1) -> fake_cuda.Work:
    """The work of one step at 1024x1024."""
    x = torch.empty(batch, 16, 128, 128, device="cuda", dtype=dtype)
    captions = torch.empty(batch, TOKENS, SIZES["cap_feat_dim"], device="cuda", dtype=dtype)
    options = {"optimized_attention_override": fake_cuda.attention}
    with fake_cuda.Work() as work, work.whole(core("backends.compiled").Compiled):
        model(x, torch.empty(batch, device="cuda"), captions, num_tokens=TOKENS, transformer_options=options)
    return work


def block(make, dtype: torch.dtype) -> tuple[int, float]:
    """(launches, bytes moved) of one main block that is not the last."""
    more, fewer = step(make(3, dtype), dtype), step(make(2, dtype), dtype)
    for work in (more, fewer):
        assert not work.copies and not work.waits
    return more.launches.total() - fewer.launches.total(), more.traffic - fewer.traffic


@pytest.mark.parametrize(("dtype", "launches", "traffic"), [(torch.bfloat16, 17, 1745), (torch.float16, 17, 1870)])
def test_a_block_launches_and_moves_no_more_than_comfyuis(pack, dtype, launches, traffic):
    with on_cuda():
        found = block(partial(ours, pack), dtype)
        theirs = block(partial(native, pack), dtype)
    assert found[0] <= min(launches, theirs[0])
    assert found[1] <= min(traffic * MB, theirs[1])


def test_float16_beside_float32_tokens_launches_no_more_than_comfyuis(pack):
    """Though these tokens have 4 bytes, which ComfyUI's float16 has not."""
    with on_cuda():
        found = block(partial(ours, pack, sums_fit=False), torch.float16)
        theirs = block(partial(native, pack), torch.float16)
    assert found[0] <= min(21, theirs[0]) and found[1] <= min(2445 * MB, theirs[1])


def test_comfyuis_flag_keeps_triton_out(pack, comfy, monkeypatch):
    kernels = importlib.import_module("zimage_pack.nodes.bridge.kernels")
    assert kernels.may_use_triton() and core("backends.fused").enabled
    monkeypatch.setattr(importlib.import_module("comfy.cli_args").args, "disable_triton_backend", True, raising=False)
    assert not kernels.may_use_triton()
    monkeypatch.setattr(core("backends.fused"), "enabled", False)
    with on_cuda():
        assert block(partial(ours, pack), torch.bfloat16)[0] == 20


@pytest.mark.parametrize(
    ("dtype", "sums_fit", "traffic"),
    [(torch.bfloat16, True, 1740), (torch.float16, True, 1740), (torch.float16, False, 1940)],
)
def test_a_block_whose_parts_are_compiled(pack, dtype, sums_fit, traffic):
    with on_cuda():
        found = block(partial(ours, pack, compiled=True, sums_fit=sums_fit), dtype)
    assert found[0] <= 13 and found[1] <= traffic * MB


def test_weights_in_another_dtype_are_cast_on_the_device(pack):
    """What is stored in float32 or on the way patched costs launches, and still no copies and no waits."""
    with on_cuda():
        operations = importlib.import_module("comfy.ops").manual_cast
        model = pack.bridge.model.ZImageNextDiT(config(2), operations=operations, device="cuda", dtype=torch.float32)
        for norm in (model.layers[0].attention.q_norm, model.layers[0].attention_norm1):
            norm.weight_function = [lambda weight: 2 * weight]
        for model.compiled in (False, True):
            work = step(model, torch.bfloat16, batch=2)
            assert not work.copies and not work.waits


def test_a_step_of_the_core_neither_copies_nor_waits(pack):
    with on_cuda():
        transformer = core("model.transformer").ZImageTransformer(config(2), device="cuda", dtype=torch.bfloat16)
        x = torch.empty(2, 16, 128, 128, device="cuda", dtype=torch.bfloat16)
        captions = [torch.empty(length, SIZES["cap_feat_dim"], device="cuda") for length in (40, 70)]
        with fake_cuda.Work() as work:
            transformer(x, torch.empty(2, device="cuda"), captions)
    assert not work.copies and not work.waits and work.launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_of_the_text_encoder_are_one_kernel(pack, dtype):
    """Also where bfloat16 weights are used in float32."""
    works = []
    with on_cuda():
        for layers in (3, 2):  # of which the last is not built
            raw = {**json.loads(PUBLISHED.read_text())["text_encoder"], "num_hidden_layers": layers}
            encoder_config = core("config").TextEncoderConfig.from_dict(raw, "here")
            encoder = core("model.text_encoder").TextEncoder(encoder_config, device="cuda", dtype=torch.bfloat16)
            with fake_cuda.Work() as work:
                encoder(torch.zeros(1, TOKENS, dtype=torch.long, device="cuda"), dtype=dtype)
            assert not work.copies and not work.waits
            works.append(work.launches)
    one = works[0] - works[1]
    assert one["_fused_rms_norm"] == 4 and not one["rsqrt"]


def test_what_others_put_at_the_norms_of_q_and_k_is_called(pack):
    """There ComfyUI's kernel would read their weights past them."""
    with on_cuda():
        model = ours(pack, 2, torch.bfloat16)
        kernels = step(model, torch.bfloat16).launches
        calls = []
        model.layers[0].attention.q_norm.register_forward_hook(lambda *given: calls.append(given[0]))
        hooked = step(model, torch.bfloat16).launches
        assert len(calls) == 1
    pairs = "rms_rope"
    if not kernels[pairs]:
        pytest.skip("ComfyUI's kernel package has no kernel for it")
    assert hooked[pairs] == kernels[pairs] - 1


def test_what_is_counted():
    with on_cuda(), fake_cuda.Work() as work:
        x = torch.empty(4, 8, device="cuda")
        y = x.t() @ x + 1
        assert work.launches == {"mm": 1, "add": 1} and work.traffic == 4 * (32 + 32 + 64 + 64 + 64)
        y.cpu()
        torch.empty(3).to(device="cuda")
        assert len(work.copies) == 2 and not work.waits
        with pytest.raises(DataDependentOutputException):
            y[0, 0].item()
        assert work.waits


def steered(model, dtype: torch.dtype, kind: str, patches, prompts: int = 1) -> fake_cuda.Work:
    """The work of one step at 1024x1024 with a control network of version 2.1 on it."""
    x = torch.empty(prompts, 16, 128, 128, device="cuda", dtype=dtype)
    captions = torch.empty(prompts, TOKENS, SIZES["cap_feat_dim"], device="cuda", dtype=dtype)
    options = {"optimized_attention_override": fake_cuda.attention, "cond_or_uncond": [*range(prompts)]}
    options["patches"] = patches
    with fake_cuda.Work() as work:
        model(x, torch.empty(prompts, device="cuda"), captions, num_tokens=TOKENS, transformer_options=options)
    assert not work.copies and not work.waits, kind
    return work


@pytest.mark.parametrize("prompts", [1, 2])
def test_control_launches_and_moves_no_more_than_comfyuis(pack, prompts, monkeypatch):
    """And neither copies nor waits. Ours runs over the caption as well; the refiner's hints are for both prompts."""
    stock = importlib.import_module("comfy_extras.nodes_model_patch").ZImageControlPatch
    lumina = importlib.import_module("comfy.ldm.lumina.controlnet")
    network_of_host = importlib.import_module("comfy.ldm.lumina.model")
    # which ComfyUI's control network calls without the options that say so
    monkeypatch.setattr(network_of_host, "optimized_attention_masked", partial(fake_cuda.attention, None))
    operations, dtype = importlib.import_module("comfy.ops").manual_cast, torch.bfloat16
    bridge = pack.bridge.control
    with on_cuda():
        make = {"device": "cuda", "dtype": dtype}
        network = lumina.ZImage_Control(
            n_control_layers=2, additional_in_dim=17, refiner_control=True, operations=operations, **make
        )
        network.n_control_layers = 15  # of which a transformer of four layers uses two
        encoded = torch.empty(1, 33, 128, 128, **make)
        theirs = stock.__new__(stock)
        vars(theirs).update(model_patch=SimpleNamespace(model=network), strength=0.8, temp_data=None)
        vars(theirs).update(encoded_image=encoded, encoded_image_size=(1024, 1024))
        theirs.vae = SimpleNamespace(spacial_compression_encode=lambda: 8)
        numbers = core("config").ControlConfig(3840, 30, 1e-5, 33, (0, 2), 2, "hints")
        own = core("model.control").ControlNetwork(numbers, ops=operations, **make)
        settings = bridge.Settings(None, 1.0, 0.0, "crop", True)
        mine = bridge.ZImageControlPatch(SimpleNamespace(model=own), None, encoded, 0.8, settings=settings)
        mine.encoded_image, mine.encoded_image_size, mine.shared = encoded, (1024, 1024), {}
        found = steered(ours(pack, 4, dtype), dtype, "ours", {bridge.KIND: [mine]}, prompts)
        both = {"noise_refiner": [theirs], "double_block": [theirs]}
        expected = steered(native(pack, 4, dtype), dtype, "native", both, prompts)
    assert found.launches.total() <= expected.launches.total()
    assert found.traffic <= expected.traffic
