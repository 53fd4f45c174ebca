"""The prompt cache behind the host's text encoders: what is known is not loaded, what differs is not known."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.checkpoint import Snapshot
from zimage_core.config import TransformerConfig
from zimage_core.transformer import ZImageTransformer

from .. import gguf_writing
from ..poisoning import poison
from ..test_config import TURBO

NANO = Path(__file__).resolve().parents[2] / "nano" / "snapshot"
CONFIG = {"zimage.text_encoder.config": (NANO / "text_encoder" / "config.json").read_text()}
CPU = torch.device("cpu")
TEXT = "two green stars on a white background"
LAYER = "qwen3_4b.transformer.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def user(pack, tmp_path):
    """The host's user directory, empty; the folder in it where entries will be."""
    folder_paths = importlib.import_module("folder_paths")
    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path / "user"))
    yield tmp_path / "user" / "zimage" / "prompts"
    folder_paths.set_user_directory(before)


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the nano snapshot, whose files may be changed."""
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def restart(pack, comfy) -> None:
    """Forgets what is in memory."""
    pack.host_prompts._cache.cache_clear()
    pack.host_prompts._hashes.clear()
    comfy.model_management.unload_all_models()


def encode(pack, clip, text: str = TEXT, **settings) -> torch.Tensor:
    """Features that the node puts out."""
    ((conditioning,),) = [pack.conditioning.ZImageTextEncode.execute(clip, text, **settings).args]
    ((features, _extra),) = conditioning
    return features


def is_loaded(comfy, clip) -> bool:
    return any(loaded.model is clip.patcher for loaded in comfy.model_management.current_loaded_models)


def entries(user: Path) -> int:
    return len(list(user.glob("*.safetensors")))


# Known prompts


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
def test_a_known_prompt_neither_loads_nor_reads_the_encoder(pack, comfy, user, model, dtype):
    clip = pack.host_clip.load_clip(model, dtype)
    assert not is_loaded(comfy, clip)
    features = encode(pack, clip)
    assert is_loaded(comfy, clip) and entries(user) == 1

    poison(model / "text_encoder" / "model.safetensors")
    restart(pack, comfy)
    clip = pack.host_clip.load_clip(model, dtype)
    for _ in range(2):  # from disk, then from memory
        assert torch.equal(encode(pack, clip), features)
    assert not is_loaded(comfy, clip)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight of the text encoder has values that are not finite"):
        encode(pack, clip, "another prompt")
    assert is_loaded(comfy, clip) and entries(user) == 1
    with pytest.raises(ValueError, match="not finite"):
        encode(pack, clip, cache=False)


def test_hit_miss_and_no_cache_give_the_same_conditioning(pack, comfy, model):
    clip = pack.host_clip.load_clip(model)
    stock = clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))
    for cache in (False, True, True):
        (conditioning,) = pack.conditioning.ZImageTextEncode.execute(clip, TEXT, cache).args
        ((features, extra),), ((expected, expected_extra),) = conditioning, stock
        assert type(conditioning) is list and type(conditioning[0]) is list
        assert features.dtype == expected.dtype == torch.float32 and torch.equal(features, expected)
        assert list(extra) == list(expected_extra) and extra["pooled_output"] is None
        mask, expected_mask = extra["attention_mask"], expected_extra["attention_mask"]
        assert mask.dtype == expected_mask.dtype and torch.equal(mask, expected_mask)


def test_the_switch_bypasses_it(pack, comfy, user, model):
    clip = pack.host_clip.load_clip(model)
    encode(pack, clip, cache=False)
    assert entries(user) == 0
    encode(pack, clip)
    comfy.model_management.unload_all_models()
    encode(pack, clip, cache=False)
    assert is_loaded(comfy, clip)


def test_what_other_nodes_write_into_a_conditioning_stays_there(pack, comfy, model):
    clip = pack.host_clip.load_clip(model)
    expected = encode(pack, clip, cache=False)
    for _ in range(3):
        features = encode(pack, clip)
        assert torch.equal(features, expected)
        features.mul_(0)
    restart(pack, comfy)
    features = encode(pack, clip)
    features.mul_(0)
    assert torch.equal(encode(pack, clip), expected)


def test_a_long_prompt_is_told_each_time(pack, model, caplog):
    clip = pack.host_clip.load_clip(model)
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            encode(pack, clip, "a red circle, " * 300)
        assert "the limit is 512" in caplog.text
        caplog.clear()


def test_a_changed_file_and_another_encoder_miss(pack, comfy, user, model, tmp_path):
    file = model / "text_encoder" / "model.safetensors"
    encode(pack, pack.host_clip.load_clip(model))
    encode(pack, pack.host_clip.load_clip(model))
    assert entries(user) == 1
    os.utime(file, ns=(1, 1))
    encode(pack, pack.host_clip.load_clip(model))
    assert entries(user) == 2
    encode(pack, pack.host_clip.load_clip(model, torch.float16))
    assert entries(user) == 3
    encode(pack, pack.host_clip.load_clip(NANO))
    assert entries(user) == 4
    clip = pack.host_clip.load_clip(model)
    clip.clip_layer(-3)
    encode(pack, clip)
    assert entries(user) == 5
    clip.tokenizer = pack.host_clip.HostTokenizer(Snapshot(model).tokenizer())
    clip.tokenizer.tokenizer.inner.add_prefix_space = True  # changes no ids
    encode(pack, clip)
    assert entries(user) == 5


# LoRA and other patches


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def loras(tmp_path):
    folder_paths = importlib.import_module("folder_paths")
    before = list(folder_paths.get_folder_paths("loras"))
    folder_paths.add_model_folder_path("loras", str(tmp_path / "loras"))
    (tmp_path / "loras").mkdir()
    yield tmp_path / "loras"
    folder_paths.folder_names_and_paths["loras"][0][:] = before


def write_lora(file: Path, seed: int = 1) -> None:
    third, name = "lora_unet_layers_2_attention_to_k", "lora_te_layers_1_self_attn_q_proj"
    tensors = {
        f"{third}.lora_down.weight": random(4, 192),
        f"{third}.lora_up.weight": random(192, 4),
        f"{name}.lora_down.weight": random(4, 128),
        f"{name}.lora_up.weight": random(128, 4, seed=seed),
    }
    save_file(tensors, file)


def test_our_loras_are_known_by_content_and_strength(pack, comfy, user, model, loras):
    write_lora(loras / "l.safetensors")
    patcher = pack.host_model.load_model(model)

    def with_lora(strength: float, name: str = "l.safetensors"):
        clip = pack.host_clip.load_clip(model)
        return pack.lora.ZImageLoraLoader.execute(patcher, name, 1.0, clip=clip, strength_clip=strength).args[1]

    plain = encode(pack, pack.host_clip.load_clip(model))
    changed = encode(pack, with_lora(0.8))
    assert entries(user) == 2 and not torch.allclose(changed, plain, atol=1e-3)
    assert not torch.equal(encode(pack, with_lora(0.7)), changed)
    assert entries(user) == 3
    shutil.copy(loras / "l.safetensors", loras / "same.safetensors")
    poison(model / "text_encoder" / "model.safetensors")
    restart(pack, comfy)
    for name in ("l.safetensors", "same.safetensors"):
        assert torch.equal(encode(pack, with_lora(0.8, name)), changed)
    assert torch.equal(encode(pack, with_lora(0.0)), plain)
    write_lora(loras / "l.safetensors", seed=2)
    with pytest.raises(ValueError, match="not finite"):
        encode(pack, with_lora(0.8))
    assert entries(user) == 3


def stock_lora(comfy, clip, strength: float, seed: int = 1, **more: torch.Tensor):
    name = "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj"
    lora = {f"{name}.lora_up.weight": random(128, 2, seed=seed), f"{name}.lora_down.weight": random(2, 128)}
    lora |= {f"{name}.{part}": tensor for part, tensor in more.items()}
    return comfy.sd.load_lora_for_models(None, clip, lora, 0.0, strength)[1]


def test_stock_loras_are_known_by_content_and_strength(pack, comfy, user, model):
    def clip():
        return pack.host_clip.load_clip(model)

    plain, changed = encode(pack, clip()), encode(pack, stock_lora(comfy, clip(), 0.8))
    assert entries(user) == 2 and not torch.allclose(changed, plain, atol=1e-3)
    poison(model / "text_encoder" / "model.safetensors")
    restart(pack, comfy)
    assert torch.equal(encode(pack, stock_lora(comfy, clip(), 0.8)), changed)
    assert torch.equal(encode(pack, stock_lora(comfy, clip(), 0.0)), plain)
    for other in (
        stock_lora(comfy, clip(), 0.7),
        stock_lora(comfy, clip(), 0.8, seed=2),
        stock_lora(comfy, clip(), 0.8, alpha=torch.tensor(1.0)),
        stock_lora(comfy, stock_lora(comfy, clip(), 0.8), 0.8),
        patched(clip(), ("diff", (random(128, 128),))),
    ):
        with pytest.raises(ValueError, match="not finite"):
            encode(pack, other)


def patched(clip, value, strength: float = 1.0, strength_model: float = 1.0, key=LAYER):
    clip = clip.clone()
    assert clip.add_patches({key: value}, strength, strength_model)
    return clip


def test_plain_patches_are_known_by_content(pack, comfy, user, model):
    clip = pack.host_clip.load_clip(model)
    differ = [
        ("diff", (random(128, 128),)),
        (random(128, 128, seed=1),),
        ("diff", (random(128, 128).half(),)),
        ("set", (random(128, 128),)),
        (None,),
    ]
    encode(pack, clip)
    for count, value in enumerate(differ, 2):
        strengths = (0.0, 0.5) if value == (None,) else (1.0, 1.0)  # as CLIPAttentionMultiply makes it
        for _ in range(2):
            encode(pack, patched(clip, value, *strengths))
        assert entries(user) == count
    for settings in ({"strength": 0.5}, {"strength_model": 0.5}, {"key": LAYER.replace("layers.1", "layers.2")}):
        encode(pack, patched(clip, differ[0], **settings))
    encode(pack, patched(clip, differ[0], key=(LAYER, (0, 0, 128))))  # some of its rows
    assert entries(user) == len(differ) + 5


# What can't be known is not kept


def attached(clip, name: str, value):
    getattr(clip.patcher, name)["other"] = value
    return clip


def with_attribute(clip, name: str, value):
    setattr(clip, name, value)
    return clip


def bypass(comfy, clip):
    name = "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj"
    lora = {f"{name}.lora_up.weight": random(128, 2), f"{name}.lora_down.weight": random(2, 128)}
    return comfy.sd.load_bypass_lora_for_models(None, clip, lora, 0.0, 1.0)[1]


def merged(comfy, clip):
    """What CLIPMergeSimple makes of two encoders."""
    other = clip.clone()
    patches = other.get_key_patches()
    clip.add_patches({LAYER: patches[LAYER]}, 0.5, 0.5)
    return clip


def with_callback(clip):
    clip.patcher.add_callback("on_load", lambda *_: None)
    return clip


def with_wrapper(clip):
    clip.patcher.add_wrapper("calc_cond_batch", lambda executor, *a, **k: executor(*a, **k))
    return clip


def with_weight_wrapper(clip):
    clip.patcher.add_weight_wrapper(LAYER, lambda weight: weight)
    return clip


def with_object_patch(clip):
    clip.patcher.add_object_patch("encoder_config", clip.cond_stage_model.encoder_config)
    return clip


def with_compute_dtype(clip):
    clip.patcher.set_model_compute_dtype(torch.float16)
    return clip


def with_hooks(comfy, clip):
    """As SetClipHooks does it, without a schedule."""
    group = importlib.import_module("comfy.hooks").HookGroup()
    clip.apply_hooks_to_conds = group
    clip.patcher.forced_hooks = group
    return clip


def with_forced_hooks(comfy, clip):
    clip.patcher.forced_hooks = importlib.import_module("comfy.hooks").HookGroup()
    return clip


class OddAdapter:
    """An adapter of another pack: what it does with a weight, nobody here knows."""

    @staticmethod
    def make():
        base = importlib.import_module("comfy.weight_adapter").WeightAdapterBase

        class Odd(base):
            name = "lora"
            loaded_keys: set[str] = set()
            weights = (torch.ones(1),)

            def calculate_weight(self, weight, *_, **__):
                return weight

        return Odd()


@pytest.mark.parametrize(
    "change",
    [
        lambda comfy, clip: with_hooks(comfy, clip),
        lambda comfy, clip: with_forced_hooks(comfy, clip),
        lambda comfy, clip: attached(clip, "hook_patches", {}),
        lambda comfy, clip: with_attribute(clip, "use_clip_schedule", True),
        lambda comfy, clip: with_attribute(clip, "encode_from_tokens", clip.encode_from_tokens),
        lambda comfy, clip: bypass(comfy, clip),
        lambda comfy, clip: merged(comfy, clip),
        lambda comfy, clip: with_callback(clip),
        lambda comfy, clip: with_wrapper(clip),
        lambda comfy, clip: with_weight_wrapper(clip),
        lambda comfy, clip: with_compute_dtype(clip),
        lambda comfy, clip: attached(clip, "attachments", object()),
        lambda comfy, clip: with_object_patch(clip),
        lambda comfy, clip: attached(clip, "model_options", {"something": True}),
        lambda comfy, clip: patched(clip, OddAdapter.make()),
        lambda comfy, clip: patched(clip, (random(128, 128),), key=(LAYER, (0, 0, 128), lambda change: change)),
    ],
    ids="hooks|forced hooks|hook patches|"
    "schedule|replaced method|bypass|merge|callback|wrapper|weight wrapper|compute dtype|attachment|"
    "object patch|option|unknown adapter|function".split("|"),
)
def test_what_can_not_be_known_is_encoded_each_time(pack, comfy, user, model, change):
    clip = change(comfy, pack.host_clip.load_clip(model))
    tokens = clip.tokenize(TEXT)
    assert pack.host_prompts.key(clip, tokens) is None
    expected = clip.encode_from_tokens_scheduled(tokens)[0][0]
    assert torch.equal(encode(pack, clip), expected)
    assert entries(user) == 0
    encode(pack, pack.host_clip.load_clip(model))
    assert entries(user) == 1


def test_tokens_that_are_no_numbers_are_not_looked_up(pack, model):
    """Embeddings in a prompt, say: tensors among its tokens."""
    clip = pack.host_clip.load_clip(model)
    assert pack.host_prompts.key(clip, {"qwen3_4b": [[(5, 1.0)]]}) is not None
    assert pack.host_prompts.key(clip, {"qwen3_4b": [[(5, 1.0), (torch.zeros(2, 128), 1.0)]]}) is None


# The host's own text encoders


@pytest.fixture
def stock(pack, comfy, tmp_path, monkeypatch):
    """A function that loads a stock CLIP of Qwen3-4B's width, but only three layers and the nano model's vocabulary."""
    llama = importlib.import_module("comfy.text_encoders.llama")
    sizes = {"vocab_size": 640, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    small = functools.partial(llama.Qwen3_4BConfig, **sizes, num_key_value_heads=1)
    monkeypatch.setattr(llama, "Qwen3_4BConfig", small)
    path = tmp_path / "qwen.safetensors"
    with torch.device("meta"):
        network = llama.Qwen3_4B({}, torch.float16, "meta", torch.nn)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    save_file({name: random(*shape, seed=i).half() for i, (name, shape) in enumerate(shapes.items())}, path)

    def host_starts():
        time.sleep(0.02)  # the file system's clock is coarse
        monkeypatch.setattr(pack.host_prompts, "STARTED", time.time_ns())

    host_starts()

    def load():
        clip = comfy.sd.load_clip([str(path)])
        clip.tokenizer = pack.host_clip.HostTokenizer(Snapshot(NANO).tokenizer())  # of ids in that vocabulary
        return clip

    return SimpleNamespace(load=load, path=path, host_starts=host_starts)


def test_the_hosts_own_encoders_are_cached_too(pack, comfy, user, stock):
    clip = stock.load()
    assert type(clip.cond_stage_model).__name__.startswith("ZImageTEModel")
    expected = clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))
    features = encode(pack, clip)
    assert features.shape[-1] == 2560 and torch.equal(features, expected[0][0]) and entries(user) == 1
    restart(pack, comfy)
    again = stock.load()
    comfy.model_management.unload_all_models()  # which the host loads at once where it computes on the CPU
    assert torch.equal(encode(pack, again), features) and not is_loaded(comfy, again)
    again.clip_layer(-1)
    encode(pack, again)
    assert is_loaded(comfy, again) and entries(user) == 2
    lora = stock.load()
    assert lora.add_patches({"qwen3_4b.transformer.model.layers.0.mlp.down_proj.weight": (random(2560, 64),)})
    assert not torch.equal(encode(pack, lora), features)
    assert entries(user) == 3
    weights = {name: weight * 1.5 for name, weight in load_file(stock.path).items()}
    save_file(weights, stock.path)
    stock.host_starts()
    assert not torch.equal(encode(pack, stock.load()), features)
    assert entries(user) == 4


def test_a_stock_file_that_may_have_changed_since_it_was_read_is_not_cached(pack, user, stock):
    clip = stock.load()
    os.utime(stock.path, ns=(1, 1))  # its content may be another now, the host would not say
    encode(pack, clip)
    assert entries(user) == 0


# Settings


def test_the_size_comes_from_the_environment(pack, user, model, monkeypatch, caplog):
    variable, mega = "ZIMAGE_PROMPT_CACHE_MB", 2**20
    assert pack.host_prompts.cache().disk_bytes == 512 * mega and pack.host_prompts.cache().folder == user
    monkeypatch.setenv(variable, "7")
    assert pack.host_prompts.cache().disk_bytes == 7 * mega
    monkeypatch.setenv(variable, "lots")
    for _ in range(2):
        assert pack.host_prompts.cache().disk_bytes == 512 * mega
    (record,) = caplog.records
    assert "ZIMAGE_PROMPT_CACHE_MB is 'lots', expected a whole number of MB from 0" in record.getMessage()
    monkeypatch.setenv(variable, "0")
    clip = pack.host_clip.load_clip(model)
    features = encode(pack, clip)
    poison(model / "text_encoder" / "model.safetensors")
    assert torch.equal(encode(pack, clip), features) and not user.exists()


# Precision


@pytest.fixture
def gpu(comfy, monkeypatch):
    """Tells the host's policy that it has a GPU of a generation, and flags from its command line."""
    mm = comfy.model_management

    def become(major: int, *flags: str) -> None:
        properties = SimpleNamespace(major=major, minor=0, name="some GPU", total_memory=24 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        monkeypatch.setattr(mm, "cpu_state", mm.CPUState.GPU)
        monkeypatch.setattr(mm, "get_torch_device", lambda: torch.device("cuda"))
        monkeypatch.setattr(mm, "get_total_memory", lambda *_, **__: 24 * 2**30)
        for flag in flags:
            monkeypatch.setattr(mm.args, flag, True)

    return become


def test_the_cpu_computes_in_float32(pack):
    assert pack.host_prompts.kept_dtype() == torch.float32


@pytest.mark.parametrize(
    ("major", "flags", "expected"),
    [
        (9, (), torch.bfloat16),
        (8, (), torch.bfloat16),
        (7, (), torch.float32),  # computes in float32: it has no bfloat16, and Z-Image overflows float16
        (9, ("fp32_unet",), torch.float32),
        (9, ("fp64_unet",), torch.float32),
        (9, ("bf16_unet",), torch.bfloat16),
        (9, ("fp16_unet",), torch.float16),
        (9, ("fp8_e4m3fn_unet",), torch.bfloat16),
        (9, ("fp8_e5m2_unet",), torch.bfloat16),
    ],
    ids=str,
)
def test_features_are_kept_in_what_the_transformer_computes_in(pack, gpu, major, flags, expected):
    component = pack.host_model.open_component(NANO, "transformer")
    gpu(major, *flags)
    supported = pack.host_model.ZImageModelConfig.supported_inference_dtypes
    storage, compute = pack.host_model._dtypes(None, component, supported, torch.device("cuda"))
    kept = pack.host_prompts.kept_dtype()
    assert kept == expected
    if "fp64_unet" not in flags and "fp32_unet" not in flags:  # a file of bfloat16 is not stored in more
        assert kept == (compute or storage)


def test_the_size_that_the_policy_is_asked_for_is_the_published_one(pack):
    network = ZImageTransformer(TransformerConfig.from_dict(TURBO, "config.json"), device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == pack.host_prompts.PARAMETERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_features_are_rounded_once_as_the_transformer_would(pack, comfy, user, model, monkeypatch, dtype):
    clip, transformer = pack.host_clip.load_clip(model), pack.host_model.load_model(model)
    exact = encode(pack, clip, cache=False)
    monkeypatch.setattr(pack.host_prompts, "kept_dtype", lambda: dtype)
    miss = encode(pack, clip)
    hit = encode(pack, clip)
    restart(pack, comfy)
    for features in (miss, hit, encode(pack, clip)):
        assert features.dtype == torch.float32 and torch.equal(features, exact.to(dtype).float())
    assert not torch.equal(miss, exact) and torch.equal(encode(pack, clip, cache=False), exact)
    (file,) = user.glob("*.safetensors")
    assert file.stat().st_size <= 2.1 * exact.numel() + 300  # a width of 128 makes the header count
    monkeypatch.setattr(pack.host_prompts, "kept_dtype", lambda: torch.float32)
    assert torch.equal(encode(pack, clip), exact)

    transformer.set_model_compute_dtype(dtype)
    comfy.model_management.load_models_gpu([transformer])
    arguments = {"num_tokens": exact.shape[1], "transformer_options": {}}
    outputs = [
        transformer.model.apply_model(random(1, 16, 8, 8), torch.tensor([0.7]), c_crossattn=features, **arguments)
        for features in (exact, miss)
    ]
    assert torch.equal(*outputs)
    transformer.detach()


def test_features_beyond_float16_are_handed_out_whole(pack, user, model, monkeypatch):
    clip = pack.host_clip.load_clip(model, torch.float32)
    last = clip.cond_stage_model.encoder.model.layers[-1].mlp.down_proj
    last.weight = torch.nn.Parameter(last.weight * 1e7, requires_grad=False)
    monkeypatch.setattr(pack.host_prompts, "kept_dtype", lambda: torch.float16)
    features = encode(pack, clip)
    assert features.isfinite().all() and features.abs().max() > 65504 and entries(user) == 0


# Weights that have to be converted stay in the file


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
                scale = plain[name].float().abs().max() / 448
                stored[name] = (plain[name].float() / scale).to(torch.float8_e4m3fn)
                stored[name.replace(".weight", ".scale_weight")] = scale
        save_file(stored, path, CONFIG)
    else:
        save_file(plain, path, CONFIG)
    return path


FORMS = ["fp8", "fp8 without scales", "gguf", "float32"]


@pytest.fixture(params=FORMS)
def load(pack, tmp_path, request):
    """A function that loads the encoder, and the file."""
    with torch.inference_mode(False):
        path = converted(request.param, tmp_path)

    def load(**settings):
        clip = pack.host_clip.load_clip(path, torch.float32 if request.param == "float32" else None, **settings)
        clip.tokenizer = pack.host_clip.HostTokenizer(Snapshot(NANO).tokenizer())  # of ids in its vocabulary
        return clip

    return SimpleNamespace(load=load, path=path, form=request.param)


def unread(clip) -> int:
    """How many weights have no values yet."""
    return len(unread_names(clip))


def unread_names(clip) -> set[str]:
    weights = clip.cond_stage_model.named_parameters()
    return {name.removeprefix("qwen3_4b.transformer.") for name, weight in weights if weight.is_meta}


def test_only_weights_that_are_converted_are_left_in_the_file(load, request):
    clip = load.load()
    names = {name.removeprefix("qwen3_4b.transformer.") for name, _ in clip.cond_stage_model.named_parameters()}
    expected = {
        "fp8": {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"},
        "gguf": {name for name in names if name.endswith("norm.weight")},
    }
    assert unread_names(clip) == expected.get(load.form, names)


def test_converted_weights_are_not_read_for_a_known_prompt(pack, comfy, user, load):
    clip = load.load()
    size, count = clip.patcher.model_size(), unread(clip)
    assert count > 0
    features = encode(pack, clip)
    assert unread(clip) == 0 and features.isfinite().all()
    assert comfy.model_management.module_size(clip.cond_stage_model) == size  # the host reckoned with the right size
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
    transformer = pack.host_model.load_model(NANO)

    def with_lora(clip):
        return pack.lora.ZImageLoraLoader.execute(transformer, "l.safetensors", 1.0, clip=clip).args[1]

    read, clip = load.load(), load.load()
    encode(pack, read, cache=False)
    changed = with_lora(clip)
    assert unread(clip) > 0
    assert torch.equal(encode(pack, changed), encode(pack, with_lora(read), cache=False))
    assert unread(clip) == 0
    assert torch.equal(encode(pack, clip), encode(pack, read, cache=False))


@pytest.mark.parametrize(
    "use",
    [
        lambda clip: clip.patcher.get_key_patches("qwen3_4b.transformer.model.embed_tokens"),
        lambda clip: clip.patcher.model_state_dict(),
        lambda clip: clip.cond_stage_model.state_dict(),
        lambda clip: clip.patcher.patch_weight_to_device("qwen3_4b.transformer.model.layers.0.input_layernorm.weight"),
        lambda clip: clip.cond_stage_model.to(CPU),
        lambda clip: clip.cond_stage_model.encoder,
        lambda clip: clip.load_model(),
        lambda clip: clip.clone().load_model(),
        lambda clip: clip.patcher.detach(),
    ],
    ids="key patches|state dict|model's state dict|patch|to|encoder|load|load a clone|detach".split("|"),
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


def test_a_saved_encoder_has_its_values(pack, load, tmp_path):
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
    """Then the host's own patchers do."""
    clip = pack.host_clip.load_clip(model)
    assert unread(clip) == 0
    assert type(clip.patcher).load is type(clip.patcher).__mro__[0].load
    assert type(clip.patcher).__module__ == "comfy.model_patcher"
