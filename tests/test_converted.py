"""Converted weights kept as a file: the same bits, mapped, written anew where they changed, whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from zimage_core.errors import CheckpointError
from zimage_core.weights import converted
from zimage_core.weights.component import Component
from zimage_core.weights.snapshot import Snapshot, open_component

from . import process_memory
from .gguf_writing import linear_weights, write

NANO = Path(__file__).resolve().parents[1] / "nano" / "snapshot"


@pytest.fixture
def snapshot(tmp_path) -> Path:
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def kept(snapshot: Path, folder: Path, dtype=torch.float32, kind="transformer", **settings) -> Component:
    component = Snapshot(snapshot).component(kind)
    return converted.cache_converted(component, dict.fromkeys(component.shapes, dtype), folder, **settings)


def assert_same(found: Component, snapshot: Path, dtype: torch.dtype | None) -> None:
    expected = Snapshot(snapshot).component(found.kind).state_dict(dtype)
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


@pytest.mark.parametrize(("kind", "dtype"), [("transformer", None), ("transformer", torch.float16)])
@pytest.mark.parametrize("again", [False, True])
def test_the_file_holds_the_same_weights(snapshot, tmp_path, kind, dtype, again):
    for _ in range(1 + again):
        found = kept(snapshot, tmp_path / "kept", dtype, kind)
    (file,) = (tmp_path / "kept").iterdir()
    assert found.files.paths == [file]
    assert_same(found, snapshot, dtype)
    with safe_open(file, framework="pt") as opened:  # as everybody else reads it
        assert set(opened.keys()) == set(found.shapes)


def test_the_next_load_writes_and_holds_nothing(snapshot, tmp_path):
    first = kept(snapshot, tmp_path / "kept").files.paths[0].stat()
    before = process_memory.anonymous()
    state = kept(snapshot, tmp_path / "kept").state_dict(torch.float32)
    assert sum(float(weight.sum()) for weight in state.values())
    assert process_memory.anonymous() - before < first.st_size / 2
    second = kept(snapshot, tmp_path / "kept").files.paths[0].stat()
    assert (first.st_mtime_ns, first.st_ino) == (second.st_mtime_ns, second.st_ino)


def test_what_its_file_holds_just_so_is_not_copied(snapshot, tmp_path):
    component = Snapshot(snapshot).component("text_encoder")
    dtypes = dict.fromkeys(component.shapes, component.dtype())
    assert converted.cache_converted(component, dtypes, tmp_path / "kept") is component
    assert not (tmp_path / "kept").exists()


def test_changed_weights_and_other_dtypes_are_not_taken_for_it(snapshot, tmp_path):
    kept(snapshot, tmp_path / "kept")
    kept(snapshot, tmp_path / "kept", torch.float16)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    file = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0x40
    file.write_bytes(raw)
    os.utime(file, ns=(1, 1))
    assert_same(kept(snapshot, tmp_path / "kept"), snapshot, torch.float32)
    assert len(list((tmp_path / "kept").iterdir())) == 2  # the old one is gone


def test_a_damaged_file_is_written_anew(snapshot, tmp_path):
    (file,) = kept(snapshot, tmp_path / "kept").files.paths
    file.write_bytes(file.read_bytes()[:-9])
    assert_same(kept(snapshot, tmp_path / "kept"), snapshot, torch.float32)


def test_quantized_weights_are_kept_expanded(snapshot, tmp_path):
    weights = {name: value.clone() for name, value in Snapshot(NANO).transformer().state_dict().items()}
    config = {"zimage.transformer.config": (NANO / "transformer" / "config.json").read_text()}
    write(tmp_path / "model.gguf", weights, linear_weights("Q8_0"), strings=config)
    component = open_component(tmp_path / "model.gguf", "transformer")
    found = converted.cache_converted(component, dict.fromkeys(component.shapes, torch.bfloat16), tmp_path / "kept")
    assert not any(found.packed(name) for name in found.shapes)
    expected = component.state_dict(torch.bfloat16)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("when", [0, 20])
def test_what_is_given_up_or_fails_leaves_nothing(snapshot, tmp_path, when):
    calls = []

    def between() -> None:
        calls.append(1)
        if len(calls) > when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(snapshot, tmp_path / "kept", between=between)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_full_disk_is_named(snapshot, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(converted, "_bytes", full)
    with pytest.raises(CheckpointError, match=r"kept here \(No space left on device\); they need 0.0 GB. Make room"):
        kept(snapshot, tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(CheckpointError, match="only 0.0 GB are free"):
        kept(snapshot, tmp_path / "kept")


def test_a_folder_that_is_none_is_named(snapshot, tmp_path):
    (tmp_path / "kept").write_text(json.dumps("a file"))
    with pytest.raises(CheckpointError, match="can't be kept here"):
        kept(snapshot, tmp_path / "kept")
