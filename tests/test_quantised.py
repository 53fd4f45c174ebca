"""fp8 files of three dialects: the values are the stored ones times their scale; other formats are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage_core.checkpoint import CheckpointError, Snapshot, open_component
from zimage_core.pipeline import ZImagePipeline

NANO = Path(__file__).resolve().parents[1] / "nano" / "snapshot"
CONFIG = {"zimage.transformer.config": (NANO / "transformer" / "config.json").read_text()}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in Snapshot(NANO).transformer().state_dict().items()}


def is_layer(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith(("layers.", "noise_refiner.", "context_refiner."))


def quantise(plain: dict[str, Tensor], dialect: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors of a file, the values that it means in float64)."""
    stored, meant = dict(plain), {name: value.double() for name, value in plain.items()}
    form = str(dtype).removeprefix("torch.")
    for name, tensor in plain.items():
        if not is_layer(name, tensor):
            continue
        layer = name.removesuffix(".weight")
        scale = torch.tensor(1.0)
        if dialect == "by rows":
            scale = tensor.float().abs().amax(1, keepdim=True) / torch.finfo(dtype).max
        elif dialect != "alone":
            scale = tensor.float().abs().max() / torch.finfo(dtype).max
        stored[name] = (tensor.float() / scale).to(dtype)
        meant[name] = stored[name].double() * scale.double()
        if dialect == "old":
            stored |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(1.0)}
        elif dialect in ("marked", "by rows"):
            marker = json.dumps({"format": form, "full_precision_matrix_mult": False}).encode()
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(1.0)}
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
        elif dialect == "header":
            stored[f"{layer}.weight_scale"] = scale
    if dialect == "old":
        stored["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return stored, meant


def written(tmp_path: Path, stored: dict[str, Tensor], dialect: str, dtype: torch.dtype, prefix: str = "") -> Path:
    metadata = dict(CONFIG)
    if dialect == "header":
        form = {"format": str(dtype).removeprefix("torch.")}
        layers = {name.removesuffix(".weight"): form for name, value in stored.items() if value.dtype == dtype}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file({prefix + name: value for name, value in stored.items()}, tmp_path / "m.safetensors", metadata)
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dialect", ["alone", "old", "marked", "by rows", "header"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_values_are_exact(tmp_path, plain, dialect, dtype, prefix):
    stored, meant = quantise(plain, dialect, dtype)
    path = written(tmp_path, stored, dialect, dtype, prefix)
    found = open_component(path, "transformer").build(dtype=torch.float32).state_dict()
    assert found.keys() == meant.keys()
    for name, value in found.items():
        assert torch.equal(value, meant[name].float()) or torch.allclose(value.double(), meant[name], rtol=1e-7, atol=0)


def test_unasked_scaled_weights_become_bfloat16_and_others_stay(tmp_path, plain):
    stored, _ = quantise(plain, "marked", torch.float8_e4m3fn)
    component = open_component(written(tmp_path, stored, "marked", torch.float8_e4m3fn), "transformer")
    assert component.dtype() == torch.bfloat16
    assert {parameter.dtype for parameter in component.build().parameters()} == {torch.bfloat16}
    stored, _ = quantise(plain, "alone", torch.float8_e4m3fn)
    component = open_component(written(tmp_path, stored, "alone", torch.float8_e4m3fn), "transformer")
    assert component.dtype() == torch.float8_e4m3fn
    kept = dict(component.build().named_parameters())
    assert kept["layers.0.attention.qkv.weight"].dtype == torch.float8_e4m3fn
    assert kept["layers.0.attention_norm1.weight"].dtype == torch.bfloat16


def test_the_picture_is_nearly_that_of_the_whole_weights(tmp_path, plain):
    stored, _ = quantise(plain, "by rows", torch.float8_e4m3fn)
    path = written(tmp_path, stored, "by rows", torch.float8_e4m3fn)
    settings = {"width": 128, "height": 128, "seed": 1}
    image = ZImagePipeline.from_pretrained(NANO, transformer=path).generate(
        "a red circle on a blue background", **settings
    )
    whole = ZImagePipeline.from_pretrained(NANO).generate("a red circle on a blue background", **settings)
    assert 0 < (image - whole).abs().mean() < 0.02


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_component(path, "transformer").build(dtype=torch.float32)
    assert str(error.value).startswith(str(path))
    return str(error.value)


@pytest.mark.parametrize("dialect", ["marked", "header"])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4"])
def test_other_formats_are_named(tmp_path, plain, form, dialect):
    marker = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    metadata = dict(CONFIG)
    stored = dict(plain)
    if dialect == "marked":
        stored["layers.0.attention.qkv.comfy_quant"] = marker
    else:
        layers = {"layers.0.attention.qkv": {"format": form}}
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    save_file(stored, tmp_path / "m.safetensors", metadata)
    message = refusal(tmp_path / "m.safetensors")
    assert (
        f"layers.0.attention.qkv is quantised as '{form}'" in message and "load a bf16, fp16 or fp8 version" in message
    )


def test_damaged_markers_and_scales(tmp_path, plain):
    stored, _ = quantise(plain, "marked", torch.float8_e4m3fn)
    broken = {**stored, "layers.0.attention.qkv.comfy_quant": torch.tensor([123], dtype=torch.uint8)}
    assert "comfy_quant is damaged" in refusal(written(tmp_path, broken, "marked", torch.float8_e4m3fn))
    for dialect in ("marked", "header"):
        unscaled, _ = quantise(plain, dialect, torch.float8_e4m3fn)
        del unscaled["layers.0.attention.qkv.weight_scale"]
        message = refusal(written(tmp_path, unscaled, dialect, torch.float8_e4m3fn))
        assert "layers.0.attention.qkv.weight is quantised by" in message and "weight_scale is missing" in message
    broken = {**stored, "layers.0.attention.qkv.weight_scale": torch.ones(7)}
    message = refusal(written(tmp_path, broken, "marked", torch.float8_e4m3fn))
    assert "weight_scale has shape [7], expected one number or 576" in message


def test_a_scale_without_a_weight_is_left_over(tmp_path, plain):
    path = written(
        tmp_path, {**plain, "layers.9.attention.qkv.weight_scale": torch.ones(1)}, "alone", torch.float8_e5m2
    )
    assert "unknown layers.9.attention.qkv.weight_scale" in refusal(path)
