"""Snapshots load strictly and without a second copy; a damaged one says what is wrong, where, and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.errors import CheckpointError
from zimage_core.weights.snapshot import Snapshot
from zimage_core.weights.tensor_files import TensorFiles

from . import process_memory
from .helpers import NANO

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the built-in model, free to be damaged."""
    return Path(shutil.copytree(NANO, tmp_path / "My-Model"))


def shard(component: Path, parts: int) -> None:
    """Splits the single weight file of a component into shards with an index."""
    (single,) = component.glob("*.safetensors")
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for part in range(parts):
        file = f"{single.stem}-{part + 1:05}-of-{parts:05}.safetensors"
        keys = names[part::parts]
        save_file({key: tensors[key] for key in keys}, component / file)
        weight_map |= dict.fromkeys(keys, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (component / f"{single.stem}.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("parts", [2, 5])
def test_shards_in_any_number_load_the_same_weights(folder, parts):
    whole = Snapshot(NANO).transformer().state_dict()
    shard(folder / "transformer", parts)  # q, k and v of one block end up in different shards
    split = Snapshot(folder).transformer().state_dict()
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_dtype_is_the_files_unless_asked(folder):
    snapshot = Snapshot(folder)
    assert snapshot.component("transformer").dtype() == torch.bfloat16
    assert {p.dtype for p in snapshot.transformer().parameters()} == {torch.bfloat16}
    assert {p.dtype for p in snapshot.transformer(dtype=torch.float32).parameters()} == {torch.float32}


def test_weights_stay_in_the_file_mapping(tmp_path):
    """Tensors that are neither cast nor fused are views of the mapped file: reading them allocates nothing."""
    size = 64 * 2**20
    save_file({"weight": torch.randn(1024, size // 4096)}, tmp_path / "w.safetensors")
    before = process_memory.anonymous()
    tensor = TensorFiles([tmp_path / "w.safetensors"]).read("weight")
    checksum = tensor.sum()
    assert torch.isfinite(checksum)
    assert process_memory.anonymous() - before < size / 4


def test_loading_a_cast_model_holds_one_copy(folder):
    """float32 weights read as bfloat16 need the bfloat16 model and one tensor, not both models."""
    single = folder / "transformer" / WEIGHTS
    save_file({key: value.float() for key, value in load_file(single).items()}, single)
    model = Snapshot(folder).transformer(dtype=torch.bfloat16)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.numel() * 2 for p in model.parameters())


def test_nothing_is_left_on_meta_and_nothing_trains(folder):
    snapshot = Snapshot(folder)
    for model in (snapshot.transformer(), snapshot.text_encoder(), snapshot.vae()):
        tensors = [*model.parameters(), *model.buffers()]
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
        assert not model.training


# What goes wrong, and the words that must name it


def refuse(action, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        action()
    for word in words:
        assert word in str(error.value), f"{word!r} not in {error.value!s}"


def test_no_such_folder(tmp_path):
    refuse(lambda: Snapshot(tmp_path / "nowhere"), "nowhere", "no such folder", "transformer/")


def test_missing_config(folder):
    (folder / "transformer" / "config.json").unlink()
    refuse(Snapshot(folder).transformer, "My-Model/transformer/config.json", "missing", "download")


def test_missing_component(folder):
    shutil.rmtree(folder / "text_encoder")
    refuse(Snapshot(folder).text_encoder, "My-Model", "text_encoder/", "missing")


def test_broken_json(folder):
    (folder / "vae" / "config.json").write_text('{"_class_name": ')
    refuse(Snapshot(folder).vae, "vae/config.json", "not a JSON file")
    (folder / "vae" / "config.json").write_text("[1, 2]")
    refuse(Snapshot(folder).vae, "vae/config.json", "expected a JSON object, found list")


def test_missing_shard(folder):
    shard(folder / "transformer", 3)
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    refuse(Snapshot(folder).transformer, "My-Model/transformer", "1 of 3 shards", "-00002-of-00003", "download")


def test_shard_of_another_download(folder):
    shard(folder / "transformer", 3)
    last = folder / "transformer" / "diffusion_pytorch_model-00003-of-00003.safetensors"
    tensors = load_file(last)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, last)
    refuse(Snapshot(folder).transformer, last.name, lost, "index")


def test_an_index_that_points_elsewhere(folder):
    shard(folder / "transformer", 2)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"] = dict.fromkeys(raw["weight_map"], "../../secret.safetensors")
    index.write_text(json.dumps(raw))
    refuse(Snapshot(folder).transformer, index.name, "outside its folder")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1000])
def test_truncated_file(folder, kept):
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refuse(Snapshot(folder).transformer, str(path), "truncated", "download")


def test_weights_of_another_component(folder):
    shutil.copy(folder / "vae" / WEIGHTS, folder / "transformer" / WEIGHTS)
    refuse(
        Snapshot(folder).transformer,
        "this is an AutoencoderKL (VAE), not a Z-Image transformer",
        f"My-Model/transformer/{WEIGHTS})",
        "put the snapshot's own transformer/ here",
    )


@pytest.mark.parametrize(
    "name, keys",
    [
        ("a Flux model", ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"]),
        ("a LoRA", ["diffusion_model.layers.0.attention.qkv.lora_A.weight"]),
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_weights_of_another_model_are_named(folder, name, keys, parts):
    path = folder / "transformer" / WEIGHTS
    save_file({key: torch.zeros(1) for key in [*keys, "one.more.weight"]}, path)
    if parts > 1:
        shard(folder / "transformer", parts)
    refuse(Snapshot(folder).transformer, "My-Model/transformer", f"this is {name}, not a Z-Image transformer;")


def test_weights_of_nothing_known(folder):
    save_file({f"layers.{i}.w": torch.zeros(1) for i in range(9)}, folder / "transformer" / WEIGHTS)
    refuse(
        Snapshot(folder).transformer,
        f"My-Model/transformer/{WEIGHTS})",
        "these weights don't",
        "missing x_pad_token",
        "unknown layers.0.w",
        "more",
    )


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    "kind, prefix", [("transformer", "model.diffusion_model."), ("text_encoder", "text_encoder."), ("vae", "vae.")]
)
def test_prefixes_of_single_files_come_off_in_a_snapshot_as_well(folder, kind, prefix, parts):
    (path,) = (folder / kind).glob("*.safetensors")
    save_file({prefix + key: value for key, value in load_file(path).items()}, path)
    if parts > 1:
        shard(folder / kind, parts)
    expected, found = (Snapshot(place).component(kind).state_dict() for place in (NANO, folder))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_one_lost_and_one_extra_tensor(folder):
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    del tensors["layers.0.attention.to_k.weight"]
    tensors["surprise"] = torch.zeros(1)
    save_file(tensors, path)
    refuse(
        Snapshot(folder).transformer,
        "unknown surprise",
        "layers.0.attention.to_q.weight",
        "layers.0.attention.to_v.weight",
    )


def test_config_and_weights_of_different_sizes(folder):
    path = folder / "transformer" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "cap_feat_dim": raw["cap_feat_dim"] * 2}))
    refuse(Snapshot(folder).transformer, "cap_embedder.0.weight", "shape", "config.json")


def test_a_quantized_dtype_is_named(folder):
    path = folder / "transformer" / WEIGHTS
    save_file({key: value.to(torch.int8) for key, value in load_file(path).items()}, path)
    refuse(Snapshot(folder).component("transformer").dtype, str(path), "I8")


def test_two_weight_files_without_an_index(folder):
    path = folder / "vae" / WEIGHTS
    shutil.copy(path, path.with_name("other.safetensors"))
    refuse(Snapshot(folder).vae, "My-Model/vae", "other.safetensors", WEIGHTS)


def test_missing_tokenizer_file(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    refuse(Snapshot(folder).tokenizer, "tokenizer/tokenizer.json", "missing")


def test_pickles_are_not_weights(folder):
    path = folder / "vae" / WEIGHTS
    path.rename(path.with_suffix(".bin"))
    refuse(Snapshot(folder).vae, "My-Model/vae", "safetensors")
