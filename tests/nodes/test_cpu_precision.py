"""On a CPU weights of few bits compute in float32: expanded, and with LoRA on top, they are what the exact ones are."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from .. import gguf_writing
from ..helpers import NANO, ROOT, relative
from . import test_model
from .test_model import predict

inputs = test_model.inputs
CONFIG = {"zimage.transformer.config": (NANO / "transformer" / "config.json").read_text()}


@pytest.fixture
def plain():
    with torch.inference_mode(False):
        (path,) = (NANO / "transformer").glob("*.safetensors")
        return load_file(path)


def with_lora(comfy, model):
    tensors = comfy.utils.load_torch_file(str(ROOT / "nano" / "zimage_nano_moon.safetensors"))
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]


def test_gguf(pack, comfy, plain, inputs, tmp_path):
    generator = torch.Generator().manual_seed(3)
    for name, weight in plain.items():  # norms of more than 8 bits
        plain[name] = weight.float()
        if weight.ndim == 1:
            plain[name] += 0.01 * torch.rand(weight.shape, generator=generator)
    path = tmp_path / "q.gguf"
    gguf_writing.write(path, plain, gguf_writing.linear_weights("Q8_0"), strings=CONFIG, architecture="lumina2")
    packed, exact = pack.bridge.model.load_model(path), pack.bridge.model.load_model(path, torch.float32)
    for change in (lambda model: model, lambda model: with_lora(comfy, model)):
        models = [change(packed), change(exact)]
        comfy.model_management.load_models_gpu(models)
        assert relative(*(predict(packed, inputs, model) for model in models)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_lora(pack, comfy, plain, inputs, tmp_path, dtype):
    """As on the same weights in float32; they stay mapped, take no patch, and are saved with it."""
    for name, weight in plain.items():
        plain[name] = weight.to(dtype) if weight.ndim == 2 and "pad_token" not in name else weight
    save_file(plain, tmp_path / "narrow.safetensors", CONFIG)
    narrow = pack.bridge.model.load_model(tmp_path / "narrow.safetensors")
    exact = pack.bridge.model.load_model(tmp_path / "narrow.safetensors", torch.float32)
    stored = narrow.model.diffusion_model.layers[0].feed_forward.w1.weight
    assert stored.dtype == dtype
    models = [with_lora(comfy, model) for model in (narrow, exact)]
    comfy.model_management.load_models_gpu(models)
    found, expected = (predict(narrow, inputs, model) for model in models)
    assert relative(found, expected) <= 1e-5
    assert narrow.model.diffusion_model.layers[0].feed_forward.w1.weight.data_ptr() == stored.data_ptr()
    key = "diffusion_model.layers.0.attention.qkv.weight"
    merged = models[1].model.state_dict()[key]
    saved = {name: tensor.to("cpu") for name, tensor in models[0].model.state_dict().items() if name == key}
    if hasattr(models[0], "state_dict_for_saving"):
        state = models[0].state_dict_for_saving()
        (name,) = [name for name in state if name.endswith(key.removeprefix("diffusion_model."))]
        saved = {key: state[name].to("cpu")}
        assert relative(saved[key].float(), merged) <= (0.05 if dtype.itemsize == 1 else 5e-3)
        assert saved[key].dtype == dtype
    comfy.model_management.load_models_gpu([narrow, exact])
    assert relative(predict(narrow, inputs), predict(narrow, inputs, exact)) <= 1e-5
    assert relative(found, predict(narrow, inputs)) > 1e-3
