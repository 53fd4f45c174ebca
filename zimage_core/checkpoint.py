"""Snapshot folders: find the files, read their keys through `key_maps`, load them strictly without a second copy.

A snapshot is the Hugging Face layout: `transformer/`, `text_encoder/`, `tokenizer/`, `vae/`, `scheduler/`, each with
its config, weights in one safetensors file or in shards listed by an index. Nothing is downloaded, no pickle is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import key_maps
from .config import CheckpointError, SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from .key_maps import KeyMap
from .text_encoder import TextEncoder
from .tokenizer import Tokenizer
from .transformer import ZImageTransformer
from .vae import AutoencoderKL

__all__ = ["CheckpointError", "Snapshot"]

INDEX = ".safetensors.index.json"
SHOWN_KEYS = 5  # of a list of keys in an error


class Snapshot:
    """One model folder. Opening it reads nothing; each method reads what it needs and says what is wrong with it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder}: there is no such folder; expected a Z-Image snapshot with "
                "transformer/, text_encoder/, tokenizer/, vae/ and scheduler/"
            )

    # Configurations

    def transformer_config(self) -> TransformerConfig:
        return TransformerConfig.from_dict(*self._json("transformer", "config.json"))

    def text_encoder_config(self) -> TextEncoderConfig:
        return TextEncoderConfig.from_dict(*self._json("text_encoder", "config.json"))

    def vae_config(self) -> VAEConfig:
        return VAEConfig.from_dict(*self._json("vae", "config.json"))

    def scheduler_config(self) -> SchedulerConfig:
        return SchedulerConfig.from_dict(*self._json("scheduler", "scheduler_config.json"))

    # Components

    def transformer(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> ZImageTransformer:
        """The S3-DiT, ready to run. `dtype` None keeps the file's."""
        model = ZImageTransformer(self.transformer_config(), device="meta", dtype=dtype)
        self.load_transformer(model, device=device, dtype=dtype)
        return model

    def text_encoder(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> TextEncoder:
        """The Qwen3 encoder, ready to run. `dtype` None keeps the file's."""
        model = TextEncoder(self.text_encoder_config(), device="meta", dtype=dtype)
        self.load_text_encoder(model, device=device, dtype=dtype)
        return model

    def vae(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> AutoencoderKL:
        """The autoencoder, ready to run. `dtype` None keeps the file's."""
        model = AutoencoderKL(self.vae_config(), device="meta", dtype=dtype)
        self.load_vae(model, device=device, dtype=dtype)
        return model

    def tokenizer(self) -> Tokenizer:
        folder = self._component("tokenizer")
        for name in ("tokenizer_config.json", "tokenizer.json"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: the file is missing; download the tokenizer folder again")
        try:
            return Tokenizer(folder)
        except Exception as error:  # transformers raises many types; each means that the folder is unusable
            raise CheckpointError(f"{folder}: the tokenizer can't be read ({error}); download it again") from error

    # Weights into modules that somebody else built (a host, say), usually on the meta device

    def load_transformer(self, model: nn.Module, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> None:
        self._load("transformer", model, key_maps.TRANSFORMER, device, dtype)

    def load_text_encoder(self, model: nn.Module, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> None:
        layers = self.text_encoder_config().num_hidden_layers
        self._load("text_encoder", model, key_maps.text_encoder(layers), device, dtype)

    def load_vae(self, model: nn.Module, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> None:
        levels = len(self.vae_config().block_out_channels)
        self._load("vae", model, key_maps.vae(levels), device, dtype)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, as its index lists them or the single one."""
        folder = self._component(component)
        indices = sorted(folder.glob(f"*{INDEX}"))
        if len(indices) > 1:
            names = ", ".join(path.name for path in indices)
            raise CheckpointError(f"{folder}: several indices ({names}); keep the one of the weights you want")
        if indices:
            return _indexed_files(indices[0])
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            found = ", ".join(path.name for path in files) or "none"
            raise CheckpointError(
                f"{folder}: expected one .safetensors file or an index of several (*{INDEX}), found {found}; "
                "the download is incomplete or the weights are in another format"
            )
        return files

    def weight_dtype(self, component: str) -> torch.dtype:
        """The dtype of most of a component's values, from the file headers alone."""
        counts: dict[torch.dtype, int] = {}
        for path in self.weight_files(component):
            with _open(path) as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(key)
                    dtype = _DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"{path}: {key} is stored as {part.get_dtype()}, expected one of {', '.join(_DTYPES)}"
                        )
                    counts[dtype] = counts.get(dtype, 0) + torch.Size(part.get_shape()).numel()
        return max(counts, key=lambda dtype: counts[dtype])

    def _load(self, component: str, model: nn.Module, key_map: KeyMap, device: Any, dtype: torch.dtype | None) -> None:
        """Checks every key and shape against `model` from the headers, then assigns the file-mapped tensors.

        Only tensors that are cast, moved or fused are copied, one at a time.
        """
        wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        with ExitStack() as stack:
            files = {path: stack.enter_context(_open(path)) for path in self.weight_files(component)}
            home = {key: path for path, file in files.items() for key in file.keys()}  # noqa: SIM118
            sources = key_map.sources(home)
            self._check_keys(component, wanted, sources, key_map)
            loaded: dict[str, Tensor] = {}
            for name, shape in wanted.items():
                parts = [_read(files[home[key]], home[key], key) for key in sources[name]]
                if len(parts) > 1:
                    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
                        shapes = ", ".join(f"{k} {list(p.shape)}" for k, p in zip(sources[name], parts, strict=True))
                        raise CheckpointError(f"{home[sources[name][0]]}: shapes don't fit together: {shapes}")
                    tensor = torch.cat([part.to(device=device, dtype=dtype) for part in parts])
                else:
                    tensor = parts[0].to(device=device, dtype=dtype)
                if tensor.ndim == 2 and key_map.is_flat(name):
                    tensor = tensor[..., None, None]
                if tuple(tensor.shape) != shape:
                    raise CheckpointError(
                        f"{home[sources[name][0]]}: {sources[name][0]} has shape {list(tensor.shape)}, but "
                        f"{component}/config.json asks for {list(shape)}; config and weights are of different models"
                    )
                loaded[name] = tensor
        model.load_state_dict(loaded, strict=True, assign=True)
        model.requires_grad_(False).eval()
        model.to(device)  # the buffers

    def _check_keys(
        self, component: str, wanted: dict[str, Any], sources: dict[str, list[str]], key_map: KeyMap
    ) -> None:
        missing = [name for name in wanted if name not in sources]
        unexpected = [key for name, keys in sources.items() if name not in wanted for key in keys]
        ill = [
            key
            for name, keys in sources.items()
            if name in wanted and not key_map.is_complete(name, keys)
            for key in keys
        ]
        if missing or unexpected or ill:
            problems = [
                f"{what} {_some(keys)}"
                for what, keys in (("missing", missing), ("unknown", unexpected), ("incomplete or double", ill))
                if keys
            ]
            files = ", ".join(path.name for path in self.weight_files(component))
            raise CheckpointError(
                f"{self.folder / component}: the weights in {files} don't belong to this {component.replace('_', ' ')} "
                f"({'; '.join(problems)}); check that the folder holds Z-Image's own files, and download them again"
            )

    def _component(self, component: str) -> Path:
        folder = self.folder / component
        if not folder.is_dir():
            raise CheckpointError(f"{self.folder}: the folder {component}/ is missing; the snapshot is incomplete")
        return folder

    def _json(self, component: str, name: str) -> tuple[dict[str, Any], str]:
        path = self._component(component) / name
        return _read_json(path), str(path)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; the snapshot is incomplete, download it again")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}; download it again")
    return raw


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it; download the file again")
    names = sorted(set(weight_map.values()))
    if foreign := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index}: weight_map points outside its folder ({foreign[0]!r}); download it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(names)} shards missing ({_some(missing)}), "
            f"listed in {index.name}; the download is incomplete, download them again"
        )
    files = [index.parent / name for name in names]
    for path in files:
        with _open(path) as file:
            absent = {key for key, name in weight_map.items() if name == path.name} - set(file.keys())
        if absent:
            raise CheckpointError(
                f"{path}: lacks {_some(sorted(absent))}, which {index.name} says it holds; "
                "index and shards are of different downloads"
            )
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file ({error}); download the file again"
        ) from error


def _read(file: Any, path: Path, key: str) -> Tensor:
    try:
        return file.get_tensor(key)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {key} can't be read ({error}); download the file again") from error


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN_KEYS])
    return shown if len(names) <= SHOWN_KEYS else f"{shown} and {len(names) - SHOWN_KEYS} more"


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
