"""GGUF files for tests, written by ggml's own package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

Numbers = dict[str, np.ndarray]


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    choose: Callable[[str, Tensor], str],
    *,
    strings: Mapping[str, str] | None = None,
    architecture: str = "lumina2",
) -> Numbers:
    """Writes the tensors in the types that `choose(name, tensor)` names; returns the numbers that the file means."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (strings or {}).items():
        writer.add_string(key, value)
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(100)])
    meant: Numbers = {}
    for name, tensor in tensors.items():
        kind = getattr(gguf.GGMLQuantizationType, choose(name, tensor))
        values = tensor.float().numpy()
        raw = _random_blocks(values, kind) if kind in _UNWRITABLE else gguf.quants.quantize(values, kind)
        meant[name] = gguf.quants.dequantize(raw, kind).reshape(values.shape)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


# types that the package reads but can't make: their scales are set to small numbers, their bits are drawn
_UNWRITABLE = {getattr(gguf.GGMLQuantizationType, name) for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")}
_UNWRITABLE |= {getattr(gguf.GGMLQuantizationType, name) for name in ("IQ4_XS", "IQ2_XS", "IQ3_S")}
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where halves lie


def _random_blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size)
    raw = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    half = np.frombuffer(np.float16(0.0005).tobytes(), dtype=np.uint8)
    for at in _SCALES.get(kind.name, (0,)):
        raw[:, at : at + 2] = half
    return raw.reshape(len(values), -1)


def linear_weights(kind: str) -> Callable[[str, Tensor], str]:
    """The given type for matrices whose rows are whole blocks, float32 for what is not a matrix, else bfloat16."""
    block = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, kind)][0]

    def choose(name: str, tensor: Tensor) -> str:
        if tensor.ndim != 2 or "pad_token" in name:
            return "F32"
        return kind if tensor.shape[1] % block == 0 else "BF16"

    return choose


def as_tensors(meant: Numbers) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in meant.items()}
