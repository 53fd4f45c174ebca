"""Prompts are encoded once: the store of features on its own, then behind the pipeline, whose encoder stays unread."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core import tokenizer
from zimage_core.__main__ import main
from zimage_core.checkpoint import CheckpointError, open_component, open_tokenizer, schedule_of
from zimage_core.pipeline import ZImagePipeline
from zimage_core.prompt_cache import STALE, PromptCache, key_of, stamps

from .poisoning import poison

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "nano" / "snapshot"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = {"width": 64, "height": 32, "steps": 2}
PROMPT = "a red circle"


def features(seed: int, tokens: int = 5, width: int = 8, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def entry(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# The store


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_come_back_from_memory_and_from_disk(tmp_path, dtype):
    put = features(1, dtype=dtype)
    cache = PromptCache(tmp_path)
    assert cache.get("a") is None
    cache.put("a", put)
    for found in (cache.get("a"), PromptCache(tmp_path).get("a"), PromptCache(tmp_path, memory_bytes=0).get("a")):
        assert found is not None and found.dtype == dtype and torch.equal(found, put)
    assert PromptCache(tmp_path).get("b") is None


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2.1), (torch.float32, 4.1)], ids=str)
def test_an_entry_is_hardly_larger_than_its_values(tmp_path, dtype, most):
    """Those of a short prompt for the published model: 20 tokens, template included."""
    PromptCache(tmp_path).put("a", features(1, 20, 2560, dtype))
    assert entry(tmp_path, "a").stat().st_size <= most * 20 * 2560


def test_what_callers_write_to_does_not_reach_the_cache(tmp_path):
    put = features(1)
    for folder in (None, tmp_path):
        cache, given = PromptCache(folder), put.clone()
        cache.put("a", given)
        given.zero_()
        for _ in range(2):
            found = cache.get("a")
            assert torch.equal(found, put)
            found.zero_()
    found = PromptCache(tmp_path).get("a")
    found.zero_()
    assert torch.equal(PromptCache(tmp_path).get("a"), put)


def test_memory_gives_up_the_least_recently_used():
    size = features(0).nbytes
    cache = PromptCache(None, memory_bytes=3 * size + 1)
    for number in range(3):
        cache.put(str(number), features(number))
    assert cache.get("0") is not None
    cache.put("3", features(3))
    assert [cache.get(str(number)) is not None for number in range(4)] == [True, False, True, True]
    cache.put("3", features(3))  # again: it counts once
    cache.put("large", features(9, tokens=500))  # would take more than all
    assert [cache.get(key) is not None for key in ("0", "2", "3", "large")] == [True, True, True, False]


@pytest.mark.parametrize("memory", [0, 2**20], ids=["read from disk", "read from memory"])
def test_disk_gives_up_the_least_recently_used(tmp_path, memory):
    PromptCache(tmp_path).put("0", features(0))
    size = entry(tmp_path, "0").stat().st_size
    cache = PromptCache(tmp_path, disk_bytes=3 * size + 1, memory_bytes=memory)
    for number in range(3):
        cache.put(str(number), features(number))
    assert torch.equal(cache.get("0"), features(0))
    cache.put("3", features(3))
    kept = PromptCache(tmp_path, memory_bytes=0)
    assert [kept.get(str(number)) is not None for number in range(4)] == [True, False, True, True]
    cache.put("large", features(9, tokens=500))
    assert kept.get("large") is None and len(entries(tmp_path)) == 3
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3 * size + 1


def test_nothing_is_written_where_nothing_may_be(tmp_path):
    cache = PromptCache(tmp_path / "new", disk_bytes=0)
    cache.put("a", features(1))
    assert torch.equal(cache.get("a"), features(1)) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_not_kept(tmp_path, value):
    bad = features(1)
    bad[2, 3] = value
    cache = PromptCache(tmp_path)
    cache.put("a", bad)
    assert cache.get("a") is None and list(tmp_path.iterdir()) == []


def damaged(kind: str, whole: bytes, folder: Path) -> bytes:
    match kind:
        case "empty":
            return b""
        case "half-written":
            return whole[: len(whole) // 2]
        case "one byte short":
            return whole[:-1]
        case "one byte more":
            return whole + b"\0"
        case "text":
            return b"not an entry at all"
        case "header of any length":
            return b"\xff" * 8 + whole[8:]
        case "header is a list":
            return (2).to_bytes(8, "little") + b"[]"
        case "without metadata":
            save_file({"features": features(1)}, folder / "other")
        case "of another key":
            return entry(folder, "b").read_bytes()
        case "of other weights":
            save_file({"weight": features(1)}, folder / "other", {"format": "pt"})
    return (folder / "other").read_bytes()


@pytest.mark.parametrize(
    "kind",
    "empty|half-written|one byte short|one byte more|text|header of any length|header is a list|without metadata|"
    "of another key|of other weights".split("|"),
)
def test_a_damaged_entry_is_left_out_and_replaced(tmp_path, kind):
    cache = PromptCache(tmp_path, memory_bytes=0)
    cache.put("a", features(1))
    cache.put("b", features(2))
    file = entry(tmp_path, "a")
    file.write_bytes(damaged(kind, file.read_bytes(), tmp_path))
    assert cache.get("a") is None
    assert torch.equal(cache.get("b"), features(2))
    cache.put("a", features(1))
    assert torch.equal(cache.get("a"), features(1))


def test_every_flipped_byte_is_found(tmp_path):
    cache = PromptCache(tmp_path, memory_bytes=0)
    cache.put("a", features(1, tokens=2, width=4))
    file = entry(tmp_path, "a")
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        assert cache.get("a") is None, f"byte {place} of {len(whole)}"
    file.write_bytes(whole)
    assert cache.get("a") is not None


def test_only_what_dead_writers_left_is_cleaned_up(tmp_path):
    cache = PromptCache(tmp_path)
    old = time.time() - STALE - 60
    names = [f".{'a' * 64}.{'b' * 32}.tmp", f".{'a' * 64}.{'c' * 32}.tmp", "notes.txt", "model.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 100)
        if name != names[1]:  # that writer may be at work
            os.utime(tmp_path / name, (old, old))
    cache.put("a", features(1))
    assert {file.name for file in tmp_path.iterdir()} == {*names[1:], entry(tmp_path, "a").name}
    PromptCache(tmp_path, disk_bytes=entry(tmp_path, "a").stat().st_size).put("b", features(2))
    assert {file.name for file in tmp_path.iterdir()} == {*names[1:], entry(tmp_path, "b").name}


def test_a_folder_that_can_t_be_written_is_told_once_and_memory_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    cache = PromptCache(tmp_path / "file" / "prompts")
    for number in range(3):
        cache.put(str(number), features(number))
    assert [torch.equal(cache.get(str(number)), features(number)) for number in range(3)] == [True] * 3
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "can't be kept in" in record.getMessage() and str(cache.folder) in record.getMessage()


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path, caplog):
    """The limit on file sizes stops a write in the middle, as a full disk does."""
    resource = pytest.importorskip("resource")
    cache, whole = PromptCache(tmp_path), features(1, 100, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        cache.put("a", whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "can't be kept in" in caplog.text
    assert list(tmp_path.iterdir()) == [] and torch.equal(cache.get("a"), whole)
    cache.put("a", whole)  # there is room again
    assert torch.equal(PromptCache(tmp_path).get("a"), whole)


def hammer(folder: Path, seed: int, rounds: int, memory_bytes: int = 0) -> int:
    """Asks for random prompts of 20, of which a third have room; returns how many were known. Checks each."""
    cache = PromptCache(folder, disk_bytes=7 * 450, memory_bytes=memory_bytes)
    draw, known = random.Random(seed), 0
    for _ in range(rounds):
        number = draw.randrange(20)
        expected = features(number)
        found = cache.get(str(number))
        if found is None:
            cache.put(str(number), expected)
        else:
            assert torch.equal(found, expected), f"prompt {number}"
            known += 1
    return known


def test_servers_that_share_a_folder(tmp_path):
    """Three processes read, write and evict the same few entries; one more of each fails if a value is wrong."""
    script = "import sys, logging; logging.basicConfig(); from pathlib import Path; from tests import test_prompt_cache"
    script += "; print(test_prompt_cache.hammer(Path(sys.argv[1]), int(sys.argv[2]), 500))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(seed)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    for process in running:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0 and error == "", error
        assert 20 < int(out) < 480  # there were hits, and evictions
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir())
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 7 * 450
    assert len(entries(tmp_path)) >= 5


def test_threads_that_share_a_cache(tmp_path):
    failures = []
    memory = 5 * features(0).nbytes

    def work(seed: int) -> None:
        try:
            hammer(tmp_path, seed, 300, memory)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []


def test_keys_tell_every_ingredient_apart():
    plain = {"encoder": {"files": [["a", 1, 2]]}, "loras": [], "tokens": [1, 2], "dtype": "torch.float32"}
    assert key_of(**plain) == key_of(**dict(reversed(plain.items())))
    others = [
        {"encoder": {"files": [["b", 1, 2]]}},
        {"encoder": {"files": [["a", 2, 2]]}},
        {"encoder": {"files": [["a", 1, 3]]}},
        {"loras": [["l", 1.0]]},
        {"tokens": [1, 2, 3]},
        {"tokens": [12]},
        {"dtype": "torch.bfloat16"},
    ]
    keys = [key_of(**plain), *(key_of(**{**plain, **other}) for other in others)]
    assert len(set(keys)) == len(keys)
    with pytest.raises(TypeError):
        key_of(tokens=[torch.zeros(1)])


def test_stamps_follow_links_and_see_changes(tmp_path):
    file, link = tmp_path / "blob", tmp_path / "model.safetensors"
    file.write_bytes(b"1234")
    link.symlink_to(file)
    before = stamps([link])
    assert before == stamps([file]) == [(str(file.resolve()), 4, file.stat().st_mtime_ns)]
    os.utime(file, ns=(1, 1))
    assert stamps([link]) != before
    file.write_bytes(b"12345")
    os.utime(file, ns=(1, before[0][2]))
    assert stamps([link]) != before
    assert stamps([tmp_path / "none"]) == [(str((tmp_path / "none").resolve()), -1, -1)]


# Behind the pipeline


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the nano snapshot, whose files may be changed."""
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def opened(model: Path, folder: Path, **settings) -> ZImagePipeline:
    """A pipeline as after a restart: nothing in memory."""
    return ZImagePipeline.from_pretrained(model, prompt_cache=PromptCache(folder), **settings)


