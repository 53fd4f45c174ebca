"""Weights that are split over files, in every way that they are published: whole from any part, or told which it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.errors import CheckpointError
from zimage_core.weights.snapshot import (
    Snapshot,
    one_of_each_set,
    open_component,
    open_model,
    open_tokenizer,
    parts_of,
    snapshot_folder,
)

from .helpers import NANO
from .test_single_files import KINDS, metadata, same


def split(folder: Path, kind: str, names: list[str], index: str | None = None) -> list[Path]:
    """The nano model's weights of this kind in files of these names, with an index beside them."""
    (single,) = (NANO / kind).glob("*.safetensors")
    tensors = load_file(single)
    folder.mkdir(exist_ok=True)
    weight_map = {key: names[number % len(names)] for number, key in enumerate(sorted(tensors))}
    for name in names:
        own = {key: tensors[key] for key in tensors if weight_map[key] == name}
        save_file(own, folder / name, metadata(kind))
    if index:
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return [folder / name for name in names]


NUMBERED = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
NAMED = ["z_image_bottom.safetensors", "z_image_top.safetensors"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names, index",
    [(NUMBERED, None), (NUMBERED, "m.safetensors.index.json"), (NAMED, "i.safetensors.index.json")],
)
def test_any_part_stands_for_the_whole(tmp_path, kind, names, index):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors.index.json").write_text("{")
    for part in split(tmp_path, kind, names, index):
        same(kind, part)
    assert parts_of(tmp_path / "other.safetensors") == [tmp_path / "other.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_without_the_others_says_which_it_is(tmp_path, kind):
    first, second, third = split(tmp_path, kind, NUMBERED)
    first.unlink()
    with pytest.raises(CheckpointError) as error:
        open_component(second, kind)
    assert str(error.value) == (
        f"this is part 2 of 3 of a model that is split over files, and {first.name} is not beside it; "
        f"put all 3 into one folder ({second})"
    )
    third.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name}, {third.name} are not beside it"):
        open_component(second, kind)


def test_a_part_that_an_index_misses_is_named(tmp_path):
    split(tmp_path, "vae", NAMED, "i.safetensors.index.json")[0].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing \(z_image_bottom.safetensors\)"):
        open_component(tmp_path / NAMED[1], "vae")


@pytest.mark.parametrize("name", ["Qwen3-4B", "text_encoder"])
def test_the_folder_of_one_component(tmp_path, name):
    folder = tmp_path / name
    split(folder, "text_encoder", NUMBERED, "model.safetensors.index.json")
    shutil.copy(NANO / "text_encoder" / "config.json", folder)
    same("text_encoder", folder)
    assert snapshot_folder(folder) is None
    for file in (NANO / "tokenizer").iterdir():
        shutil.copy(file, folder)
    assert open_tokenizer(folder)("a circle") == Snapshot(NANO).tokenizer()("a circle")


def test_the_folder_of_a_transformer_has_the_published_schedule(tmp_path):
    split(tmp_path / "My Turbo", "transformer", ["diffusion_pytorch_model.safetensors"])
    shutil.copy(NANO / "transformer" / "config.json", tmp_path / "My Turbo")
    opened = open_model(tmp_path / "My Turbo")
    assert opened.schedule.shift == 3.0 and opened.component.config.dim == 192


def test_folders_of_a_snapshot_stay_parts_of_it():
    assert snapshot_folder(NANO / "vae") == NANO and snapshot_folder(NANO) == NANO


def test_lists_have_one_entry_for_a_set():
    names = ["b.safetensors", *(f"sub/{name}" for name in NUMBERED), *NUMBERED[1:], "x-00001-of-00002.gguf"]
    expected = ["b.safetensors", NUMBERED[1], f"sub/{NUMBERED[0]}", "x-00001-of-00002.gguf"]
    assert one_of_each_set(names) == expected
