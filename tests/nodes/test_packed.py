"""Quantized files in ComfyUI: weights stay as the file has them, and LoRA and partial loading work on top, exactly."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_core.lora import apply
from zimage_core.lora import files as core_lora
from zimage_core.weights.snapshot import Snapshot, open_component

from .. import gguf_writing, process_memory
from ..helpers import NANO, relative
from ..quantizing import BLOCKS, block_quantize, quantize, with_markers

KINDS = ("transformer", "text_encoder")
CONFIGS = {f"zimage.{kind}.config": (NANO / kind / "config.json").read_text() for kind in KINDS}
CPU = torch.device("cpu")
PROMPT = "two red stars on a blue background"
FORMATS = ["old", "marked", *BLOCKS, "gguf", "gguf, diffusers names"]
OFTEN = {"marked", "nvfp4", "gguf"}  # one of each kind is in `make test`
# ComfyUI multiplies these in whole numbers of 8 or 4 bits, inputs included: how far off the image may then be
ROUNDED = {name: 0.5 if "w4a4" in name else 0.05 for name in BLOCKS if "int8" in name or "convrot" in name}


def file_of(folder: Path, form: str) -> Path:
    """The nano transformer in a quantized file."""
    if form.startswith("gguf"):
        native = Snapshot(NANO).transformer().state_dict()
        published = load_file(NANO / "transformer" / "diffusion_pytorch_model.safetensors")
        path = folder / "m.gguf"
        tensors = {name: value.clone() for name, value in (published if "diffusers" in form else native).items()}
        gguf_writing.write(path, tensors, gguf_writing.linear_weights("Q8_0"), strings=CONFIGS)
        return path
    plain = {name: value.clone() for name, value in Snapshot(NANO).transformer().state_dict().items()}
    if form in BLOCKS:
        stored, _, markers = block_quantize(plain, form)
        stored = with_markers(stored, markers)
    else:
        stored, _ = quantize(plain, form, torch.float8_e4m3fn)
    save_file(stored, folder / "m.safetensors", CONFIGS)
    return folder / "m.safetensors"


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in FORMATS]
)
def form(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(form, tmp_path_factory) -> Path:
    with torch.inference_mode(False):
        return file_of(tmp_path_factory.mktemp("packed"), form)


@pytest.fixture
def lora_file(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, rows, columns in (
        ("layers.0.attention.to_k", 192, 192),
        ("layers.1.feed_forward.w1", 512, 192),
        ("layers.2.attention.qkv", 576, 192),
    ):
        tensors[f"diffusion_model.{module}.lora_A.weight"] = 0.2 * torch.randn(8, columns, generator=generator)
        tensors[f"diffusion_model.{module}.lora_B.weight"] = 0.2 * torch.randn(rows, 8, generator=generator)
    save_file(tensors, tmp_path / "l.safetensors")
    folder_paths = importlib.import_module("folder_paths")
    before = list(folder_paths.get_folder_paths("loras"))
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    yield tmp_path / "l.safetensors"
    folder_paths.folder_names_and_paths["loras"][0][:] = before


def predict(model, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents, context = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 21, 128, generator=generator)
    return model.apply_model(latents, torch.tensor([0.7]), c_crossattn=context, num_tokens=21, transformer_options={})


def loaded(patcher, share: float | None = None):
    """The patcher's model on its device, whole or only so much of it."""
    management = importlib.import_module("comfy.model_management")
    if share is None:
        management.load_models_gpu([patcher])
    else:
        patcher.detach()
        patcher.load(CPU, lowvram_model_memory=int(patcher.model_size() * share))
        assert patcher.model.model_lowvram
    return patcher.model


def reference(pack, path: Path, lora_file: Path | None = None, strength: float = 1.0):
    """The same file expanded to float32 by the core, with the core's LoRA merged in float32, in ComfyUI."""
    component = open_component(path, "transformer")
    weights = component.state_dict(torch.float32)
    patcher = pack.bridge.model.load_model(NANO, torch.float32)
    if lora_file is not None:
        plain = Snapshot(NANO).transformer(dtype=torch.float32)
        plain.load_state_dict(weights)
        opened = core_lora.open_lora(lora_file, core_lora.shapes_of(transformer=plain))
        apply.add(plain, "transformer", [(opened, strength)])
        weights = plain.state_dict()
    patcher.model.diffusion_model.load_state_dict(weights)
    return patcher


def with_lora(pack, patcher, strength: float = 1.0):
    return pack.lora.ZImageLoraLoader.execute(patcher, "l.safetensors", strength).args[0]


