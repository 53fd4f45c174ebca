"""VAE in the real host: in bands where memory is short or where the node says so."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch

from ..helpers import NANO, PUBLISHED


@pytest.fixture
def vae(pack):
    return pack.bridge.vae.ZImageVAE(NANO)


@pytest.fixture
def samples() -> dict[str, torch.Tensor]:
    return {"samples": torch.randn(2, 16, 20, 12, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def in_bands(pack, monkeypatch) -> list[str]:
    """What ran in bands, in order."""
    found: list[str] = []
    bands = pack.bridge.vae.vae_bands
    for name in ("decode", "encode"):
        plain = getattr(bands, name)

        def counted(*arguments, name=name, plain=plain, **settings):
            found.append(name)
            return plain(*arguments, **settings)

        monkeypatch.setattr(bands, name, counted)
    return found


def decode(pack, vae, samples, **settings) -> torch.Tensor:
    return pack.vae.ZImageVAEDecode.execute(vae=vae, samples=samples, **settings).args[0]


def test_the_switch_of_the_node(pack, vae, samples, in_bands):
    plain = decode(pack, vae, samples, low_memory="off")
    assert in_bands == []
    assert torch.equal(decode(pack, vae, samples), plain)  # memory is plenty
    assert in_bands == []
    assert (decode(pack, vae, samples, low_memory="on") - plain).abs().max() <= 1e-5
    assert set(in_bands) == {"decode"}
    in_bands.clear()
    decode(pack, vae, samples)  # the choice was of that call alone
    assert in_bands == []


def test_a_cpu_decodes_in_bands_what_is_more_than_one(pack, vae, samples, in_bands, monkeypatch):
    plain = decode(pack, vae, samples)
    monkeypatch.setattr(pack.bridge.vae.vae_bands, "WORKSPACE", 2**20)
    assert (decode(pack, vae, samples) - plain).abs().max() <= 1e-5
    assert set(in_bands) == {"decode"}
    in_bands.clear()
    assert torch.equal(decode(pack, vae, samples, low_memory="off"), plain)
    assert in_bands == []


def test_upsampling_goes_through_the_casts_of_comfyui(comfy, vae):
    """Which brings weights to the input's device and dtype where they are kept in others."""
    layer = copy.deepcopy(vae.first_stage_model.decoder.up[1].upsample).half()
    assert isinstance(layer.conv, comfy.ops.disable_weight_init.Conv2d)
    x = torch.randn(1, layer.conv.in_channels, 9, 6, generator=torch.Generator().manual_seed(0))
    layer.conv.comfy_cast_weights = True
    found, expected = layer(x), layer.float().conv(torch.nn.functional.interpolate(x, scale_factor=2.0))
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_short_memory_is_seen_by_stock_nodes_too(pack, comfy, vae, samples, in_bands, monkeypatch):
    plain = vae.decode(samples["samples"])
    latents = vae.encode(plain)
    asked: list[float] = []
    load = comfy.model_management.load_models_gpu

    def noted(models, memory_required=0, **settings):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **settings)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", noted)
    vae.decode(samples["samples"])
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 10 * 2**20)
    assert (vae.decode(samples["samples"]) - plain).abs().max() <= 1e-5
    assert (vae.encode(plain) - latents).abs().max() <= 5e-5  # of latents up to 5
    assert set(in_bands) == {"decode", "encode"}
    assert asked[0] == 2178 * 160 * 96 * 4
    in_bands.clear()
    decode(pack, vae, samples, low_memory="off")
    assert in_bands == []


def test_comfyui_is_asked_for_less_memory(pack, vae, monkeypatch):
    shape = (1, 16, 512, 512)  # of an image of 4096x4096
    monkeypatch.setattr(pack.bridge.vae.vae_bands, "faster", lambda *_: False)  # so that memory alone decides
    monkeypatch.setattr(pack.bridge.vae.mm, "get_free_memory", lambda *_: 2**40)
    plain = vae.memory_used_decode(shape, torch.float32)
    monkeypatch.setattr(pack.bridge.vae.mm, "get_free_memory", lambda *_: 2**20)
    channels = vae.first_stage_model.config.block_out_channels[0]
    maps = 2 * channels * 4096 * 4096 * 4
    assert maps < vae.memory_used_decode(shape, torch.float32) < maps + 2**30 < plain


