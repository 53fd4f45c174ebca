"""Quantized files of every layout: the numbers are exactly those that are meant; other formats are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file
from torch import Tensor

from zimage_core.config import TransformerConfig
from zimage_core.errors import CheckpointError
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights.quantized import Packed
from zimage_core.weights.snapshot import Snapshot, open_component

from .helpers import NANO
from .quantizing import BLOCKS, block_quantize, quantize, with_markers

CONFIG = {"zimage.transformer.config": (NANO / "transformer" / "config.json").read_text()}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in Snapshot(NANO).transformer().state_dict().items()}


def written(tmp_path: Path, stored: dict[str, Tensor], layout: str, dtype: torch.dtype, prefix: str = "") -> Path:
    metadata = dict(CONFIG)
    if layout == "header":
        form = {"format": str(dtype).removeprefix("torch.")}
        layers = {name.removesuffix(".weight"): form for name, value in stored.items() if value.dtype == dtype}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file({prefix + name: value for name, value in stored.items()}, tmp_path / "m.safetensors", metadata)
    return tmp_path / "m.safetensors"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", ["alone", "old", "marked", "by rows", "header"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_values_are_exact(tmp_path, plain, layout, dtype, prefix):
    stored, meant = quantize(plain, layout, dtype)
    path = written(tmp_path, stored, layout, dtype, prefix)
    found = open_component(path, "transformer").build(dtype=torch.float32).state_dict()
    assert found.keys() == meant.keys()
    for name, value in found.items():
        assert torch.equal(value, meant[name].float()) or torch.allclose(value.double(), meant[name], rtol=1e-7, atol=0)


def test_unasked_scaled_weights_become_bfloat16_and_others_stay(tmp_path, plain):
    stored, _ = quantize(plain, "marked", torch.float8_e4m3fn)
    component = open_component(written(tmp_path, stored, "marked", torch.float8_e4m3fn), "transformer")
    assert component.dtype() == torch.bfloat16
    assert {parameter.dtype for parameter in component.build().parameters()} == {torch.bfloat16}
    stored, _ = quantize(plain, "alone", torch.float8_e4m3fn)
    component = open_component(written(tmp_path, stored, "alone", torch.float8_e4m3fn), "transformer")
    assert component.dtype() == torch.float8_e4m3fn
    kept = dict(component.build().named_parameters())
    assert kept["layers.0.attention.qkv.weight"].dtype == torch.float8_e4m3fn
    assert kept["layers.0.attention_norm1.weight"].dtype == torch.bfloat16


def test_the_image_is_nearly_that_of_the_whole_weights(tmp_path, plain):
    stored, _ = quantize(plain, "by rows", torch.float8_e4m3fn)
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
    assert str(error.value).endswith(f" ({path})")
    return str(error.value)


# Block formats, against ComfyUI's own package


@pytest.mark.one_in(3)
@pytest.mark.parametrize("where", ["marked", "header", "nested"])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_block_formats_mean_what_comfyui_says(tmp_path, plain, name, where):
    stored, meant, markers = block_quantize(plain, name)
    metadata = dict(CONFIG)
    if where == "header":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": markers})
    else:
        if where == "nested":
            markers = {layer: {"format": marker["format"], "params": marker} for layer, marker in markers.items()}
        stored = with_markers(stored, markers)
    save_file(stored, tmp_path / "m.safetensors", metadata)
    component = open_component(tmp_path / "m.safetensors", "transformer")
    assert component.dtype() == torch.bfloat16
    found = component.build(dtype=torch.float32).state_dict()
    assert found.keys() == meant.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, meant[key], rtol=1e-6, atol=1e-7, msg=key)
    changed = sum(not torch.equal(value, plain[key].float()) for key, value in found.items())
    assert changed >= len(markers) - 1  # the files are not the plain weights


@pytest.mark.parametrize("codebook", [True, False])
@pytest.mark.parametrize("stored_scale", [torch.uint8, torch.float8_e4m3fn])
def test_w4a8_means_codes_by_group_and_row(codebook, stored_scale):
    """[2, 32] in groups of 16, number by number; the rotation is that of the other ConvRot formats."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2, 32), generator=generator)
    book = 20 * torch.randn(16, generator=generator)
    scale = (6 * torch.rand(2, 2, generator=generator)).to(torch.float8_e4m3fn)  # the larger ones are cut off at 127
    channel, correction = torch.rand(2, generator=generator), torch.randn(2, 2, generator=generator)
    parts = {
        "weight": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8),
        "weight_s_rel": scale.view(stored_scale),
        "weight_s_channel": channel,
        "weight_correction": correction,
        **({"weight_codebook": book} if codebook else {}),
    }
    meant = torch.empty(2, 32)
    for row in range(2):
        for column in range(32):
            value = book[codes[row, column]].item() if codebook else codes[row, column].item() - 8
            whole = max(-127, min(127, round(value * scale[row, column // 16].item())))
            meant[row, column] = whole * channel[row] + correction[column // 16, row]
    settings = {"group_size": 16, "convrot_groupsize": 16}
    found = Packed("asym_w4a8_int8", (2, 32), parts, settings).expand()
    turned = Packed(
        "int8_tensorwise",
        (2, 32),
        {"weight": torch.eye(16).to(torch.int8), "weight_scale": torch.ones(1)},
        {"convrot": True, "convrot_groupsize": 16},
    ).expand()
    torch.testing.assert_close(found, (meant.unflatten(1, (2, 16)) @ turned).flatten(1))
    with pytest.raises(ValueError, match="weight_s_rel has shape"):
        Packed("asym_w4a8_int8", (2, 32), parts, {**settings, "group_size": 32}).expand()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_padding_to_whole_tiles_is_cut_off(tmp_path, name):
    """The caption embedder of this config is 40 wide: the formats store it 48 or 64 wide."""
    config = TransformerConfig.from_dict({**json.loads(CONFIG["zimage.transformer.config"]), "cap_feat_dim": 40}, "")
    torch.manual_seed(0)
    model = ZImageTransformer(config)
    plain = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    layout, options, _ = BLOCKS[name]
    key = "cap_embedder.1.weight"
    scale = {"scale": plain[key].abs().max() / (448 * 6)} if options else {}
    packed = QuantizedTensor.from_float(plain[key], layout, **scale)
    stored = {**plain, **packed.state_dict(key)}
    assert packed.is_padded
    stored["cap_embedder.1.comfy_quant"] = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    numbers = json.dumps({**json.loads(CONFIG["zimage.transformer.config"]), "cap_feat_dim": 40})
    save_file(stored, tmp_path / "m.safetensors", {"zimage.transformer.config": numbers})
    found = open_component(tmp_path / "m.safetensors", "transformer").build(dtype=torch.float32)
    torch.testing.assert_close(found.state_dict()[key], packed.dequantize(), rtol=1e-6, atol=1e-7)


def test_smoothing_belongs_to_the_weight(tmp_path, plain):
    """nvfp4's pre_quant_scale multiplies the layer's input."""
    stored, meant, markers = block_quantize(plain, "nvfp4")
    layer = next(iter(markers))
    smoothing = torch.rand(plain[f"{layer}.weight"].shape[1]) + 0.5
    stored[f"{layer}.pre_quant_scale"] = smoothing
    metadata = CONFIG | {"_quantization_metadata": json.dumps({"layers": markers})}
    save_file(stored, tmp_path / "m.safetensors", metadata)
    found = open_component(tmp_path / "m.safetensors", "transformer").build(dtype=torch.float32).state_dict()
    x = torch.randn(3, len(smoothing))
    expected = (x * smoothing) @ meant[f"{layer}.weight"].T
    torch.testing.assert_close(x @ found[f"{layer}.weight"].T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["marked", "header"])
def test_other_formats_are_named(tmp_path, plain, layout):
    metadata = dict(CONFIG)
    stored = dict(plain)
    if layout == "marked":
        marker = torch.tensor(list(json.dumps({"format": "fp2"}).encode()), dtype=torch.uint8)
        stored["layers.0.attention.qkv.comfy_quant"] = marker
    else:
        metadata["_quantization_metadata"] = json.dumps({"layers": {"layers.0.attention.qkv": {"format": "fp2"}}})
    save_file(stored, tmp_path / "m.safetensors", metadata)
    message = refusal(tmp_path / "m.safetensors")
    assert "layers.0.attention.qkv is quantized as 'fp2'" in message and "load a bf16, fp16 or fp8 version" in message


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("nvfp4", "weight_scale_2", "weight_scale_2 is missing"),
        ("mxfp8", "weight_scale", "weight_scale is missing"),
        ("int8_tensorwise", "weight_scale", "weight_scale is missing"),
        ("convrot_w4a4", "weight_scale", "weight_scale is missing"),
        ("convrot_w4a4", "groupsize", "convrot_groupsize is 48, expected a power of 4"),
        ("nvfp4", "short scale", "weight_scale has shape"),
        ("int8_tensorwise", "dtype", "stored as F32"),
    ],
)
def test_damaged_block_formats(tmp_path, plain, name, damage, words):
    stored, _, markers = block_quantize(plain, name)
    layer = next(iter(markers))
    if damage == "groupsize":
        markers[layer]["convrot_groupsize"] = 48
    elif damage == "short scale":
        stored[f"{layer}.weight_scale"] = stored[f"{layer}.weight_scale"][:32].clone()
    elif damage == "dtype":
        stored[f"{layer}.weight"] = stored[f"{layer}.weight"].float()
    else:
        del stored[f"{layer}.{damage}"]
    metadata = CONFIG | {"_quantization_metadata": json.dumps({"layers": markers})}
    save_file(stored, tmp_path / "m.safetensors", metadata)
    message = refusal(tmp_path / "m.safetensors")
    assert layer in message and words in message


def test_damaged_markers_and_scales(tmp_path, plain):
    stored, _ = quantize(plain, "marked", torch.float8_e4m3fn)
    broken = {**stored, "layers.0.attention.qkv.comfy_quant": torch.tensor([123], dtype=torch.uint8)}
    assert "comfy_quant is damaged" in refusal(written(tmp_path, broken, "marked", torch.float8_e4m3fn))
    for layout in ("marked", "header"):
        unscaled, _ = quantize(plain, layout, torch.float8_e4m3fn)
        del unscaled["layers.0.attention.qkv.weight_scale"]
        message = refusal(written(tmp_path, unscaled, layout, torch.float8_e4m3fn))
        assert "layers.0.attention.qkv.weight is quantized as" in message and "weight_scale is missing" in message
    broken = {**stored, "layers.0.attention.qkv.weight_scale": torch.ones(7)}
    message = refusal(written(tmp_path, broken, "marked", torch.float8_e4m3fn))
    assert "weight_scale has shape [7], expected one number or 576" in message


def test_a_scale_without_a_weight_is_left_over(tmp_path, plain):
    path = written(
        tmp_path, {**plain, "layers.9.attention.qkv.weight_scale": torch.ones(1)}, "alone", torch.float8_e5m2
    )
    assert "unknown layers.9.attention.qkv.weight_scale" in refusal(path)
