"""What is computed in, and what weights are held in, on devices that this machine doesn't have.

ComfyUI's own functions decide, told of such a device; its own Z-Image is the floor.
"""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from ..helpers import NANO

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
BITS16 = (BF16, FP16)
FILES = (BF16, FP16, FP32, FP8)


class Device(NamedTuple):
    kind: str  # of torch.device
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    gigabytes: int = 8
    settings: tuple[str, ...] = ()  # "fp16", "bf16": what the driver says; "directml"
    macos: str = "15.0"


# what the transformer computes in, and what a file of (bf16, fp16, fp32, fp8) is held in
DEVICES = {
    "Pascal": (Device("cuda", "GeForce GTX 1080", (6, 1)), FP32, (BF16, FP16, BF16, FP8)),
    "Volta": (Device("cuda", "Tesla V100", (7, 0), 16), FP16, (FP16, FP16, FP16, FP16)),
    "Turing": (Device("cuda", "GeForce RTX 2070", (7, 5)), FP16, (FP16, FP16, FP16, FP8)),
    "Turing without float16": (Device("cuda", "GeForce GTX 1660", (7, 5), 6), FP32, (BF16, FP16, BF16, FP8)),
    "Ampere": (Device("cuda", "GeForce RTX 3090", (8, 6), 24), BF16, (BF16, FP16, BF16, BF16)),
    "Hopper": (Device("cuda", "H100", (9, 0), 80), BF16, (BF16, FP16, BF16, FP8)),
    "Apple": (Device("mps", gigabytes=32), BF16, (BF16, FP16, BF16, BF16)),
    "Apple, short of memory": (Device("mps", gigabytes=8), BF16, (BF16, FP16, BF16, BF16)),
    "Apple, macOS 13": (Device("mps", gigabytes=32, macos="13.6"), FP16, (FP16, FP16, FP16, FP16)),
    "CPU": (Device("cpu", gigabytes=64), FP32, (BF16, FP16, FP32, FP8)),
    "AMD, old": (Device("cuda", "gfx1030", (10, 3), 16), FP16, (FP16, FP16, FP16, FP16)),
    "AMD, new": (Device("cuda", "gfx1100", (11, 0), 24), BF16, (BF16, FP16, BF16, BF16)),
    "Intel": (Device("xpu", gigabytes=16, settings=("fp16", "bf16")), BF16, (BF16, FP16, BF16, BF16)),
    "Intel, old": (Device("xpu", gigabytes=16, settings=("fp16",)), FP16, (FP16, FP16, FP16, FP16)),
    "DirectML": (Device("privateuseone", settings=("directml",)), FP16, (FP16,) * 4),
}


@pytest.fixture
def become(comfy, monkeypatch):
    """Tells ComfyUI that its device is another one."""
    mm = comfy.model_management

    def become(device: Device) -> torch.device:
        major, minor = device.capability
        memory = device.gigabytes * 2**30
        properties = SimpleNamespace(
            major=major, minor=minor, name=device.name, gcnArchName=device.name, total_memory=memory,
            has_fp16="fp16" in device.settings,
        )  # fmt: skip
        amd = device.name.startswith("gfx")
        states = {"cpu": mm.CPUState.CPU, "mps": mm.CPUState.MPS}
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # emulated where it must be
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda *_: properties)
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda *_: "bf16" in device.settings)
        monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if device.kind == "cuda" and not amd else None)
        monkeypatch.setattr(platform, "mac_ver", lambda: (device.macos, ("", "", ""), ""))
        monkeypatch.setattr(mm, "cpu_state", states.get(device.kind, mm.CPUState.GPU))
        monkeypatch.setattr(mm, "xpu_available", device.kind == "xpu")
        monkeypatch.setattr(mm, "directml_enabled", "directml" in device.settings)
        monkeypatch.setattr(mm, "WINDOWS", False)
        monkeypatch.setattr(mm, "get_total_memory", lambda *_, **__: memory)
        monkeypatch.setattr(mm, "get_torch_device", lambda: torch.device(device.kind))
        return torch.device(device.kind)

    return become


def supported(pack) -> list[torch.dtype]:
    return pack.bridge.model.ZImageModelConfig(pack.bridge.model.open_model(NANO)).supported_inference_dtypes


def ours(pack, stored: torch.dtype, device: torch.device, asked: torch.dtype | None = None):
    """(what weights are held in, what is computed in) of the published model."""
    component = SimpleNamespace(dtype=lambda: stored, shapes={"all": (pack.bridge.prompts.PARAMETERS,)})
    storage, cast = pack.bridge.model._dtypes(asked, component, supported(pack), device)
    return storage, cast or storage


