"""Headers are checked byte by byte: whatever is no whole safetensors file is refused with its name."""

from __future__ import annotations

import json
import logging
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.errors import CheckpointError
from zimage_core.lora import files as lora
from zimage_core.weights.snapshot import open_component
from zimage_core.weights.tensor_files import BITS, DTYPES, OTHERS, TensorFiles, map_safetensors, read_header

from . import gguf_writing
from .helpers import NANO


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    message = str(error.value)
    assert message.endswith(f" ({path})")
    return message


ONE = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def test_what_is_written_is_read(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4, dtype=torch.uint8), "c": torch.tensor(1.0).bfloat16()}
    save_file(tensors, tmp_path / "w.safetensors", {"note": "x"})
    files = TensorFiles([tmp_path / "w.safetensors"])
    assert files.metadata == {"note": "x"}
    assert files.shapes() == {"a": (2, 3), "b": (4,), "c": ()}
    assert all(torch.equal(files.read(key), tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"\n  <html></html>", "a web page"),
        (b"PK\x03\x04\x00\x00archive/data.pkl", "never opened"),
        (b"\x80\x02}q\x00.", "never opened"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"abc", "truncated, or not a safetensors file"),
        (b"\xff" * 100, "truncated, or not a safetensors file"),
    ],
)
def test_other_content_is_named(tmp_path, content, words):
    (tmp_path / "m.safetensors").write_bytes(content)
    assert words in refused(tmp_path / "m.safetensors")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".PTH", ".bin"])
def test_pickles_are_never_opened(tmp_path, suffix):
    assert "never opened" in refused(tmp_path / f"absent{suffix}")  # by its name alone: there is no such file