def encoder_file(model: Path) -> Path:
    return model / "text_encoder" / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_known_prompt_needs_no_weight_of_the_encoder(model, tmp_path, dtype):
    folder = tmp_path / "prompts"
    before = opened(model, folder, dtype=dtype).generate(PROMPT, "a star", guidance_scale=2.0, seed=1, **SMALL)
    assert len(entries(folder)) == 2  # positive and negative
    poison(encoder_file(model))
    pipe = opened(model, folder, dtype=dtype)
    assert torch.equal(pipe.generate(PROMPT, "a star", guidance_scale=2.0, seed=1, **SMALL), before)
    assert pipe.generate(PROMPT, seed=2, **SMALL).isfinite().all()
    words = r"model\.embed_tokens\.weight of the text encoder has values that are not finite"
    with pytest.raises(CheckpointError, match=words):
        pipe.generate("a blue square", seed=1, **SMALL)
    assert len(entries(folder)) == 2  # what was wrong was not kept
    with pytest.raises(CheckpointError, match=words):
        ZImagePipeline.from_pretrained(model, dtype=dtype).generate(PROMPT, **SMALL)


def test_the_cache_changes_no_features(model, tmp_path):
    prompts = [PROMPT, "two green stars on a white background, and a ring", PROMPT, ""]
    plain = ZImagePipeline.from_pretrained(model).encode_prompts(prompts)
    pipe = opened(model, tmp_path / "prompts")
    pipe.encode_prompts([prompts[1]])
    for again in (pipe, pipe, opened(model, tmp_path / "prompts")):  # partly known, known, known from disk
        found = again.encode_prompts(prompts)
        assert [one.shape for one in found] == [one.shape for one in plain]
        for one, other in zip(found, plain, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
    assert len(entries(tmp_path / "prompts")) == 3


def lora_file(path: Path, component: str = "text_encoder", scale: float = 0.1) -> Path:
    weight = {
        "text_encoder": ("lora_te_layers_1_self_attn_q_proj", 128, 128),
        "transformer": ("lora_unet_layers_1_attention_to_q", 192, 192),
    }[component]
    name, out, width = weight
    save_file(
        {
            f"{name}.lora_down.weight": scale * features(1, 4, width, torch.float32),
            f"{name}.lora_up.weight": scale * features(2, out, 4, torch.float32),
        },
        path,
    )
    return path


def changed_time(model: Path) -> None:
    os.utime(encoder_file(model), ns=(1, 1))


def changed_content(model: Path) -> None:
    weights = {name: weight * 1.1 for name, weight in load_file(encoder_file(model)).items()}
    save_file(weights, encoder_file(model))


def changed_config(model: Path) -> None:
    config = model / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 1000000.0', '"rope_theta": 10000.0'))


@pytest.mark.parametrize("change", [changed_time, changed_content, changed_config])
def test_a_changed_encoder_misses(model, tmp_path, change):
    first = opened(model, tmp_path / "prompts").encode_prompts([PROMPT])[0]
    change(model)
    again = opened(model, tmp_path / "prompts").encode_prompts([PROMPT])[0]
    assert torch.equal(first, again) == (change is changed_time)
    assert len(entries(tmp_path / "prompts")) == 2


@pytest.mark.parametrize(
    ("settings", "misses"),
    [
        ({"prompt": "a red circle."}, True),
        ({"limit": 4}, True),  # cuts the prompt
        ({"limit": 1000}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"template": "<|im_start|>user\n{}!<|im_end|>\n<|im_start|>assistant\n"}, True),
        ({"lora": ("text_encoder", 1.0)}, True),
        ({"lora": ("text_encoder", 0.0)}, False),
        ({"lora": ("transformer", 1.0)}, False),
        ({}, False),
    ],
    ids=str,
)
def test_what_makes_a_prompt_another(model, tmp_path, monkeypatch, settings, misses):
    opened(model, tmp_path / "prompts").encode_prompts([PROMPT])
    if "template" in settings:
        monkeypatch.setattr(tokenizer, "PROMPT_TEMPLATE", settings["template"])
    pipe = opened(model, tmp_path / "prompts", dtype=settings.get("dtype", torch.float32))
    if "lora" in settings:
        kind, strength = settings["lora"]
        pipe.set_loras((lora_file(tmp_path / "l.safetensors", kind), strength))
    pipe.encode_prompts([settings.get("prompt", PROMPT)], settings.get("limit", tokenizer.MAX_LENGTH))
    assert len(entries(tmp_path / "prompts")) == 1 + misses