def native(comfy, parameters: int, stored: torch.dtype, device: torch.device, allow_fp16: bool):
    """The same of ComfyUI's own Z-Image, of a checkpoint whose norm says that float16 will do, or that it won't."""
    mm = comfy.model_management
    supported = comfy.supported_models.ZImage({"allow_fp16": allow_fp16}).supported_inference_dtypes
    storage = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored, device=device)
    return storage, mm.unet_manual_cast(storage, device, supported) or storage


@pytest.mark.parametrize("name", DEVICES)
def test_the_transformer(pack, comfy, become, name):
    device, compute, held = DEVICES[name]
    device = become(device)
    for stored, expected in zip(FILES, held, strict=True):
        # a file of float16 is computed in it wherever the device can
        computed = FP16 if stored == FP16 and compute in BITS16 else compute
        assert ours(pack, stored, device) == (expected, computed), stored
        for allowed in (False, True):
            storage, computing = native(comfy, pack.bridge.prompts.PARAMETERS, stored, device, allowed)
            assert computed in BITS16 or computing not in BITS16  # as fast
            assert expected.itemsize <= storage.itemsize or not comfy.model_management.supports_cast(device, storage)
            if storage == computing and computed in BITS16:  # nothing is cast at each use
                assert expected == computed


@pytest.mark.parametrize(
    ("asked", "computed"), [(FP16, FP16), (FP32, FP32), (BF16, FP16)], ids=["fp16", "fp32", "bf16"]
)
def test_the_user_can_force_it_on_turing(pack, become, asked, computed):
    assert ours(pack, BF16, become(DEVICES["Turing"][0]), asked) == (asked, computed)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("fp32_unet", (BF16, FP32)),
        ("fp64_unet", (BF16, torch.float64)),
        ("bf16_unet", (BF16, BF16)),
        ("fp16_unet", (FP16, FP16)),
        ("fp8_e4m3fn_unet", (FP8, BF16)),
    ],
)
def test_the_flags_of_comfyui_decide(pack, comfy, become, monkeypatch, flag, expected):
    """As for its own models, but that weights aren't held in more than the file has."""
    device = become(DEVICES["Ampere"][0])
    monkeypatch.setattr(comfy.model_management.args, flag, True)
    storage, computing = native(comfy, pack.bridge.prompts.PARAMETERS, BF16, device, True)
    assert ours(pack, BF16, device) == expected
    assert computing == expected[1] and storage.itemsize >= expected[0].itemsize


def test_the_matrices_of_any_file_are_held_in_fp8_where_the_flag_says_so(pack, comfy, monkeypatch):
    monkeypatch.setattr(comfy.model_management.args, "fp8_e4m3fn_unet", True)
    weights = pack.bridge.model.load_model(NANO).model.diffusion_model.state_dict()
    assert weights["layers.0.feed_forward.w1.weight"].dtype == FP8
    assert weights["layers.0.ffn_norm1.weight"].dtype == BF16 == weights["x_pad_token"].dtype


@pytest.mark.parametrize("name", DEVICES)
def test_the_quantized_transformer(pack, comfy, become, name):
    device, compute, _ = DEVICES[name]
    device = become(device)
    assert comfy.model_management.unet_manual_cast(None, device, supported(pack)) == compute


@pytest.mark.parametrize("name", DEVICES)
def test_the_autoencoder_as_comfyui(pack, comfy, become, name):
    """Its 16-bit image is right in bfloat16 only."""
    device, compute, _ = DEVICES[name]
    device = become(device)
    vae = comfy.sd.VAE(sd={})  # knows what it works in before it knows the weights
    dtype = comfy.model_management.vae_dtype(device, vae.working_dtypes)
    assert dtype == (BF16 if compute == BF16 else FP32)
    assert FP16 not in vae.working_dtypes


@pytest.mark.parametrize("name", ["CPU", "Turing", "Ampere"])
def test_the_text_encoder_as_comfyui(pack, comfy, become, monkeypatch, name):
    """Weights as the file has them, each layer computes in float32."""
    become(DEVICES[name][0])
    monkeypatch.setattr(comfy.model_management, "text_encoder_device", lambda: torch.device("cpu"))
    clip = pack.bridge.clip.load_clip(NANO)
    assert clip.patcher.object_patches["manual_cast_dtype"] == FP32
    assert {parameter.dtype for parameter in clip.cond_stage_model.parameters()} == {BF16}