@pytest.mark.parametrize(
    "header, data, words",
    [
        (b"{broken", b"", "header is damaged"),
        (b"{" + b'"a":' + b"[" * 100_000, b"", "header is damaged"),
        (b'{"w": 1, "w": 2}', b"", "w is in the header twice"),
        ({"w": 3}, b"", "entry of w is damaged"),
        ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "entry of w is damaged"),
        ({"w": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "w is stored as 'Q4'"),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8), "shape or place of w"),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4), "shape or place of w"),
        ({"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}}, bytes(8), "w has 8 bytes"),
        ({"w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "w has 8 bytes"),
        (ONE, bytes(4), "truncated, 4 bytes of weights where its header says 8"),
        (ONE, bytes(9), "too long, 9 bytes"),
        ({**ONE, "v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12), "v lies at byte 4"),
        ({**ONE, "v": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, bytes(16), "v lies at byte 12"),
        (
            {"__metadata__": {"b": "x", "a": 1}, **ONE},
            bytes(8),
            "'a' in the header's __metadata__ is 1, expected a string",
        ),
        ({"__metadata__": {"a": None}, **ONE}, bytes(8), "'a' in the header's __metadata__ is null, expected a string"),
        ({"__metadata__": [1], **ONE}, bytes(8), "__metadata__ in the header is [1], expected an object"),
        ({"__metadata__": {}}, b"", "no tensor"),
    ],
)
def test_damaged_headers(tmp_path, header, data, words):
    assert words in refused(write(tmp_path / "m.safetensors", header, data))


@pytest.mark.parametrize("map_file", [map_safetensors, None])
def test_metadata_that_is_null_is_none(tmp_path, map_file):
    files = TensorFiles([write(tmp_path / "m.safetensors", {"__metadata__": None, **ONE}, bytes(8))], map_file)
    assert files.metadata == {} and files.read("w").abs().sum() == 0


def test_a_key_in_two_shards(tmp_path):
    paths = [write(tmp_path / f"{name}.safetensors", ONE, bytes(8)) for name in "ab"]
    with pytest.raises(CheckpointError, match=r"w is in a\.safetensors, too.*b\.safetensors\)$"):
        TensorFiles(paths)


def test_a_file_that_changes_after_its_header_was_read(tmp_path):
    path = write(tmp_path / "m.safetensors", ONE, bytes(8))
    files = TensorFiles([path])
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"w can't be read.*m\.safetensors\)$"):
        files.read("w")


# Copied instead of mapped


def test_copies_are_what_is_mapped(tmp_path):
    """Every dtype of the format, at places that fit no dtype, and both kinds of GGUF's."""
    dtypes = {**DTYPES, **OTHERS}
    assert dtypes.keys() == BITS.keys()
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "none": torch.zeros(0, 4), "one": torch.tensor(2.0)}
    for name, dtype in dtypes.items():
        raw = torch.randint(0, 2 if name == "BOOL" else 256, (6, 4, dtype.itemsize), dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(6, 4)
    save_file(tensors, tmp_path / "w.safetensors")
    weights = {"plain": torch.randn(4, 64), "packed": torch.randn(4, 64)}
    gguf_writing.write(tmp_path / "w.gguf", weights, lambda name, _: "Q8_0" if name == "packed" else "F16")
    for file in (tmp_path / "w.safetensors", tmp_path / "w.gguf"):
        mapped, copied = TensorFiles([file]), TensorFiles([file], map_file=None)
        for key in mapped.entries:
            one, other = mapped.read(key), copied.read(key)
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def test_a_copy_outlives_its_file(tmp_path):
    """A mapped tensor would end the process here: the pages behind it are gone."""
    path = tmp_path / "w.safetensors"
    save_file({"first": torch.ones(100_000), "second": torch.ones(100_000)}, path)
    files = TensorFiles([path], map_file=None)
    first = files.read("first")
    path.write_bytes(b"")
    assert first.sum() == 100_000
    with pytest.raises(CheckpointError, match="second can't be read .the file has changed since it was opened"):
        files.read("second")


@pytest.mark.parametrize("kind", ["transformer", "text_encoder", "vae"])
def test_a_component_may_be_copied(kind):
    mapped, copied = (open_component(NANO, kind, map_file=how).state_dict() for how in (map_safetensors, None))
    assert all(torch.equal(mapped[name], copied[name]) for name in mapped) and mapped.keys() == copied.keys()


def test_a_name_that_is_not_utf8(tmp_path):
    """The safetensors library refuses it; tensors are copied then."""
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(path)
    assert torch.equal(TensorFiles([path]).read("w"), torch.ones(3))


# Keys that name an attention kernel


CONFIG = torch.tensor(list(b'{"attention": "comfy_kitchen_int8"}'), dtype=torch.uint8)


def shown(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "comfy_attention.config" in record.getMessage()]


@pytest.mark.parametrize(
    "kind, layer",
    [
        ("transformer", "layers.1.attention"),
        ("transformer", "model.diffusion_model.layers.1.attention"),
        ("text_encoder", "model.layers.0.self_attn"),
        ("vae", "decoder.mid.attn_1"),
    ],
)
def test_attention_keys_are_left_out_of_models(tmp_path, caplog, kind, layer):
    prefix = "model.diffusion_model." if layer.startswith("model.diffusion") else ""
    plain = open_component(NANO, kind).state_dict()
    tensors = {prefix + name: tensor.clone() for name, tensor in plain.items()}
    config = {f"zimage.{kind}.config": (NANO / kind / "config.json").read_text()}
    save_file({**tensors, f"{layer}.comfy_attention.config": CONFIG}, tmp_path / "m.safetensors", config)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found = open_component(tmp_path / "m.safetensors", kind).state_dict()
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    (message,) = shown(caplog)
    assert message.startswith(f"{tmp_path / 'm.safetensors'} names an attention kernel for 1 of its layers")


def test_attention_keys_are_left_out_of_loras_and_gguf(tmp_path, caplog):
    name = "diffusion_model.layers.1.attention"
    factors = {f"{name}.qkv.lora_A.weight": torch.randn(4, 192), f"{name}.qkv.lora_B.weight": torch.randn(576, 4)}
    save_file({**factors, f"{name}.comfy_attention.config": CONFIG}, tmp_path / "l.safetensors")
    weights = {"layers.0.attention.qkv.weight": torch.randn(4, 64), "layers.0.attention.comfy_attention.config": CONFIG}
    gguf_writing.write(tmp_path / "m.gguf", weights, lambda *_: "F32")
    with caplog.at_level(logging.INFO):
        opened = lora.open_lora(
            tmp_path / "l.safetensors", {"transformer": {"layers.1.attention.qkv.weight": (576, 192)}}
        )
        assert (opened.matched, opened.total, opened.left) == (2, 2, ())
        assert list(TensorFiles([tmp_path / "m.gguf"]).entries) == ["layers.0.attention.qkv.weight"]
    assert len(shown(caplog)) == 2