def test_loras_are_known_by_file_and_strength_and_leave_the_encoder_unread(model, tmp_path):
    folder, file = tmp_path / "prompts", lora_file(tmp_path / "l.safetensors")
    pipe = opened(model, folder)
    pipe.set_loras((file, 0.8))  # before the encoder is read
    (with_lora,) = pipe.encode_prompts([PROMPT])
    pipe.set_loras()
    (plain,) = pipe.encode_prompts([PROMPT])
    pipe.set_loras((file, 0.8))  # after it was
    (from_memory,) = pipe.encode_prompts([PROMPT])
    assert torch.equal(from_memory, with_lora) and not torch.allclose(with_lora, plain, atol=1e-3)
    uncached = ZImagePipeline.from_pretrained(model)
    uncached.set_loras((file, 0.8))
    assert torch.allclose(uncached.encode_prompts([PROMPT])[0], with_lora, atol=1e-5)
    uncached.text_encoder  # noqa: B018 - it is read by now, so LoRA is taken off the weights themselves
    uncached.set_loras()
    assert torch.allclose(uncached.encode_prompts([PROMPT])[0], plain, atol=1e-5)

    poison(encoder_file(model))
    pipe = opened(model, folder)
    pipe.set_loras((file, 0.8))
    assert torch.equal(pipe.encode_prompts([PROMPT])[0], with_lora)
    pipe.set_loras((file, 0.7))
    assert not pipe.encode_prompts([PROMPT])[0].isfinite().all()
    pipe.set_loras((lora_file(file, scale=0.2), 0.8))  # the same name, another content
    assert not pipe.encode_prompts([PROMPT])[0].isfinite().all()


