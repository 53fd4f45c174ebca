"""The text encoder as ComfyUI uses it: the core's features, the token limit, other layers, LoRA, partial loading."""

from __future__ import annotations

import logging

import provision
import pytest
import torch

from zimage_core.pipeline import ZImagePipeline

from ..helpers import NANO

CPU = torch.device("cpu")
TEXT = "two green stars on a white background"


@pytest.fixture
def clip(pack):
    return pack.bridge.clip.load_clip(NANO, torch.float32)


def encode(clip, text: str = TEXT) -> torch.Tensor:
    """Features [1, N, width], through the call that the stock text node makes."""
    ((features, _extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return features


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "",
        "\u4e00\u53ea\u732b\u5750\u5728\u7a97\u53f0\u4e0a \U0001f408",
        "(very:1.3) [odd] {braces} anembedding:none",
    ],
)
def test_features_are_the_cores(clip, text):
    features = encode(clip, text)
    (core,) = ZImagePipeline.from_pretrained(NANO).encode_prompts([text])
    assert features.dtype == torch.float32 and features.shape == (1, *core.shape)
    assert ((features[0] - core).norm() / core.norm()).item() <= 1e-5


def test_conditioning_is_the_native_kind(clip):
    (features, extra), *rest = clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))
    assert not rest and extra["pooled_output"] is None
    assert extra["attention_mask"].shape == features.shape[:2] and extra["attention_mask"].all()


def test_a_prompt_beyond_the_limit_loses_its_end_and_the_log_says_so(pack, clip, caplog):
    text = "a red circle, " * 300 + "and a purple heart"
    with caplog.at_level(logging.WARNING):
        (conditioning,) = pack.conditioning.ZImageTextEncode.execute(clip=clip, text=text).args
    assert conditioning[0][0].shape[1] == 512
    (message,) = [record.getMessage() for record in caplog.records if "zimage_core" in record.name]
    assert "the limit is 512" in message and "a red circle" in message


def test_a_template_of_a_stock_node_is_used(clip):
    plain = clip.tokenize(TEXT)["qwen3_4b"][0]
    same = clip.tokenize(TEXT, llama_template="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
    bare = clip.tokenize(TEXT, llama_template="{}")["qwen3_4b"][0]
    assert same["qwen3_4b"][0] == plain
    assert len(bare) < len(plain)
    assert clip.decode([token for token, _ in bare]) == TEXT


def test_an_earlier_layer_can_be_asked_for_and_one_before_the_first_is_refused(clip):
    encoder = clip.cond_stage_model.encoder
    ids = torch.tensor([[token for token, _ in clip.tokenize(TEXT)["qwen3_4b"][0]]])
    states = []
    with encoder.model.layers[-3].register_forward_hook(lambda layer, given, made: states.append(made)):
        encoder(ids)
    usual = encode(clip)
    clip.clip_layer(-3)  # what CLIPSetLastLayer does
    assert torch.allclose(encode(clip), states[0], atol=1e-6)
    clip.clip_layer(-9)
    with pytest.raises(ValueError, match="stop_at_clip_layer is -9; .* Remove the node that sets it"):
        encode(clip)
    clip.clip_layer(-2)
    assert torch.equal(encode(clip), usual)


@pytest.mark.parametrize("share", [0.8, 0.4, 0.1])
def test_partly_loaded_encoder_gives_the_same(clip, share):
    whole = encode(clip)
    module, patcher = clip.cond_stage_model, clip.patcher
    patcher.detach()
    patcher.load(CPU, lowvram_model_memory=max(1, int(patcher.model_size() * share)))
    assert module.model_lowvram and patcher.loaded_size() < patcher.model_size()
    module.set_clip_options({"execution_device": CPU})
    again, *_ = module.encode_token_weights(clip.tokenize(TEXT))
    assert torch.allclose(again, whole, atol=1e-6)
    patcher.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_half_precision_compute_in_float32(pack, clip, dtype):
    small = pack.bridge.clip.load_clip(NANO, dtype)
    assert {parameter.dtype for parameter in small.cond_stage_model.parameters()} == {dtype}
    features = encode(small)
    assert features.dtype == torch.float32
    assert ((features - encode(clip)).norm() / features.norm()).item() < 1e-2


@pytest.mark.parametrize("prefix", ["text_encoders.qwen3_4b.transformer.model.", "lora_te_"], ids=["named", "kohya"])
def test_stock_lora_loading(comfy, clip, prefix):
    if prefix == "lora_te_" and provision.release(provision.newest()) == provision.OLDEST:
        pytest.skip(f"ComfyUI {provision.OLDEST} knows no kohya names of such an encoder")
    generator = torch.Generator().manual_seed(2)
    projection = clip.cond_stage_model.encoder.model.layers[1].mlp.down_proj
    weight = projection.weight.clone()
    up = 0.2 * torch.randn(weight.shape[0], 2, generator=generator)
    down = torch.randn(2, weight.shape[1], generator=generator)
    path = "layers.1.mlp.down_proj"
    stem = prefix + (path if "." in prefix else path.replace(".", "_"))
    plain = encode(clip)
    lora = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    _, with_lora = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, 1.0)
    changed = encode(with_lora)
    assert (changed - plain).norm() > 1e-2 * plain.norm()
    assert torch.equal(encode(clip), plain)  # the LoRA is gone again
    projection.weight = torch.nn.Parameter(weight + up @ down, requires_grad=False)
    expected = encode(clip)
    assert (changed - expected).norm() <= 1e-5 * expected.norm()


def test_encoding_without_an_encoder_says_what_to_connect(pack):
    with pytest.raises(ValueError, match="no text encoder in `clip`.* Connect a Load Z-Image Text Encoder node"):
        pack.conditioning.ZImageTextEncode.execute(clip=None, text=TEXT)