def test_a_batch_that_does_not_fit_goes_in_bands(pack, vae, in_bands, monkeypatch):
    """ComfyUI sizes a batch before it frees memory, and by one image."""
    module, one = vae.first_stage_model, 2178 * 128 * 128 * 4
    latents = torch.zeros(4, 16, 16, 16)
    monkeypatch.setattr(pack.bridge.vae.mm, "get_free_memory", lambda *_: one * 3 // 2)
    module.decode(latents[:1])
    assert in_bands == []
    module.decode(latents)
    assert in_bands == ["decode"]


def test_another_vae_can_not_be_forced(pack, samples):
    images = torch.rand(2, 160, 96, 3)
    other = SimpleNamespace(latent_channels=16, first_stage_model=torch.nn.Identity(), decode=lambda _: images)
    with pytest.raises(ValueError, match="this VAE is a Identity of another loader"):
        decode(pack, other, samples, low_memory="on")
    assert decode(pack, other, samples) is images


def test_a_vae_that_was_changed_to_tile_is_not_cut_into_bands(pack, vae, samples, in_bands, monkeypatch):
    """As nodes for images that tile do it: each convolution pads with what lies at the other edge."""
    straight = decode(pack, vae, samples)
    monkeypatch.setattr(pack.bridge.vae.vae_bands, "WORKSPACE", 2**20)
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"
    tiled = decode(pack, vae, samples)
    shifted = decode(pack, vae, {"samples": samples["samples"].roll((5, 3), (2, 3))})
    assert in_bands == []
    assert (shifted - tiled.roll((40, 24), (1, 2))).abs().max() <= 1e-4 < (straight - tiled).abs().max()
    with pytest.raises(ValueError, match="has changed how this VAE pads"):
        decode(pack, vae, samples, low_memory="on")


def test_interrupting_stops_between_bands(pack, comfy, vae, samples):
    management = comfy.model_management
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        decode(pack, vae, samples, low_memory="on")
    management.interrupt_current_processing(False)


@pytest.fixture(scope="module")
def on_device(scripts) -> dict:
    """What a fake accelerator saw of one decode and one encode, by how much memory there was."""
    return scripts("vae_on_device")


def exact(*runs: dict) -> bool:
    return all(run["tiles"] == 0 and max(run["differences"]) <= 2e-5 for run in runs)


def test_on_a_gpu_comfyui_is_asked_for_what_its_own_vae_wants(on_device):
    """With much and little memory: with less it would not make room."""
    for name in ("room", "little", "enough", "room after eviction", "pages that can be given back", "batch"):
        assert on_device[name]["asked"] == on_device["figures"], name
        assert exact(on_device[name])
    assert max(on_device["on, room"]["asked"]) < min(on_device["figures"]) / 4  # its user wants no room made


def test_on_a_gpu_bands_are_for_what_does_not_fit_after_eviction(on_device):
    for name in ("room", "enough", "room after eviction", "pages that can be given back", "batch"):
        assert on_device[name]["in bands"] == [], name
    moved_out = on_device["room after eviction"]
    assert moved_out["before"] > 0 == moved_out["left"]
    for name in ("little", "on, room", "few weights"):
        assert on_device[name]["in bands"] == ["decode", "encode"], name
        assert exact(on_device[name])
        both = zip(on_device[name]["peaks"], on_device["room"]["peaks"], strict=True)
        assert all(ours < 0.8 * plain for ours, plain in both)
    assert on_device["few weights"]["loaded"] < 0.1 and on_device["few weights"]["waits"] > 0
    assert on_device["on, room"]["waits"] == on_device["out of memory"]["waits"] == 0  # with all weights loaded


@pytest.mark.parametrize("name", ["out of memory", "batch out of memory"])
def test_on_a_gpu_that_runs_out_of_memory_bands_come_before_tiles(on_device, name):
    assert on_device[name]["in bands"] == ["decode", "encode"]
    assert exact(on_device[name])


def test_with_bands_off_comfyui_falls_back_to_its_tiles(on_device):
    assert on_device["off, out of memory"]["in bands"] == []
    assert on_device["off, out of memory"]["tiles"] == 2


@pytest.mark.parametrize("name", ["split attention", "slices attention"])
def test_on_a_gpu_attention_is_what_comfyui_uses_in_its_vae(on_device, name):
    """Not torch's where ComfyUI avoids it, and slices of it where memory runs out in it."""
    found = on_device[name]
    assert found["torch"] == 0 and found["slices"] == 4
    assert exact(found["plain"], found["bands"])
    assert found["plain"]["in bands"] == [] and found["bands"]["in bands"] == ["decode", "encode"]


def test_the_figure_is_that_of_the_device_which_a_copy_was_moved_to(vae, monkeypatch, comfy):
    """As ComfyUI's node for choosing a VAE's device makes it."""
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 2**20)
    moved = copy.copy(vae)
    moved.device = torch.device("cuda", 1)
    shape = (1, 16, 512, 512)
    assert moved.memory_used_decode(shape, torch.bfloat16) == 2178 * 4096 * 4096 * 2
    assert moved.memory_used_encode((1, 3, 4096, 4096), torch.bfloat16) == 1767 * 4096 * 4096 * 2
    assert vae.memory_used_decode(shape, torch.bfloat16) < 2178 * 4096 * 4096