def test_a_refused_lora_changes_nothing(model, tmp_path):
    pipe = opened(model, tmp_path / "prompts")
    pipe.set_loras((lora_file(tmp_path / "l.safetensors"), 1.0))
    (before,) = pipe.encode_prompts([PROMPT])
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 4)}, tmp_path / "flux")
    with pytest.raises(CheckpointError, match="this is a LoRA for Flux"):
        pipe.set_loras((tmp_path / "flux", 1.0))
    assert torch.equal(pipe.encode_prompts([PROMPT])[0], before)
    assert len(entries(tmp_path / "prompts")) == 1


def test_networks_that_were_made_elsewhere_are_not_cached(model, tmp_path):
    parts = {
        kind: open_component(model, kind).build(dtype=torch.float32) for kind in ("text_encoder", "transformer", "vae")
    }
    pipe = ZImagePipeline(
        open_tokenizer(model),
        parts["text_encoder"],
        parts["transformer"],
        parts["vae"],
        schedule_of(model),
        prompt_cache=PromptCache(tmp_path / "prompts"),
    )
    (mine,) = pipe.encode_prompts([PROMPT])
    assert not (tmp_path / "prompts").exists()
    pipe = opened(model, tmp_path / "prompts")
    pipe.encode_prompts([PROMPT])
    with torch.no_grad():
        parts["text_encoder"].model.layers[0].mlp.down_proj.weight.mul_(2)
    pipe.text_encoder = parts["text_encoder"]
    assert not torch.allclose(pipe.encode_prompts([PROMPT])[0], mine, atol=1e-3)
    assert len(entries(tmp_path / "prompts")) == 1


