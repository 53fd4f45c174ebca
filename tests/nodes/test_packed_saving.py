"""Quantized models in ComfyUI's stock nodes: merges compute what they say, and what is saved is what samples."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.weights.snapshot import open_component

from .test_packed import CONFIGS, NANO, encoder_of, file_of, loaded, predict, reference, relative

FORMS = ["marked", "int8_tensorwise convrot", "nvfp4", "gguf"]
# what quantizing again costs (4 bits most), and bfloat16 where a format can't be made anew
AGAIN = {"marked": 0.15, "int8_tensorwise convrot": 0.05, "nvfp4": 0.5, "gguf": 0.01}
LAYERS = ("layers.0.attention.to_k", "layers.1.feed_forward.w1", "layers.2.attention.to_v")
PARTLY = 0.3


@pytest.fixture(scope="module")
def stock(pack) -> SimpleNamespace:
    """ComfyUI's own nodes."""
    importlib.import_module("utils.install_util")  # as its server does: its nodes hide this folder afterwards
    merging = importlib.import_module("comfy_extras.nodes_model_merging")
    extract = importlib.import_module("comfy_extras.nodes_lora_extract")
    return SimpleNamespace(**vars(merging), LoraSave=extract.LoraSave)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "marked" else pytest.mark.slow) for name in FORMS]
)
def form(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(form, tmp_path_factory) -> Path:
    with torch.inference_mode(False):
        return file_of(tmp_path_factory.mktemp("saving"), form)


@pytest.fixture
def out(pack, tmp_path):
    """ComfyUI's output folder."""
    folder_paths = importlib.import_module("folder_paths")
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path / "out"))
    yield tmp_path / "out"
    folder_paths.set_output_directory(before)


@pytest.fixture
def lora(loras) -> dict[str, torch.Tensor]:
    """Module -> its change of the weight, in the file l.safetensors."""
    generator, stored, changes = torch.Generator().manual_seed(0), {}, {}
    for module in LAYERS:
        down = 0.3 * torch.randn(8, 192, generator=generator)
        up = 0.3 * torch.randn(512 if "w1" in module else 192, 8, generator=generator)
        stored |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up}
        changes[module] = up @ down
    save_file(stored, loras / "l.safetensors")
    return changes


def with_lora(pack, patcher):
    return pack.lora.ZImageLoraLoader.execute(patcher, "l.safetensors", 1.0).args[0]


def save(node, out: Path, *models) -> Path:
    """The file that a saving node makes of them; the nano model is told from its configuration."""
    extra = {name: json.loads(config) for name, config in CONFIGS.items()}
    node().save(*models, "test/saved", extra_pnginfo=extra)
    return sorted((out / "test").glob("*.safetensors"))[-1]


# Models


def test_a_saved_model_is_the_file_that_it_came_from(pack, stock, out, path, form):
    patcher = pack.bridge.model.load_model(path)
    before = predict(loaded(patcher))
    again = pack.bridge.model.load_model(save(stock.ModelSave, out, patcher))
    assert relative(predict(loaded(again)), before) <= (AGAIN[form] if form == "gguf" else 0)


@pytest.mark.parametrize("share", [None, PARTLY])
def test_a_saved_model_has_its_lora(pack, stock, out, path, form, lora, share, monkeypatch):
    changed = with_lora(pack, pack.bridge.model.load_model(path))
    loaded(changed, share)
    if share is not None:  # saving would load the rest
        monkeypatch.setattr(importlib.import_module("comfy.model_management"), "load_models_gpu", lambda *_, **__: None)
    file = save(stock.ModelSave, out, changed)
    monkeypatch.undo()
    found = open_component(file, "transformer").state_dict(torch.float32)
    before = open_component(path, "transformer").state_dict(torch.float32)
    for module, change in lora.items():
        layer, _, part = module.partition(".to_")
        name = f"{layer}.qkv.weight" if part else f"{module}.weight"
        rows = {"k": slice(192, 384), "v": slice(384, 576)}.get(part, slice(None))
        assert relative(found[name][rows], before[name][rows] + change) <= AGAIN[form]
        assert relative(change, before[name][rows] + change) > 0.5
    unchanged = "layers.0.feed_forward.w2.weight"
    assert relative(found[unchanged], before[unchanged]) <= (5e-3 if form == "gguf" else 0)
    changed.detach()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kinds", ["quantized and plain", "plain and quantized", "both quantized"])