@pytest.fixture(scope="module")
def native(pack, comfy):
    """ComfyUI's own VAE for the published autoencoder; its weights don't matter here."""
    config = importlib.import_module("zimage_pack.zimage_core.config").VAEConfig.from_dict(PUBLISHED["vae"], "here")
    shapes = pack.bridge.vae.AutoencoderKL(config, device="meta").state_dict()
    return comfy.sd.VAE(sd={name: torch.zeros(()).expand(value.shape) for name, value in shapes.items()})


@pytest.mark.parametrize("flag", [None, "fp16_vae", "bf16_vae", "fp32_vae"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_precision_is_what_comfyui_gives_its_own_vae(pack, comfy, native, monkeypatch, flag, bf16):
    management = comfy.model_management
    monkeypatch.setattr(management, "should_use_fp16", lambda *_, **__: True)
    monkeypatch.setattr(management, "should_use_bf16", lambda *_, **__: bf16)
    if flag:
        monkeypatch.setattr(management.args, flag, True)
    ours = pack.bridge.vae.ZImageVAE(NANO)
    assert ours.vae_dtype == management.vae_dtype(native.device, native.working_dtypes)
    assert ours.vae_dtype == ours.first_stage_model.decoder.conv_in.weight.dtype
    assert (ours.vae_dtype == torch.float16) == (flag == "fp16_vae")


def test_a_gpu_is_asked_for_as_much_as_by_comfyuis_own_vae(native, vae):
    vae.device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for call, shape in (("decode", (1, 16, 128, 96)), ("encode", (1, 3, 1024, 768))):
            asked = getattr(vae, f"memory_used_{call}")(shape, dtype)
            assert asked == getattr(native, f"memory_used_{call}")(shape, dtype) > 0


def test_what_comfyui_adds_to_a_norms_weights_is_in_bands_too(pack, vae, samples, in_bands):
    plain = decode(pack, vae, samples, low_memory="off")
    norm = vae.first_stage_model.decoder.up[0].block[0].norm1
    norm.weight_function = [lambda weight: 1.5 * weight]
    norm.bias_function = [lambda bias: bias + 0.5]
    patched = decode(pack, vae, samples, low_memory="off")
    assert (patched - plain).abs().max() > 1e-2
    assert (decode(pack, vae, samples, low_memory="on") - patched).abs().max() <= 1e-5
    assert in_bands
