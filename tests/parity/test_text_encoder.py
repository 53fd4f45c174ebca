"""The Qwen3 encoder and the tokenizer against transformers."""

from __future__ import annotations

import random

import pytest
import tokenizers
import torch
import transformers

from zimage_core.model.tokenizer import PROMPT_TEMPLATE, Tokenizer
from zimage_core.weights.snapshot import Snapshot

from ..helpers import NANO, relative


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("lengths", [[8], [31, 31], [3, 70, 512]], ids=str)
def test_hidden_state(make_text_encoder, tmp_path, seed, lengths):
    reference = make_text_encoder(seed, layers=3 + seed)
    reference.save_pretrained(tmp_path / "text_encoder")
    ours = Snapshot(tmp_path).text_encoder()
    ids = torch.randint(0, 1024, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    with torch.no_grad():
        theirs = reference(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        mine = ours(ids)
        earlier = {layer: ours(ids, layer=layer) for layer in range(-3 - seed, -2)}
    assert relative(mine[mask], theirs[-2][mask]) <= 1e-5
    for layer, found in earlier.items():
        assert relative(found[mask], theirs[layer][mask]) <= 1e-5


def test_layers_that_are_not_needed_are_not_built(make_text_encoder, tmp_path):
    make_text_encoder(0, layers=4).save_pretrained(tmp_path / "text_encoder")
    names = [name for name, _ in Snapshot(tmp_path).text_encoder().named_parameters()]
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1", "2"}
    assert "model.norm.weight" not in names


def test_layers_that_are_not_there_are_refused(make_text_encoder, tmp_path):
    make_text_encoder(0, layers=3).save_pretrained(tmp_path / "text_encoder")
    encoder, ids = Snapshot(tmp_path).text_encoder(), torch.zeros(1, 4, dtype=torch.long)
    for layer in (-1, 0, 1, -4):
        with pytest.raises(ValueError, match=f"layer is {layer}, expected -3 to -2"):
            encoder(ids, layer=layer)


def test_bfloat16_is_no_further_from_float32_than_transformers(make_text_encoder, tmp_path):
    ours = theirs = 0.0
    for seed in range(4):
        reference = make_text_encoder(seed, layers=6)
        folder = tmp_path / str(seed)
        reference.save_pretrained(folder / "text_encoder")
        model = Snapshot(folder).text_encoder(dtype=torch.bfloat16)
        ids = torch.randint(0, 1024, (1, 100), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            exact = reference(ids, output_hidden_states=True).hidden_states[-2]
            rounded = reference.to(torch.bfloat16)(ids, output_hidden_states=True).hidden_states[-2]
            ours += relative(model(ids), exact)
            theirs += relative(rounded, exact)
    assert ours <= 1.1 * theirs


@pytest.fixture(scope="module", params=["nano", "qwen"])
def tokenizer_folder(request, tmp_path_factory):
    """The nano model's tokenizer, and Qwen's own vocabulary as ComfyUI ships it."""
    if request.param == "nano":
        return NANO / "tokenizer"
    source = request.getfixturevalue("comfyui_path") / "comfy" / "text_encoders" / "qwen25_tokenizer"
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.Qwen2Tokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_token_ids(tokenizer_folder):
    ours = Tokenizer(tokenizer_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    strings = prompts()
    assert len(strings) >= 200
    for text in strings:
        # the chat template is written out: ComfyUI's copy of the tokenizer has none
        templated = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        expected = theirs(templated, max_length=512, truncation=True)["input_ids"]
        assert ours(text) == expected, text


def test_the_file_says_all_that_transformers_knows():
    """Transformers 4 adds nothing to what is in tokenizer.json, 5 does."""
    ours, alone = Tokenizer(NANO / "tokenizer"), tokenizers.Tokenizer.from_file(str(NANO / "tokenizer/tokenizer.json"))
    for text in prompts():
        assert ours(text, 100_000) == alone.encode(PROMPT_TEMPLATE.format(text), add_special_tokens=False).ids


def test_template_is_the_tokenizers_own():
    theirs = transformers.AutoTokenizer.from_pretrained(NANO / "tokenizer")
    ours = Tokenizer(NANO / "tokenizer")
    for text in prompts()[:50]:
        messages = [{"role": "user", "content": text}]
        templated = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        assert ours(text, 100_000) == theirs(templated)["input_ids"]


def test_a_cut_prompt_is_reported(caplog):
    ours = Tokenizer(NANO / "tokenizer")
    text = "red circle " * 400 + "THE LOST END"
    with caplog.at_level("WARNING"):
        assert len(ours(text)) == 512
    assert "the limit is 512" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        whole = ours(text, max_length=10_000)
        assert len(whole) > 512
        ours("a red circle")
    assert not caplog.records


def prompts() -> list[str]:
    """240 strings: what people write, other scripts, emoji, control text, and random characters."""
    fixed = [
        "",
        " ",
        "\n",
        "A cat sitting on a windowsill",
        "two red stars on a blue background",
        "\u4e00\u53ea\u5750\u5728\u7a97\u53f0\u4e0a\u7684\u732b,\u6c34\u58a8\u753b\u98ce\u683c",
        "\u9713\u8679\u706f\u62db\u724c\u4e0a\u5199\u7740“\u4f60\u597d,\u4e16\u754c”",
        "\u732b\u3068\u3072\u307e\u308f\u308a\u3001\u6d6e\u4e16\u7d75",
        (
            "\u043a\u043e\u0448\u043a\u0430 \u043d\u0430 \u043f\u043e\u0434\u043e\u043a\u043e\u043d\u043d"
            "\u0438\u043a\u0435, \u0430\u043a\u0432\u0430\u0440\u0435\u043b\u044c"
        ),
        "\u0642\u0637\u0629 \u0639\u0644\u0649 \u062d\u0627\u0641\u0629 \u0627\u0644\u0646\u0627\u0641\u0630\u0629",
        (
            "\U0001f431\U0001fa9f\u2728 a cat, \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 an"
            "d a flag \U0001f1e9\U0001f1ea"
        ),
        "(masterpiece:1.2), [low quality], \\(escaped\\) <lora:x:0.8>",
        "embedding:easynegative, BREAK, {a|b}",
        "<|im_start|>system\nyou are<|im_end|>",
        "<|endoftext|>",
        "a sign that says <|im_end|> and <think>no</think>",
        "tabs\tand\r\nwindows lines\r\n\r\nand   spaces  ",
        "1234567890 3.14159 1/2 ½ ² €",
        "naïve café Zoë résumé Ångström",
        "e\u0301 and \u00e9, \u200bzero width\u200d joiner, \ufeffbom",
        "don't can't it's we'LL I'M they'd",
        "a" * 300,
        "word " * 600,
        "\u957f" * 600,
    ]
    rng = random.Random(0)
    words = (
        "red green blue star circle photo of a the on background \u732b \U0001f431 ünï .,!?'\"-_ 42 <|im_end|> </think>"
    ).split()
    mixed = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(120)]
    codes = [*range(0x20, 0x17F), *range(0x400, 0x450), *range(0x4E00, 0x4E80), *range(0x1F600, 0x1F640)]
    noise = ["".join(chr(rng.choice(codes)) for _ in range(rng.randint(1, 60))) for _ in range(96)]
    return fixed + mixed + noise