def test_weights_stay_quantized_and_give_the_exact_result(pack, path, form):
    patcher = pack.bridge.model.load_model(path)
    assert type(patcher).__name__ == "PackedModelPatcher"
    packed = [m for m in patcher.model.modules() if type(getattr(m, "weight", None)).__name__ == "QuantizedTensor"]
    assert len(packed) >= 30
    for layer in packed:
        assert layer.weight.nbytes <= 1.1 * layer.weight.numel()
    ours, exact = predict(loaded(patcher)), predict(loaded(reference(pack, path)))
    plain = predict(loaded(pack.bridge.model.load_model(NANO, torch.float32)))
    assert relative(ours, exact) <= ROUNDED.get(form, 1e-5)
    assert 1e-4 < relative(ours, plain) < 0.6


def test_a_chosen_precision_expands_the_weights(pack, path):
    patcher = pack.bridge.model.load_model(path, torch.float32)
    assert {parameter.dtype for parameter in patcher.model.diffusion_model.parameters()} == {torch.float32}
    assert relative(predict(loaded(patcher)), predict(loaded(reference(pack, path)))) <= 1e-6


@pytest.mark.one_in(3)
@pytest.mark.parametrize("share", [None, 0.3, pytest.param(0.7, marks=pytest.mark.slow)])
def test_lora_is_exact_whole_or_partly_loaded_and_can_be_taken_off(pack, path, form, lora_file, share):
    patcher = pack.bridge.model.load_model(path)
    before = predict(loaded(patcher, share))
    bytes_before = _bytes(patcher.model)
    changed = with_lora(pack, patcher, 0.8)
    ours = predict(loaded(changed, share))
    exact = predict(loaded(reference(pack, path, lora_file, 0.8)))
    assert relative(ours, exact) <= ROUNDED.get(form, 1e-5)
    assert relative(ours, before) > 1e-2
    for name in ("layers.0.attention.qkv", "layers.1.feed_forward.w1"):
        layer = changed.model.diffusion_model.get_submodule(name)
        x = torch.randn(3, layer.in_features)
        merged = reference(pack, path, lora_file, 0.8).model.diffusion_model.get_parameter(f"{name}.weight")
        assert relative(layer(x), x @ merged.T) <= 1e-5  # also in formats whose other layers ComfyUI rounds
    changed.detach()
    assert torch.equal(predict(loaded(patcher, share)), before)
    assert _bytes(patcher.model) == bytes_before
    patcher.detach()