def test_damage_that_headers_show_is_told_when_the_pipeline_is_opened(model):
    whole = encoder_file(model).read_bytes()
    encoder_file(model).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        ZImagePipeline.from_pretrained(model)
    encoder_file(model).write_bytes(whole)
    config = model / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 384', '"intermediate_size": 320'))
    with pytest.raises(CheckpointError, match=r"has shape \[.*\], expected \[.*\] by text_encoder/config.json"):
        ZImagePipeline.from_pretrained(model)


def test_a_file_that_changes_before_it_is_read_is_refused(model):
    pipe = ZImagePipeline.from_pretrained(model)
    changed_content(model)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file has changed since it was opened"):
        pipe.generate(PROMPT, **SMALL)


def test_for_a_known_prompt_the_encoder_is_not_even_built(model, tmp_path):
    opened(model, tmp_path / "prompts").encode_prompts([PROMPT])
    pipe = opened(model, tmp_path / "prompts")
    pipe.generate(PROMPT, **SMALL)
    encoder_file(model).unlink()
    pipe.set_loras((lora_file(tmp_path / "l.safetensors", "transformer"), 1.0))
    pipe.generate(PROMPT, **SMALL)
    with torch.no_grad():
        pipe.transformer.layers[0].attention.out.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="of the transformer has values that are not finite"):
        pipe.generate(PROMPT, **SMALL)
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        pipe.generate("a blue square", **SMALL)


def test_an_encoder_that_was_read_for_a_picture_can_be_trained(model):
    pipe = ZImagePipeline.from_pretrained(model)
    pipe.generate(PROMPT, **SMALL)
    ids = torch.tensor([pipe.tokenizer(PROMPT)])
    weight = pipe.text_encoder.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    pipe.text_encoder(ids).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_the_command_line_keeps_prompts_in_a_folder(model, tmp_path, capsys):
    command = [
        "generate",
        PROMPT,
        "-m",
        str(model),
        "--cpu",
        "--seed",
        "1",
        "--width",
        "64",
        "--height",
        "64",
        "-s",
        "1",
    ]
    cached = [*command, "--prompt-cache", str(tmp_path / "prompts")]
    assert main([*cached, "-o", str(tmp_path / "a.png")]) == 0
    assert len(entries(tmp_path / "prompts")) == 1
    poison(encoder_file(model))
    assert main([*cached, "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main([*command, "-o", str(tmp_path / "c.png")]) == 2
    assert "of the text encoder has values that are not finite" in capsys.readouterr().err
