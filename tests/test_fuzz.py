"""Damaged files: each loads as what it says or is refused by name, quickly and in little memory.

What "it says" is read independently, by the safetensors library and by ggml's own package. `make test` damages some
sixty, always the same; `make test-all` thousands, others each day. FUZZ_SEED=2026-11-27 has those of that day again.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import re
import struct
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from zimage_core.config import TransformerConfig
from zimage_core.errors import CheckpointError
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.weights import packed
from zimage_core.weights.snapshot import open_component

from . import gguf_writing, process_memory

CONFIG = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [4, 6, 6],
    "axes_lens": [64, 32, 32],
    **dict.fromkeys(("cap_feat_dim", "dim"), 32),
    "in_channels": 16,
    **dict.fromkeys(("n_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("n_layers", "n_refiner_layers"), 1),
    "norm_eps": 1e-5,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
METADATA = {"zimage.transformer.config": json.dumps(CONFIG), "format": "pt"}
SECONDS = 2.0  # of processors
TYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "", 7, None)
NUMBERS = (0, 1, -1, 3, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**64, 10**30, 0.5, "1", None, True)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = ZImageTransformer(TransformerConfig.from_dict(CONFIG, ""))
    return {
        name: torch.randn(value.shape, generator=generator).bfloat16() for name, value in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    save_file(weights, folder / "m.safetensors", METADATA)
    gguf_writing.write(folder / "m.gguf", weights, gguf_writing.linear_weights("Q8_0"), strings=METADATA)
    return {suffix: (folder / f"m.{suffix}").read_bytes() for suffix in ("safetensors", "gguf")}


# Mutations of safetensors: the header is a JSON object after its length


def header_of(raw: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: dict | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def a_tensor(header: dict, rng: random.Random) -> dict:
    return header[rng.choice([name for name in header if name != "__metadata__"])]


def flip_header_bytes(raw: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def move_offsets(raw: bytes, rng: random.Random) -> bytes:
    header, data = header_of(raw)
    place = a_tensor(header, rng)["data_offsets"]
    place[rng.randrange(2)] = rng.choice((*NUMBERS, place[0] + 2, place[1] - 2, len(data) + 2))
    return joined(header, data)


def overlap_tensors(raw: bytes, rng: random.Random) -> bytes:
    header, data = header_of(raw)
    a_tensor(header, rng)["data_offsets"] = list(a_tensor(header, rng)["data_offsets"])
    return joined(header, data)


def other_dtype(raw: bytes, rng: random.Random) -> bytes:
    header, data = header_of(raw)
    a_tensor(header, rng)["dtype"] = rng.choice(TYPES)
    return joined(header, data)


def other_shape(raw: bytes, rng: random.Random) -> bytes:
    header, data = header_of(raw)
    entry = a_tensor(header, rng)
    shape = entry["shape"]
    options = [shape[::-1], [*shape, 1], [math.prod(shape)], [], [rng.choice(NUMBERS), *shape[1:]], {}, None, [[]]]
    entry["shape"] = rng.choice(options)
    return joined(header, data)


def huge_size(raw: bytes, rng: random.Random) -> bytes:
    length = rng.choice((2**63, 2**64 - 1, len(raw), len(raw) - 8, 99_999_999, 10**12, 0, 1))
    return length.to_bytes(8, "little") + raw[8:]


def truncate(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.choice((rng.randrange(len(raw)), rng.randrange(64)))]


def lengthen(raw: bytes, rng: random.Random) -> bytes:
    return raw + rng.randbytes(rng.choice((1, 8, 4096)))


def duplicate_key(raw: bytes, rng: random.Random) -> bytes:
    header, data = header_of(raw)
    name = rng.choice([name for name in header if name != "__metadata__"])
    text = json.dumps(header)
    return joined(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}", data)


def rename_key(raw: bytes, rng: random.Random) -> bytes:
    header, data = header_of(raw)
    name = rng.choice([name for name in header if name != "__metadata__"])
    changed = (name + "x", name[:-1], "model." + name, name + ".alpha")
    other = rng.choice((*changed, "", "a" * 10_000, "\ud800", "layers.\u0000"))
    return joined({other if key == name else key: value for key, value in header.items()}, data)


def drop_key(raw: bytes, rng: random.Random) -> bytes:
    header, data = header_of(raw)
    del header[rng.choice(list(header))]
    return joined(header, data)


def not_finite(raw: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    at = 8 + length + 2 * rng.randrange((len(raw) - 8 - length) // 2)
    return raw[:at] + rng.choice((b"\xc0\x7f", b"\x80\xff", b"\x80\x7f")) + raw[at + 2 :]


def flip_data_bytes(raw: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    at = rng.randrange(8 + length, len(raw))
    return raw[:at] + bytes([raw[at] ^ rng.randrange(1, 256)]) + raw[at + 1 :]


def absurd_metadata(raw: bytes, rng: random.Random) -> bytes:
    header, data = header_of(raw)
    kind = rng.randrange(6)
    if kind == 0:
        header["__metadata__"] = rng.choice((7, [], None, "x", {"a": 1}, {"a": {"b": "c"}}))
    elif kind == 1:
        header["__metadata__"]["_quantization_metadata"] = rng.choice(
            ("{", "[]", "7", '{"layers": 7}', '{"layers": {"layers.0.attention.qkv": {"format": "nvfp4"}}}')
        )
    elif kind == 2:
        config = {**CONFIG, rng.choice(list(CONFIG)): rng.choice((*NUMBERS, [], {}, "x", [0], [2**40]))}
        header["__metadata__"]["zimage.transformer.config"] = json.dumps(config)
    elif kind == 3:
        header["__metadata__"]["zimage.transformer.config"] = rng.choice(("", "{", "[]", "null", "[" * 5000, "\u0000"))
    elif kind == 4:
        header["__metadata__"] |= {f"key {number}": "x" * 50 for number in range(2000)}
    else:
        text = json.dumps(header)
        return joined(text[:-1] + ', "deep": ' + "[" * rng.choice((50, 100_000)) + "]" * 50 + "}", data)
    return joined(header, data)


SAFETENSORS = (
    flip_header_bytes,
    move_offsets,
    overlap_tensors,
    other_dtype,
    other_shape,
    huge_size,
    truncate,
    lengthen,
    duplicate_key,
    rename_key,
    drop_key,
    not_finite,
    flip_data_bytes,
    absurd_metadata,
)


# Mutations of GGUF: fields one after the other, then the tensors

LAST = b"final_layer.adaLN_modulation.1.bias"  # of the tensors' names


def gguf_header_size(raw: bytes) -> int:
    return raw.rindex(LAST) + 60  # the names come last; a little beyond the last is close enough


def gguf_flip(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(gguf_header_size(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def gguf_number(raw: bytes, rng: random.Random) -> bytes:
    """A count, length, dimension or offset somewhere in the header becomes another number."""
    at = rng.choice((8, 16, rng.randrange(4, gguf_header_size(raw))))
    value = rng.choice((0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, rng.randrange(2**16)))
    return raw[:at] + struct.pack("<Q", value) + raw[at + 8 :]


def gguf_tensor_field(raw: bytes, rng: random.Random) -> bytes:
    """Dimensions, type or offset of one tensor."""
    names = [
        b"layers.0.attention.qkv.weight",
        b"x_embedder.weight",
        b"cap_embedder.1.bias",
        b"layers.0.ffn_norm1.weight",
    ]
    name = rng.choice(names)
    at = raw.index(name) + len(name)
    dimensions = int.from_bytes(raw[at : at + 4], "little")
    fields = {"count": (at, "I")}
    fields |= {f"size {number}": (at + 4 + 8 * number, "Q") for number in range(dimensions)}
    fields |= {"type": (at + 4 + 8 * dimensions, "I"), "offset": (at + 8 + 8 * dimensions, "Q")}
    where, form = fields[rng.choice(list(fields))]
    limit = 2 ** (8 * struct.calcsize(form))
    value = rng.choice((0, 1, 2, 8, 12, 31, 32, 64, 2**31, limit - 1, rng.randrange(50))) % limit
    return raw[:where] + struct.pack(f"<{form}", value) + raw[where + struct.calcsize(form) :]


def gguf_rename(raw: bytes, rng: random.Random) -> bytes:
    names = (b"layers.0.attention.qkv.weight", b"layers.0.attention.out.weight")
    other = rng.choice((b"context_refiner.0.x.y.weight\0", b"layers.0.attention.qkv.weighs", b"\xff" * 29))
    return raw.replace(names[0], other[:29])


def gguf_duplicate(raw: bytes, rng: random.Random) -> bytes:
    """Two tensors of one name."""
    kept, other = rng.sample([b"attention_norm1.weight", b"attention_norm2.weight"], 2)
    block = rng.choice((b"layers.0.", b"noise_refiner.0.", b"context_refiner.0."))
    return raw.replace(b"\0" + block + other, b"\0" + block + kept)


def gguf_metadata(raw: bytes, rng: random.Random) -> bytes:
    """The config among the metadata, in as many bytes."""
    text = METADATA["zimage.transformer.config"].encode()
    number = rng.choice(re.findall(rb"(?<=: )[0-9.e-]+(?=[,}])", text))
    other = rng.choice((b"9" * len(number), b"-" * len(number), b"0" * len(number), b"{" * len(number)))
    at = rng.choice([found.start() for found in re.finditer(re.escape(b": " + number), text)]) + 2
    whole = text[:at] + other + text[at + len(number) :]
    return raw.replace(text, rng.choice((whole, b"[" * len(text), b"\xff" * len(text))))


def gguf_data(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(gguf_header_size(raw) + 64, len(raw))
    return raw[:at] + rng.randbytes(1) + raw[at + 1 :]


GGUF = (
    gguf_flip,
    gguf_number,
    gguf_tensor_field,
    gguf_rename,
    gguf_duplicate,
    gguf_metadata,
    gguf_data,
    truncate,
    lengthen,
)
NUMBERS_ONLY = {not_finite, flip_data_bytes, gguf_data}  # what they leave is a file like any other


# What happens to them


def load(path: Path) -> dict[str, Tensor]:
    model = open_component(path, "transformer").build()
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return found | {name: layer.expanded() for name, layer in packed.layers(model).items()}


def same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape == (1, *theirs.shape):  # files have pad tokens either way
        theirs = theirs[None]
    return ours.shape == theirs.shape and torch.equal(
        torch.nan_to_num(ours.float(), nan=12345.0), torch.nan_to_num(theirs.float(), nan=12345.0)
    )


def safetensors_say(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


def ggml_says(path: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(tensor.shape[::-1].tolist())
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("suffix", "mutations", "say"), [("safetensors", SAFETENSORS, safetensors_say), ("gguf", GGUF, ggml_says)]
)
@pytest.mark.parametrize("each", [3, pytest.param(170, marks=pytest.mark.slow)])
def test_every_damaged_file_is_loaded_as_it_is_or_refused(tmp_path, whole, suffix, mutations, say, each):
    """So many of each mutation."""
    seed = f"{suffix} {os.environ['FUZZ_SEED'] if each > 3 else 'always'}"
    outcomes: Counter[tuple[str, str]] = Counter()
    slowest = 0.0
    for number in range(each * len(mutations)):
        mutation: Callable[[bytes, random.Random], bytes] = mutations[number % len(mutations)]
        path = tmp_path / f"m{number}.{suffix}"
        path.write_bytes(mutation(whole[suffix], random.Random(f"{seed} {number}")))
        started = time.process_time()
        try:
            found = load(path)
        except CheckpointError as error:
            assert str(path) in str(error), (seed, mutation.__name__, number, error)
            outcomes[mutation.__name__, "refused"] += 1
        else:
            expected = say(path)
            where = seed, mutation.__name__, number
            assert found.keys() <= expected.keys(), where
            assert all(same(value, expected[name]) for name, value in found.items()), where
            outcomes[mutation.__name__, "loaded"] += 1
        slowest = max(slowest, time.process_time() - started)
        path.unlink()
    assert slowest < SECONDS
    for mutation in mutations:
        refusals = outcomes[mutation.__name__, "refused"]
        assert (refusals > 0) == (mutation not in NUMBERS_ONLY), (seed, mutation.__name__)
    assert any(what == "loaded" for _, what in outcomes)


def test_whole_files_load(tmp_path, whole):
    """The mutations start from files that are right."""
    for suffix, say in (("safetensors", safetensors_say), ("gguf", ggml_says)):
        path = tmp_path / f"m.{suffix}"
        path.write_bytes(whole[suffix])
        expected = say(path)
        assert all(same(value, expected[name]) for name, value in load(path).items())


def test_refusing_takes_no_memory(tmp_path):
    """Sixty damaged files of 24 MB: reading them never takes twice their size."""
    value = torch.randn(3000, 4096).bfloat16()
    save_file({"cap_embedder.1.weight": value}, tmp_path / "w.safetensors", METADATA)
    gguf_writing.write(tmp_path / "w.gguf", {"cap_embedder.1.weight": value}, lambda *_: "BF16", strings=METADATA)
    gc.freeze()  # what earlier tests left isn't looked through for garbage sixty times
    try:
        for suffix, mutations in (("safetensors", SAFETENSORS), ("gguf", (truncate, lengthen, gguf_number_of_one))):
            raw = (tmp_path / f"w.{suffix}").read_bytes()
            for number in range(30):
                path = tmp_path / f"m.{suffix}"
                path.write_bytes(mutations[number % len(mutations)](raw, random.Random(number)))
                assert process_memory.growth(partial(refused, path)) < 2 * len(raw)
    finally:
        gc.unfreeze()


def refused(path: Path) -> None:
    with pytest.raises(CheckpointError):
        load(path)


def gguf_number_of_one(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(8, 300)
    return raw[:at] + struct.pack("<Q", rng.choice((2**30, 2**40, 2**64 - 1))) + raw[at + 8 :]