def test_merges_are_those_of_the_expanded_weights(pack, stock, out, path, form, kinds):
    if form not in ("marked", "gguf") or (form, kinds) == ("gguf", "plain and quantized"):
        pytest.skip("the others merge by the same steps")

    def pair(quantized):
        plain = pack.bridge.model.load_model(NANO, torch.float32)
        plain.model.diffusion_model.get_parameter("layers.0.attention.qkv.weight").data.mul_(3)
        return {
            "quantized and plain": lambda: (quantized(), plain),
            "plain and quantized": lambda: (plain, quantized()),
            "both quantized": lambda: (quantized(), quantized()),
        }[kinds]()

    ours, exact = pair(lambda: pack.bridge.model.load_model(path)), pair(lambda: reference(pack, path))
    merged, right = (stock.ModelMergeBlocks().merge(*two, input=0.3, layers=0.6)[0] for two in (ours, exact))
    assert relative(predict(loaded(merged)), predict(loaded(right))) <= 1e-5
    merged, right = (stock.ModelAdd().merge(*two)[0] for two in (ours, exact))
    found = predict(loaded(merged))
    assert relative(found, predict(loaded(right))) <= 1e-5
    again = pack.bridge.model.load_model(save(stock.ModelSave, out, merged))
    assert relative(predict(loaded(again)), found) <= 2 * AGAIN[form]
    assert relative(predict(loaded(ours[0])), found) > 0.5


@pytest.mark.one_in(2)
@pytest.mark.parametrize("share", [None, PARTLY])
def test_a_lora_is_extracted_from_what_the_weights_mean(pack, stock, out, path, form, lora, share, monkeypatch):
    difference = stock.ModelSubtract().merge(
        with_lora(pack, pack.bridge.model.load_model(path)), pack.bridge.model.load_model(path), 1.0
    )[0]
    loaded(difference, share)
    if share is not None:
        monkeypatch.setattr(importlib.import_module("comfy.model_management"), "load_models_gpu", lambda *_, **__: None)
    stock.LoraSave.execute("test/lora", 8, "standard", True, difference)
    stored = load_file(next((out / "test").glob("lora*.safetensors")))
    layer = "diffusion_model.layers.1.feed_forward.w1"
    found = stored[f"{layer}.lora_up.weight"].float() @ stored[f"{layer}.lora_down.weight"].float()
    assert relative(found, lora["layers.1.feed_forward.w1"]) < 0.15  # the node cuts its largest values off
    difference.detach()


def test_a_checkpoint_holds_quantized_model_and_encoder(pack, stock, out, path, form, lora, tmp_path):
    with torch.inference_mode(False):
        encoder = encoder_of(tmp_path, "gguf" if form == "gguf" else "old")
    model, clip = with_lora(pack, pack.bridge.model.load_model(path)), pack.bridge.clip.load_clip(encoder)
    before, features = predict(loaded(model)), encoded(clip)
    file = save(stock.CheckpointSave, out, model, clip, pack.bridge.vae.ZImageVAE(NANO))
    assert relative(encoded(pack.bridge.clip.load_clip(file)), features) <= 0.02
    assert relative(predict(loaded(pack.bridge.model.load_model(file))), before) <= AGAIN[form]


# Text encoders


def encoded(clip) -> torch.Tensor:
    loaded(clip.patcher)
    return clip.cond_stage_model.encoder(torch.tensor([[5, 0, 17, 639, 3]]), dtype=torch.float32)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("encoder", ["old", "gguf"])
def test_merged_text_encoders_are_saved_as_they_encode(pack, stock, out, tmp_path, encoder):
    with torch.inference_mode(False):
        file = encoder_of(tmp_path, encoder)

    def quantized():
        return pack.bridge.clip.load_clip(file)

    def plain():
        clip = pack.bridge.clip.load_clip(NANO, torch.float32)
        clip.cond_stage_model.encoder.get_parameter("model.layers.0.mlp.up_proj.weight").data.mul_(3)
        return clip

    exact = pack.bridge.clip.load_clip(NANO, torch.float32)
    exact.cond_stage_model.encoder.load_state_dict(
        open_component(file, "text_encoder").whole().state_dict(torch.float32)
    )
    merge = stock.CLIPMergeSimple().merge
    merged, other, right = (
        merge(*pair, 0.5)[0] for pair in ((quantized(), plain()), (plain(), quantized()), (exact, plain()))
    )
    found = encoded(merged)
    assert relative(found, encoded(right)) <= 1e-5
    assert relative(encoded(other), encoded(right)) <= 1e-5
    again = encoded(pack.bridge.clip.load_clip(save(stock.CLIPSave, out, merged)))
    limit = 0.01 if encoder == "gguf" else 0.15
    assert relative(again, found) <= limit
    assert relative(encoded(quantized()), found) > 2 * limit


# Hooks


@pytest.mark.parametrize("form", ["marked", "gguf"])
def test_hooks_change_quantized_weights_for_their_steps(pack, tmp_path, lora, loras, form):
    hooks = importlib.import_module("comfy.hooks")
    with torch.inference_mode(False):
        path = file_of(tmp_path, form)
    patcher = pack.bridge.model.load_model(path)
    before = predict(loaded(patcher))
    right = predict(loaded(with_lora(pack, pack.bridge.model.load_model(path))))
    hooked, _, group = hooks.load_hook_lora_for_models(patcher, None, load_file(loras / "l.safetensors"), 1.0, 0.0)
    loaded(hooked)
    for _ in range(2):  # the second time from ComfyUI's memory of them
        hooked.apply_hooks(group)
        assert relative(predict(hooked.model), right) <= 1e-5
        hooked.apply_hooks(None)
        assert torch.equal(predict(hooked.model), before)
    assert torch.equal(predict(loaded(hooked)), before)
