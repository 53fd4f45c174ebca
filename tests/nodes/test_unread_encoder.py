"""Weights of a text encoder that have to be converted stay in the file until they are needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.weights.snapshot import Snapshot

from .. import gguf_writing
from ..helpers import NANO
from ..poisoning import poison
from .prompts import TEXT, encode, is_loaded, restart, write_lora

CONFIG = {"zimage.text_encoder.config": (NANO / "text_encoder" / "config.json").read_text()}
CPU = torch.device("cpu")


def converted(form: str, folder: Path) -> Path:
    """The nano text encoder in a file whose weights, or some of them, are not held as they are stored."""
    plain = load_file(NANO / "text_encoder" / "model.safetensors")
    path = folder / ("q.gguf" if form == "gguf" else "q.safetensors")
    if form == "gguf":
        plain = {name: weight.float() if weight.ndim == 1 else weight for name, weight in plain.items()}
        gguf_writing.write(path, plain, gguf_writing.linear_weights("Q8_0"), strings=CONFIG, architecture="qwen3")
    elif form == "fp8 without scales":
        save_file({name: weight.to(torch.float8_e4m3fn) for name, weight in plain.items()}, path, CONFIG)
    elif form == "fp8":
        stored = dict(plain)
        for name in plain:  # the table becomes bfloat16, one projection stays it, and is held in float32
            if name.endswith(("proj.weight", "embed_tokens.weight")) and "layers.0.mlp.up" not in name:
                scale = plain[name].float().abs().max().clamp(min=1e-6) / 448
                stored[name] = (plain[name].float() / scale).to(torch.float8_e4m3fn)
                stored[name.replace(".weight", ".scale_weight")] = scale
        save_file(stored, path, CONFIG)
    else:
        save_file(plain, path, CONFIG)
    return path


@pytest.fixture(
    params=["fp8", "gguf", *(pytest.param(form, marks=pytest.mark.slow) for form in ("fp8 without scales", "float32"))]
)
def load(pack, tmp_path, request, monkeypatch):
    """A function that loads the encoder, and the file."""
    with torch.inference_mode(False):
        path = converted(request.param, tmp_path)
    # of ids in its vocabulary; Qwen's, which a file alone gets, takes a second
    monkeypatch.setattr(pack.bridge.clip, "_tokenizer", lambda _path: Snapshot(NANO).tokenizer())

    def load(**settings):
        return pack.bridge.clip.load_clip(path, torch.float32 if request.param == "float32" else None, **settings)

    return SimpleNamespace(load=load, path=path, form=request.param)


def unread(clip) -> int:
    """How many weights have no values yet."""
    return len(unread_names(clip))


def unread_names(clip) -> set[str]:
    with clip.cond_stage_model.names_suffice():
        weights = dict(clip.cond_stage_model.named_parameters())
    return {name.removeprefix("qwen3_4b.transformer.") for name, weight in weights.items() if weight.is_meta}


def test_only_weights_that_are_converted_are_left_in_the_file(load):
    clip = load.load()
    left = unread_names(clip)
    names = {name.removeprefix("qwen3_4b.transformer.") for name, _ in clip.cond_stage_model.named_parameters()}
    expected = {
        "fp8": {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"},
        "gguf": {name for name in names if name.endswith("norm.weight")},
    }
    assert left == expected.get(load.form, names)


def test_converted_weights_are_not_read_for_a_known_prompt(pack, comfy, load):
    clip = load.load()
    size, count = clip.patcher.model_size(), unread(clip)
    assert count > 0
    features = encode(pack, clip)
    assert unread(clip) == 0 and features.isfinite().all()
    assert comfy.model_management.module_size(clip.cond_stage_model) == size  # ComfyUI reckoned with the right size
    restart(pack, comfy)
    if load.path.suffix == ".safetensors":
        poison(load.path)
    again = load.load()
    assert torch.equal(encode(pack, again), features)
    assert unread(again) == count and not is_loaded(comfy, again)
    load.path.unlink()
    with pytest.raises(ValueError, match="the file has changed since it was opened; queue the prompt again"):
        encode(pack, again, "another prompt")


def test_lora_goes_onto_an_encoder_that_is_not_read(pack, load, loras):
    write_lora(loras / "l.safetensors")
    transformer = pack.bridge.model.load_model(NANO)

    def with_lora(clip):
        return pack.lora.ZImageLoraLoader.execute(transformer, "l.safetensors", 1.0, clip=clip).args[1]

    read, clip = load.load(), load.load()
    encode(pack, read, cache=False)
    changed = with_lora(clip)
    assert unread(clip) > 0
    assert torch.equal(encode(pack, changed), encode(pack, with_lora(read), cache=False))
    assert unread(clip) == 0
    assert torch.equal(encode(pack, clip), encode(pack, read, cache=False))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "use",
    [
        lambda clip: clip.patcher.get_key_patches("qwen3_4b.transformer.model.embed_tokens"),
        lambda clip: clip.patcher.model_state_dict(),
        lambda clip: clip.cond_stage_model.state_dict(),
        lambda clip: clip.patcher.patch_weight_to_device("qwen3_4b.transformer.model.layers.0.input_layernorm.weight"),
        lambda clip: clip.cond_stage_model.to(CPU),
        lambda clip: list(clip.cond_stage_model.parameters()),
        lambda clip: clip.cond_stage_model.encoder,
        lambda clip: clip.load_model(),
        lambda clip: clip.clone().load_model(),
        lambda clip: clip.patcher.detach(),
    ],
    ids="key patches|state dict|model's state dict|patch|to|parameters|encoder|load|load a clone|detach".split("|"),
)
def test_who_needs_weights_gets_their_values(pack, load, use):
    read, clip = load.load(), load.load()
    encode(pack, read, cache=False)
    clip.patcher.model_size()
    assert unread(clip) > 0
    use(clip)
    assert unread(clip) == 0
    expected = dict(read.cond_stage_model.named_parameters())
    for name, parameter in clip.cond_stage_model.named_parameters():
        assert parameter.dtype == expected[name].dtype, name
        assert torch.equal(_plain(parameter), _plain(expected[name])), name


def _plain(weight: torch.Tensor) -> torch.Tensor:
    return (weight.dequantize() if type(weight.data).__name__ == "QuantizedTensor" else weight).float()


def test_a_saved_encoder_has_its_values(pack, load):
    clip, read = load.load(), load.load()
    if not hasattr(clip, "state_dict_for_saving"):
        pytest.skip("this host loads an encoder before it is saved")
    encode(pack, read, cache=False)
    saved, expected = clip.state_dict_for_saving(), read.state_dict_for_saving()
    assert unread(clip) == 0 and saved.keys() == expected.keys() and len(saved) > 30


def test_partly_loaded_at_first(pack, load):
    read, clip = load.load(), load.load()
    expected = encode(pack, read, cache=False)
    clip.patcher.load(CPU, lowvram_model_memory=clip.patcher.model_size() // 2)
    assert clip.cond_stage_model.model_lowvram and unread(clip) == 0
    clip.cond_stage_model.set_clip_options({"execution_device": CPU})
    again, *_ = clip.cond_stage_model.encode_token_weights(clip.tokenize(TEXT))
    assert torch.allclose(again, expected, atol=1e-6)
    clip.patcher.detach()


def test_a_patcher_to_be_taken_apart_has_its_values(load):
    assert unread(load.load(disable_dynamic=True)) == 0


def test_weights_that_stay_as_they_are_are_mapped_at_once(pack, model):
    assert unread(pack.bridge.clip.load_clip(model)) == 0


def test_the_patcher_is_comfyuis_own(load):
    """Who knows of a weight that is not read is the model alone; quantized ones have a patcher for their own sake."""
    kind, *others = type(load.load().patcher).__mro__
    assert kind.__module__ == "comfy.model_patcher" or kind.__name__ == f"Packed{others[1].__name__}"