def test_partial_unloading_keeps_the_lora_once(pack, path, form, lora_file):
    changed = with_lora(pack, pack.bridge.model.load_model(path))
    whole = predict(loaded(changed))
    changed.partially_unload(CPU, changed.model_size() // 2)
    assert changed.model.model_lowvram
    assert relative(predict(changed.model), whole) <= ROUNDED.get(form, 1e-5)
    changed.partially_load(CPU, changed.model_size())
    assert relative(predict(changed.model), whole) <= ROUNDED.get(form, 1e-5)
    changed.detach()


def test_the_report_on_overlap_reads_quantized_weights(pack, path, lora_file):
    once = with_lora(pack, pack.bridge.model.load_model(path))
    report = pack.lora.ZImageLoraLoader.execute(once, "l.safetensors", 1.0).args[2]
    assert "with l.safetensors: cosine +1.00" in report


def _bytes(model) -> list[bytes]:
    weights = [m.weight for m in model.modules() if type(getattr(m, "weight", None)).__name__ == "QuantizedTensor"]
    return [weight._qdata.view(torch.uint8).numpy().tobytes() for weight in weights]


def test_formats_that_only_comfyui_knows_are_left_to_it(pack, tmp_path, monkeypatch):
    """A newer ComfyUI, played by this one: it has a format of which the core knows nothing."""
    ops, quant_ops = importlib.import_module("comfy.ops"), importlib.import_module("comfy.quant_ops")
    if not hasattr(ops, "_load_quantized_module") or "int8_tensorwise" not in quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI reads its formats elsewhere")
    with torch.inference_mode(False):
        known = file_of(tmp_path, "int8_tensorwise")
        stored = load_file(known)
        for name in [name for name in stored if name.endswith("comfy_quant")]:
            stored[name] = torch.tensor(list(b'{"format": "int8_next"}'), dtype=torch.uint8)
            scale = name.replace("comfy_quant", "weight_scale")
            stored[scale.replace("scale", "steps")] = stored.pop(scale)
        save_file(stored, tmp_path / "next.safetensors", CONFIGS)
    with pytest.raises(Exception, match="is quantized as 'int8_next', expected one of"):
        pack.bridge.model.load_model(tmp_path / "next.safetensors")

    def read(module, otherwise, state, prefix, *rest, **settings):
        if state.get(f"{prefix}weight_steps") is not None:
            state[f"{prefix}weight_scale"] = state.pop(f"{prefix}weight_steps")
            state[f"{prefix}comfy_quant"] = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
        return load(module, otherwise, state, prefix, *rest, **settings)

    load = ops._load_quantized_module
    monkeypatch.setattr(ops, "_load_quantized_module", read)
    monkeypatch.setitem(quant_ops.QUANT_ALGOS, "int8_next", quant_ops.QUANT_ALGOS["int8_tensorwise"])
    ours, theirs = (pack.bridge.model.load_model(file) for file in (tmp_path / "next.safetensors", known))
    assert torch.equal(predict(loaded(ours)), predict(loaded(theirs)))


# Text encoders


def encoder_of(folder: Path, form: str) -> Path:
    """The nano text encoder in a quantized file."""
    plain = load_file(NANO / "text_encoder" / "model.safetensors")
    path = folder / ("q.gguf" if form == "gguf" else "q.safetensors")
    if form == "gguf":
        gguf_writing.write(path, plain, gguf_writing.linear_weights("Q8_0"), strings=CONFIGS, architecture="qwen3")
        return path
    stored = dict(plain)
    for name in [name for name in plain if name.endswith("proj.weight")]:
        scale = plain[name].float().abs().max() / 448
        stored[name] = (plain[name].float() / scale.clamp(min=1e-9)).to(torch.float8_e4m3fn)
        stored[name.replace(".weight", ".scale_weight")] = scale
    save_file(stored, path, CONFIGS)
    return path


@pytest.mark.parametrize("form", ["old", "gguf"])
def test_text_encoders_stay_quantized(pack, tmp_path, form):
    with torch.inference_mode(False):
        path = encoder_of(tmp_path, form)
    component = open_component(path, "text_encoder")
    expanded = Snapshot(NANO).text_encoder(dtype=torch.float32)
    expanded.load_state_dict(component.state_dict(torch.float32))
    clip = pack.bridge.clip.load_clip(path)
    encoder = clip.cond_stage_model.encoder
    packed = [m for m in encoder.modules() if type(getattr(m, "weight", None)).__name__ == "QuantizedTensor"]
    assert len(packed) >= 20
    ids = torch.tensor([[5, 0, 17, 639, 3]])
    loaded(clip.patcher)
    found = encoder(ids, dtype=torch.float32)
    assert relative(found, expanded(ids)) <= 1e-5
    tokens = pack.bridge.clip.ZImageTokenizer(Snapshot(NANO).tokenizer()).tokenize_with_weights(PROMPT)
    assert clip.encode_from_tokens(tokens).shape == (1, len(tokens["qwen3_4b"][0]), 128)


def test_an_embedding_expands_only_the_rows_that_are_asked_for(pack):
    """A table of 152,000 rows of 256 in Q8_0: encoding one prompt makes no float table of it."""
    parts = 152_000, 256
    raw = torch.zeros(parts[0] * 8 * 34, dtype=torch.uint8)
    params = pack.bridge.quantized.GGUFLayout.Params(
        scale=None, orig_dtype=torch.float32, orig_shape=parts, parts=(("Q8_0", parts),)
    )
    table = pack.bridge.quantized.GGUFOperations.Embedding(*parts, device="meta")
    table.weight = torch.nn.Parameter(
        pack.bridge.quantized.QuantizedTensor(raw, pack.bridge.quantized.GGUF, params), requires_grad=False
    )
    ids = torch.tensor([[5, 151_999]])
    expected = table(ids)
    assert process_memory.growth(lambda: table(ids)) < 20e6
    table.weight_function.append(lambda weight: weight)  # a LoRA, say: that needs the whole table, 156 MB
    assert torch.equal(table(ids), expected)
    assert process_memory.tensors(lambda: table(ids)) > 140e6


def test_loaders_list_gguf_files(pack, tmp_path):
    folder_paths = importlib.import_module("folder_paths")
    before = list(folder_paths.get_folder_paths("diffusion_models"))
    folder_paths.add_model_folder_path("diffusion_models", str(tmp_path))
    try:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "z.gguf").write_bytes(b"")
        choice = next(name for name in pack.bridge.folders.model_choices("transformer") if name.endswith("z.gguf"))
        assert choice == "sub/z.gguf"
        assert pack.bridge.folders.model_path(choice, "transformer") == tmp_path / "sub" / "z.gguf"
        assert choice not in pack.bridge.folders.model_choices("vae")
    finally:
        folder_paths.folder_names_and_paths["diffusion_models"][0][:] = before
