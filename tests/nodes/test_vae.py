"""VAE in the real host: in bands where memory is short or where the node says so."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

NANO = Path(__file__).resolve().parents[2] / "nano" / "snapshot"


@pytest.fixture
def vae(pack):
    return pack.host_vae.ZImageVAE(NANO)


@pytest.fixture
def samples() -> dict[str, torch.Tensor]:
    return {"samples": torch.randn(2, 16, 20, 12, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def in_bands(pack, monkeypatch) -> list[str]:
    """What ran in bands, in order."""
    found: list[str] = []
    bands = pack.host_vae.vae_bands
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
    monkeypatch.setattr(pack.host_vae.vae_bands, "WORKSPACE", 2**20)
    assert (decode(pack, vae, samples) - plain).abs().max() <= 1e-5
    assert set(in_bands) == {"decode"}
    in_bands.clear()
    assert torch.equal(decode(pack, vae, samples, low_memory="off"), plain)
    assert in_bands == []


def test_upsampling_goes_through_the_casts_of_the_host(comfy, vae):
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


def test_the_host_is_asked_for_less_memory(pack, vae, monkeypatch):
    shape = (1, 16, 512, 512)  # of a picture of 4096x4096
    monkeypatch.setattr(pack.host_vae.vae_bands, "faster", lambda *_: False)  # as on a GPU
    monkeypatch.setattr(pack.host_vae.mm, "get_free_memory", lambda *_: 2**40)
    plain = vae.memory_used_decode(shape, torch.float32)
    monkeypatch.setattr(pack.host_vae.mm, "get_free_memory", lambda *_: 2**20)
    channels = vae.first_stage_model.config.block_out_channels[0]
    maps = 2 * channels * 4096 * 4096 * 4
    assert maps < vae.memory_used_decode(shape, torch.float32) < maps + 2**30 < plain


def test_a_batch_that_does_not_fit_goes_in_bands(pack, vae, in_bands, monkeypatch):
    """The host sizes a batch before it frees memory, and by one picture."""
    module, one = vae.first_stage_model, 2178 * 128 * 128 * 4
    latents = torch.zeros(4, 16, 16, 16)
    monkeypatch.setattr(pack.host_vae.mm, "get_free_memory", lambda *_: one * 3 // 2)
    module.decode(latents[:1])
    assert in_bands == []
    module.decode(latents)
    assert in_bands == ["decode"]


def test_another_vae_can_not_be_forced(pack, samples):
    other = SimpleNamespace(latent_channels=16, first_stage_model=torch.nn.Identity(), decode=lambda latents: latents)
    with pytest.raises(ValueError, match="this VAE is a Identity of another loader"):
        decode(pack, other, samples, low_memory="on")
    assert decode(pack, other, samples) is samples["samples"]


def test_a_vae_that_was_changed_to_tile_is_not_cut_into_bands(pack, vae, samples, in_bands, monkeypatch):
    """As nodes for pictures that tile do it: each convolution pads with what lies at the other edge."""
    straight = decode(pack, vae, samples)
    monkeypatch.setattr(pack.host_vae.vae_bands, "WORKSPACE", 2**20)
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
