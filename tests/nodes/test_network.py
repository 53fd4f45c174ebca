"""The loaders' `network`: weights of any format in ComfyUI's own classes, for packs that reach inside of them."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from .. import gguf_writing
from ..helpers import NANO, relative
from . import native_model, test_model
from .test_model import conditioning, predict, sample

inputs = test_model.inputs
NETWORKS = ("ComfyUI-ZImage", "ComfyUI")
FORMATS = ["bfloat16", "float8", "gguf", "snapshot"]
TEXT = "a red circle on a blue background"


def stored(component: str, form: str, folder):
    """The nano component in a file of this format."""
    if form == "snapshot":
        return NANO
    (path,) = (NANO / component).glob("*.safetensors")
    plain, config = load_file(path), (NANO / component / "config.json").read_text()
    config = {f"zimage.{component}.config": config}
    path = folder / f"{component}.{'gguf' if form == 'gguf' else 'safetensors'}"
    if form == "gguf":
        plain = {name: weight.float() if weight.ndim == 1 else weight for name, weight in plain.items()}
        kind = "qwen3" if component == "text_encoder" else "lumina2"
        gguf_writing.write(path, plain, gguf_writing.linear_weights("Q8_0"), strings=config, architecture=kind)
    elif form == "float8":
        for name in [name for name in plain if ".feed_forward." in name or "_proj." in name]:
            scale = plain[name].float().abs().max().clamp(min=1e-6) / 448
            plain[name] = (plain[name].float() / scale).to(torch.float8_e4m3fn)
            plain[name.removesuffix(".weight") + ".scale_weight"] = scale
        save_file(plain, path, config)
    else:
        save_file(plain, path, config)
    return path


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", FORMATS)
def test_transformers_of_every_format(pack, comfy, inputs, tmp_path, form):
    path = stored("transformer", form, tmp_path)
    ours = pack.bridge.model.load_model(path)
    native = pack.bridge.model.load_model(path, network="ComfyUI")
    lumina = importlib.import_module("comfy.ldm.lumina.model")
    assert type(native.model.diffusion_model) is lumina.NextDiT
    assert type(native.model).__name__ == "Lumina2"
    comfy.model_management.load_models_gpu([ours, native])
    assert relative(predict(ours, inputs, native), predict(ours, inputs)) <= (1e-2 if form == "gguf" else 1e-4)
    text = conditioning(pack, TEXT)
    assert relative(sample(pack, native, text), sample(pack, ours, text)) <= (0.05 if form == "gguf" else 1e-3)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", FORMATS)
def test_text_encoders_of_every_format(pack, tmp_path, form):
    path = stored("text_encoder", form, tmp_path)
    ours, native = (pack.bridge.clip.load_clip(path, network=name) for name in NETWORKS)
    llama = importlib.import_module("comfy.text_encoders.llama")
    assert isinstance(native.cond_stage_model.qwen3_4b.transformer, llama.Qwen3_4B)
    tokens = pack.bridge.clip.load_clip(NANO).tokenize(TEXT)  # of ids in its vocabulary
    found, expected = (clip.encode_from_tokens_scheduled(tokens)[0][0] for clip in (native, ours))
    assert relative(found, expected) <= (1e-2 if form == "gguf" else 1e-5)


def test_loras_and_patchers_of_it(pack, comfy, inputs):
    """A LoRA takes effect as on ours, and where ComfyUI builds the model anew it builds the same."""
    ours, native = (pack.bridge.model.load_model(NANO, torch.float32, network=name) for name in NETWORKS)
    lora = {}
    for name, weight in ours.model.diffusion_model.named_parameters():
        if name.endswith("out.weight"):
            for part, shape in (("lora_B", (len(weight), 2)), ("lora_A", (2, weight.shape[1]))):
                generator = torch.Generator().manual_seed(len(lora))
                lora[f"diffusion_model.{name[:-7]}.{part}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    with_lora = [comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0] for model in (ours, native)]
    comfy.model_management.load_models_gpu(with_lora)
    found = [predict(ours, inputs, model) for model in with_lora]
    assert relative(*found) <= 1e-4
    comfy.model_management.load_models_gpu([ours, native])
    assert relative(found[0], predict(ours, inputs)) > 1e-3
    call, arguments = native.cached_patcher_init
    again = call(*arguments, disable_dynamic=True)
    assert type(again.model.diffusion_model) is type(native.model.diffusion_model)
    assert relative(predict(ours, inputs, again), predict(ours, inputs)) <= 1e-4


def test_it_is_what_comfyui_itself_builds(pack, comfy):
    """The same modules, in the same order, with the same settings."""
    native = pack.bridge.model.load_model(NANO, torch.float32, network="ComfyUI")
    expected = native_model.like(comfy, pack.bridge.model.load_model(NANO, torch.float32))
    names = [(name, type(part).__name__) for name, part in native.model.diffusion_model.named_modules()]
    assert names == [(name, type(part).__name__) for name, part in expected.model.diffusion_model.named_modules()]
    settings = native.model.model_config.unet_config
    assert {key: settings[key] for key in expected.model.model_config.unet_config} == (
        expected.model.model_config.unet_config
    )


def test_compile_is_for_ours(pack):
    with pytest.raises(ValueError, match="compile is for the network 'ComfyUI-ZImage'.*TorchCompileModel"):
        pack.bridge.model.load_model(NANO, compiled=True, network="ComfyUI")
