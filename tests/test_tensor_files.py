"""Headers are checked byte by byte: whatever is no whole safetensors file is refused with its name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.config import CheckpointError
from zimage_core.tensor_files import TensorFiles, read_header


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
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
        ({"__metadata__": {"a": 1}, **ONE}, bytes(8), "metadata in the header is damaged"),
        ({"__metadata__": {}}, b"", "no tensor"),
    ],
)
def test_damaged_headers(tmp_path, header, data, words):
    assert words in refused(write(tmp_path / "m.safetensors", header, data))


def test_a_key_in_two_shards(tmp_path):
    paths = [write(tmp_path / f"{name}.safetensors", ONE, bytes(8)) for name in "ab"]
    with pytest.raises(CheckpointError, match=r"b\.safetensors: w is in a\.safetensors, too"):
        TensorFiles(paths)


def test_a_file_that_changes_after_its_header_was_read(tmp_path):
    path = write(tmp_path / "m.safetensors", ONE, bytes(8))
    files = TensorFiles([path])
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: w can't be read"):
        files.read("w")
