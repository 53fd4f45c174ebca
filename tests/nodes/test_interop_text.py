"""ComfyUI's own text nodes, and what other packs hand to a CLIP, do to ours what they do to the native one."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..helpers import NANO, relative
from . import native_model
from .stock import run

TEXT = "two green stars on a white background"


@pytest.fixture(scope="module")
def clips(pack, comfy):
    """(ours, native) of the same weights."""
    with torch.inference_mode():
        ours = pack.bridge.clip.load_clip(NANO, torch.float32)
        generator = torch.Generator().manual_seed(8)
        network = ours.cond_stage_model.encoder.model
        for weight in (*network.layers[-1].parameters(), network.norm.weight):  # the nano model's are zeros and ones
            weight.copy_(weight + 0.1 * torch.randn(weight.shape, generator=generator))
        return ours, native_model.clip_like(comfy, ours, NANO)


@pytest.fixture
def embedding():
    """The name of an embedding that prompts may name, of three tokens."""
    folder_paths = importlib.import_module("folder_paths")
    path = Path(folder_paths.get_folder_paths("embeddings")[0]) / "zimage_test_word.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"qwen3_4b": torch.randn(3, 128, generator=torch.Generator().manual_seed(5))}, path)
    yield path.stem
    path.unlink()


def encoded(clip, tokens):
    ((features, extra),) = clip.encode_from_tokens_scheduled(tokens)
    return features, extra["attention_mask"]


def weighted(clip, text, weight):
    """As nodes that read weights hand them over."""
    (row,) = clip.tokenize(text)["qwen3_4b"]
    return {"qwen3_4b": [[(token, weight if 5 <= place < 8 else 1.0) for place, (token, _) in enumerate(row)]]}


PROMPTS = {
    "plain": lambda clip: clip.tokenize(TEXT),
    "escaped brackets": lambda clip: clip.tokenize("a star \\(green\\), and (this:1.3) (that)"),
    "embedding": lambda clip: clip.tokenize("a star embedding:zimage_test_word, in the middle"),
    "no such embedding": lambda clip: clip.tokenize("a star embedding:none in the middle"),
    "word ids": lambda clip: clip.tokenize("a star", return_word_ids=True),
    "weights": lambda clip: weighted(clip, TEXT, 1.4),
    "negative weights": lambda clip: weighted(clip, TEXT, -1.0),
    "chunks": lambda clip: {"qwen3_4b": 2 * clip.tokenize(TEXT)["qwen3_4b"]},
    "token for padding": lambda clip: {
        "qwen3_4b": [[*clip.tokenize(TEXT)["qwen3_4b"][0], (clip_pad(clip), 1.0), (7, 1.0)]]
    },
    "tensor": lambda clip: {
        "qwen3_4b": [[*clip.tokenize(TEXT)["qwen3_4b"][0][:4], (torch.linspace(-1, 1, 128), 1.0), (9, 1.0)]]
    },
}


def clip_pad(clip):
    return clip.tokenizer.qwen3_4b.pad_token


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_of_every_kind(clips, embedding, name):
    ours, native = (PROMPTS[name](clip) for clip in clips)
    assert [[token[1:] for token in row] for row in ours["qwen3_4b"]] == [
        [token[1:] for token in row] for row in native["qwen3_4b"]
    ]
    (found, mask), (expected, native_mask) = (
        encoded(clip, tokens) for clip, tokens in zip(clips, (ours, native), strict=True)
    )
    assert found.shape == expected.shape and torch.equal(mask, native_mask)
    assert relative(found, expected) <= 1e-5


# Those for several encoders (Flux, SDXL, SD3, HiDream, Hunyuan) ask the tokens for another encoder: a KeyError natively
NODES = {
    "CLIPTextEncode": {"text": TEXT},
    "CLIPTextEncodeLumina2": {"system_prompt": "superior", "user_prompt": TEXT},
    "TextEncodeZImageOmni": {"prompt": TEXT, "auto_resize_images": True},
    "CLIPTextEncodeControlnet": {"conditioning": [], "text": TEXT},
}


@pytest.mark.parametrize("name", NODES)
def test_text_nodes(clips, name):
    found, expected = (run(name, clip=clip, **NODES[name])[0] for clip in clips)
    assert len(found) == len(expected)
    for (ours, extra), (native, native_extra) in zip(found, expected, strict=True):
        assert relative(ours, native) <= 1e-5 and extra.keys() == native_extra.keys()


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_layers(clips, layer):
    found, expected = (
        encoded(clip, clip.tokenize(TEXT))[0]
        for clip in (run("CLIPSetLastLayer", clip=c, stop_at_clip_layer=layer)[0] for c in clips)
    )
    assert relative(found, expected) <= 1e-5


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "mode", "length"),
    [("TextGenerate", "on", 12), ("TextGenerate", "off", 12), ("TextGenerateLTX2Prompt", "on", 4)],  # long template
)
def test_generated_text(clips, name, mode, length):
    sampled = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1, "seed": 3}
    mode = {"sampling_mode": mode, **(sampled if mode == "on" else {})}
    found, expected = (run(name, clip=clip, prompt=TEXT, max_length=length, sampling_mode=mode)[0] for clip in clips)
    assert found == expected


def test_a_long_text_to_go_on_with_is_not_cut(clips):
    tokens = clips[0].tokenize("a red circle " * 400, skip_template=False, min_length=1)
    assert tokens == clips[1].tokenize("a red circle " * 400, skip_template=False, min_length=1)
    assert len(tokens["qwen3_4b"][0]) > 512


def test_the_whole_encoder_is_saved(clips):
    ours, native = clips
    saved = ours.state_dict_for_saving() if hasattr(ours, "state_dict_for_saving") else ours.get_sd()
    expected = native.get_sd()
    missing = expected.keys() - saved.keys()
    assert missing == {"qwen3_4b.logit_scale"}, missing  # of CLIP models, which nothing computes with here
    assert all(torch.equal(tensor.float(), expected[name]) for name, tensor in saved.items())


def test_a_file_without_the_last_layer_makes_features_but_no_text(pack, tmp_path):
    whole = load_file(NANO / "text_encoder" / "model.safetensors")
    cut = {name: tensor for name, tensor in whole.items() if "layers.3." not in name}
    config = {"zimage.text_encoder.config": (NANO / "text_encoder" / "config.json").read_text()}
    save_file(cut, tmp_path / "cut.safetensors", config)
    clip = pack.bridge.clip.load_clip(tmp_path / "cut.safetensors", torch.float32)
    reference = pack.bridge.clip.load_clip(NANO, torch.float32)
    clip.tokenizer, clip.cond_stage_model.pad = reference.tokenizer, reference.cond_stage_model.pad
    for tokens in (clip.tokenize(TEXT), weighted(clip, TEXT, 1.4)):
        assert relative(encoded(clip, tokens)[0], encoded(reference, tokens)[0]) <= 1e-5
    with pytest.raises(ValueError, match="lacks the last layer or the final norm, without which it can't generate"):
        clip.generate(clip.tokenize(TEXT))
    clip.clip_layer(-1)
    with pytest.raises(ValueError, match="stop_at_clip_layer is -1, but the file of this text encoder lacks"):
        encoded(clip, clip.tokenize(TEXT))
