"""Weights into our networks: find the files, read their keys through `key_maps`, load strictly without a second copy.

Weights come from a snapshot (the Hugging Face folder layout: `transformer/`, `text_encoder/`, `tokenizer/`, `vae/`,
`scheduler/`, each with its config, weights in one safetensors file or in shards listed by an index), from one of its
folders, or from a single file in any published layout, alone or together with the other networks. What a file is, is
read from its content (`detect`). Nothing is downloaded, no pickle is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from ..diagnostics.finite import not_finite
from ..errors import CheckpointError
from ..model import numerics
from ..model.text_encoder import TextEncoder
from ..model.tokenizer import Tokenizer
from ..model.transformer import ZImageTransformer
from ..model.vae import AutoencoderKL
from . import identify, key_maps, packed, quantized
from .key_maps import KeyMap
from .tensor_files import DTYPES, MapFile, TensorFiles, map_safetensors, read_header

__all__ = [
    "Component",
    "Snapshot",
    "not_finite",
    "open_component",
    "open_tokenizer",
    "schedule_of",
]

INDEX = ".safetensors.index.json"
SHOWN_KEYS = 5  # of a list of keys in an error
CHECK = "check name and permissions"
PUBLISHED_SCHEDULE = SchedulerConfig(
    shift=3.0,
    use_dynamic_shifting=False,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
)  # of Z-Image-Turbo's scheduler_config.json and diffusers' defaults
LAYER_COUNTS = ("n_layers", "n_refiner_layers", "num_hidden_layers", "layers_per_block")  # fields of the configs
NETWORKS = {"transformer": ZImageTransformer, "text_encoder": TextEncoder, "vae": AutoencoderKL}


def open_component(path: str | Path, kind: str, *, map_file: MapFile | None = map_safetensors) -> Component:
    """The transformer, text_encoder or vae (`kind`) that a snapshot, a component's folder or a single file holds.

    map_file: how a file is mapped, whose pages weights stay where nothing is cast; None: all are copied, and the file
    is free again.
    Reads headers and configs only. Raises CheckpointError that says what the file is instead and what to do.
    """
    path = Path(path)
    if os.path.isdir(path):
        folder = snapshot_folder(path)
        if folder == path.parent and path.name != kind:
            raise CheckpointError(f"{path}: this is the {path.name} of a snapshot, expected its {kind}")
        return Snapshot(folder or path).component(kind, map_file=map_file)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: there is no such file or folder, or it can't be read; {CHECK}")
    return _from_file(path, kind, map_file)


def schedule_of(path: str | Path) -> SchedulerConfig:
    """A snapshot's schedule; for a single file, which says nothing of it, that of Turbo (shift 3)."""
    folder = snapshot_folder(path)
    return PUBLISHED_SCHEDULE if folder is None else Snapshot(folder).scheduler_config()


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a snapshot, or in a folder of its own."""
    folder = snapshot_folder(path)
    if folder is None:
        raise CheckpointError(
            f"{path}: a single file holds no tokenizer; name a snapshot of Z-Image or a folder with the tokenizer.json "
            "and tokenizer_config.json of Qwen3"
        )
    if os.path.isfile(folder / "tokenizer_config.json"):
        return _tokenizer(folder)
    return Snapshot(folder).tokenizer()


def snapshot_folder(path: str | Path) -> Path | None:
    """The snapshot that a folder is, holds (in the layout of a Hugging Face cache) or belongs to; None for a file."""
    path = Path(path)
    if os.path.isfile(path):
        return None
    if os.path.isdir(path / "snapshots"):
        return _revision(path)
    return path.parent if path.name in NETWORKS and os.path.isfile(path / "config.json") else path


class Component:
    """The weights of one network: in which files, under which names, and its numbers."""

    def __init__(
        self,
        kind: str,
        config: Any,
        files: TensorFiles,
        keys: Sequence[str] | None = None,
        prefix: str = "",
        config_source: str = "the file's other tensors",
    ):
        """config: of the class that its kind has. keys: those that belong to it, `prefix` included; None is all."""
        self.kind = kind
        self.files = files
        self.key_map = _key_map(kind, config)
        self.config = config
        self.config_source = config_source
        self.source = str(files.paths[0] if len(files.paths) == 1 else files.paths[0].parent)
        self.weights = quantized.Weights(files, files.entries if keys is None else keys)
        self._keys = {key.removeprefix(prefix): key for key in self.weights.keys}  # without prefix -> in the file
        self._sources = self.key_map.sources(self._keys)
        for name in LAYER_COUNTS:  # a network of absurd depth would take forever to build
            if getattr(config, name, 0) > len(self._keys):
                raise CheckpointError(
                    f"{self.source}: {name} is {getattr(config, name)} by {config_source}, but there are only "
                    f"{len(self._keys)} tensors; config and weights are of different models"
                )

    def build(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> Any:
        """The network, ready to run. `dtype` None keeps each tensor's own; what is quantized then becomes bfloat16.

        Checks every key and shape from the headers, then assigns the file-mapped tensors. Only tensors that are cast,
        moved, fused or quantized are copied, one at a time. Layers of a GGUF file stay as they are (`packed`).
        """
        shapes = self.shapes
        model = NETWORKS[self.kind](self.config, device="meta", dtype=dtype)
        for name, shape in shapes.items():
            parts = self.packed(name)
            if parts and all(part.is_gguf for part in parts):
                self._check_shape(name, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), shape)
                if packed.replace(model, name, parts, dtype or quantized.DEQUANTIZED):
                    continue
            path, _, last = name.rpartition(".")
            tensor = self.tensor(name, shape, device=device, dtype=dtype)
            setattr(model.get_submodule(path), last, nn.Parameter(tensor, requires_grad=False))
        if self.kind == "transformer" and (dtype or self.dtype()) == torch.float16:
            model.sums_fit_half = self.sums_fit_half()
        return model.requires_grad_(False).eval().to(device)  # the buffers

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All parameters by name, none packed, for a network that somebody else built (a host, say)."""
        return {name: self.tensor(name, shape, dtype=dtype) for name, shape in self.shapes.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape of the network. Raises CheckpointError unless the file holds all of them and no others."""
        model = NETWORKS[self.kind](self.config, device="meta")
        wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._check_keys(wanted)
        return wanted

    def dtype(self) -> torch.dtype:
        """That of most of its values, from the headers alone; what is quantized counts as what it becomes."""
        return self.weights.dtype()

    def sums_fit_half(self) -> bool:
        """Whether the tokens of a transformer may be float16, by its weights (`half.largest_sum`)."""

        def read(name: str) -> Tensor:
            return self.tensor(name, self.shapes[name], dtype=torch.float32)

        return numerics.largest_sum(read, self.config) < numerics.SUM_FITS

    def is_stored(self, name: str, dtype: torch.dtype | None = None) -> bool:
        """Whether the file holds a parameter just so: in one piece, not quantized, in that dtype (None is any)."""
        keys = [self._keys[key] for key in self._sources[name]]
        if len(keys) > 1 or self.weights.packed(keys[0]) is not None:
            return False
        return dtype in (None, DTYPES.get(self.files.entries[keys[0]].dtype))

    def packed(self, name: str) -> list[quantized.Packed]:
        """A parameter as its file has it, if it is quantized: the parts that are stacked by rows, mostly one."""
        parts = [self.weights.packed(self._keys[key]) for key in self._sources[name]]
        return [part for part in parts if part is not None] if all(parts) else []

    def tensor(
        self, name: str, shape: tuple[int, ...], *, device: Any = "cpu", dtype: torch.dtype | None = None
    ) -> Tensor:
        """A parameter's numbers, in the shape that the network has it."""
        keys = [self._keys[key] for key in self._sources[name]]
        parts = [self.weights.read(key, (shape[0] // len(keys), *shape[1:]), dtype) for key in keys]
        if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
            shapes = ", ".join(f"{key} {list(part.shape)}" for key, part in zip(keys, parts, strict=True))
            raise CheckpointError(f"{self._file(keys[0])}: shapes don't fit together: {shapes}")
        if len(parts) == 1:
            tensor = parts[0].to(device=device, dtype=dtype)
        else:  # each part is cast into its place, so that nothing is held twice
            rows = sum(len(part) for part in parts)
            tensor = torch.empty(rows, *parts[0].shape[1:], device=device, dtype=dtype or parts[0].dtype)
            for place, part in zip(tensor.split([len(part) for part in parts]), parts, strict=True):
                place.copy_(part)
        if tensor.ndim == 2 and self.key_map.is_flat(name):
            tensor = tensor[..., None, None]
        if name.endswith("pad_token") and tensor.ndim == 1:
            tensor = tensor[None]
        self._check_shape(name, tuple(tensor.shape), shape)
        return tensor

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            key = self._keys[self._sources[name][0]]
            raise CheckpointError(
                f"{self._file(key)}: {key} has shape {list(found)}, expected {list(expected)} by "
                f"{self.config_source}; config and weights are of different models"
            )

    def _check_keys(self, wanted: dict[str, Any]) -> None:
        missing = [name for name in wanted if name not in self._sources]
        unexpected = [key for name, keys in self._sources.items() if name not in wanted for key in keys]
        ill = [
            key
            for name, keys in self._sources.items()
            if name in wanted and not self.key_map.is_complete(name, keys)
            for key in keys
        ]
        if missing or unexpected or ill:
            problems = [
                f"{what} {_some(keys)}"
                for what, keys in (("missing", missing), ("unknown", unexpected), ("incomplete or double", ill))
                if keys
            ]
            raise CheckpointError(
                f"{self.source}: these weights don't belong to this {self.kind.replace('_', ' ')} "
                f"({'; '.join(problems)}); check that they are Z-Image's own, and download them again"
            )
        for name in wanted:
            for key in self._sources[name]:
                self.weights.check(self._keys[key])

    def _file(self, key: str) -> Path:
        return self.files.entries[key].path


def _from_file(path: Path, kind: str, map_file: MapFile | None) -> Component:
    files = TensorFiles([path], map_file)
    shapes = files.shapes()
    prefix = identify.prefix(kind, shapes)
    if prefix is None:
        raise identify.refusal(kind, shapes, str(path))
    foreign = identify.foreign_name(shapes)
    if foreign is not None and not identify.others(shapes, kind):
        raise identify.refusal(kind, shapes, str(path))
    apart = identify.others(shapes, kind)
    keys = [key for key in shapes if key.startswith(prefix) and not (prefix == "" and key.startswith(apart))]
    own = {key.removeprefix(prefix): shape for key, shape in quantized.Weights(files, keys).shapes().items()}
    config = identify.config(kind, own, files.metadata, str(path))
    return Component(kind, config, files, keys, prefix)


def _revision(cached: Path) -> Path:
    """The revision that `refs/main` names, or the only one."""
    folder, main = cached / "snapshots", cached / "refs" / "main"
    if os.path.isfile(main) and os.path.isdir(revision := folder / os.fsdecode(_read(main)).strip()):
        return revision
    revisions = [path for path in _listed(folder) if os.path.isdir(path)]
    if len(revisions) != 1:
        names = _some([path.name for path in revisions]) or "none"
        raise CheckpointError(f"{folder}: expected one revision, found {names}; name the one you want")
    return revisions[0]


def _key_map(kind: str, config: Any) -> KeyMap:
    if kind == "text_encoder":
        return key_maps.text_encoder(config.num_hidden_layers)
    return key_maps.vae(len(config.block_out_channels)) if kind == "vae" else key_maps.TRANSFORMER


class Snapshot:
    """One model folder. Opening it reads nothing; each method reads what it needs and says what is wrong with it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not os.path.isdir(self.folder):
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

    def component(self, kind: str, *, map_file: MapFile | None = map_safetensors) -> Component:
        """transformer, text_encoder or vae: its files found and their headers read."""
        config = {
            "transformer": self.transformer_config,
            "text_encoder": self.text_encoder_config,
            "vae": self.vae_config,
        }[kind]()
        files = TensorFiles(self.weight_files(kind), map_file)
        return Component(kind, config, files, config_source=f"{kind}/config.json")

    def transformer(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> ZImageTransformer:
        """The S3-DiT, ready to run. `dtype` None keeps the file's."""
        return self.component("transformer").build(device=device, dtype=dtype)

    def text_encoder(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> TextEncoder:
        """The Qwen3 encoder, ready to run. `dtype` None keeps the file's."""
        return self.component("text_encoder").build(device=device, dtype=dtype)

    def vae(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> AutoencoderKL:
        """The autoencoder, ready to run. `dtype` None keeps the file's."""
        return self.component("vae").build(device=device, dtype=dtype)

    def weight_dtype(self, kind: str) -> torch.dtype:
        """The dtype of most of a component's values, from the file headers alone."""
        return TensorFiles(self.weight_files(kind)).dtype()

    def tokenizer(self) -> Tokenizer:
        return _tokenizer(self._component("tokenizer"))

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, as its index lists them or the single one."""
        folder = self._component(component)
        indices = _listed(folder, INDEX)
        if len(indices) > 1:
            names = ", ".join(path.name for path in indices)
            raise CheckpointError(f"{folder}: several indices ({names}); keep the one of the weights you want")
        if indices:
            return _indexed_files(indices[0])
        files = _listed(folder, ".safetensors")
        if len(files) != 1:
            found = ", ".join(path.name for path in files) or "none"
            raise CheckpointError(
                f"{folder}: expected one .safetensors file or an index of several (*{INDEX}), found {found}; "
                "the download is incomplete or the weights are in another format"
            )
        return files

    def _component(self, component: str) -> Path:
        folder = self.folder / component
        if not os.path.isdir(folder):
            raise CheckpointError(f"{self.folder}: the folder {component}/ is missing; the snapshot is incomplete")
        return folder

    def _json(self, component: str, name: str) -> tuple[dict[str, Any], str]:
        path = self._component(component) / name
        return _read_json(path), str(path)


def _tokenizer(folder: Path) -> Tokenizer:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        if not os.path.isfile(folder / name):
            raise CheckpointError(f"{folder / name}: the file is missing; download the tokenizer folder again")
    try:
        return Tokenizer(folder)
    except Exception as error:  # transformers raises many types; each means that the folder is unusable
        raise CheckpointError(f"{folder}: the tokenizer can't be read ({error}); download it again") from error


def _listed(folder: Path, suffix: str = "") -> list[Path]:
    """What is in a folder, by name, of files with this ending only."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(suffix))
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be read ({error.strerror}); {CHECK}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror}); {CHECK}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: the file is missing; the snapshot is incomplete, download it again")
    try:
        raw = json.loads(_read(path))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
    if missing := [name for name in names if not os.path.isfile(index.parent / name)]:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(names)} shards missing ({_some(missing)}), "
            f"listed in {index.name}; the download is incomplete, download them again"
        )
    files = [index.parent / name for name in names]
    for path in files:
        entries, _ = read_header(path)
        absent = {key for key, name in weight_map.items() if name == path.name} - entries.keys()
        if absent:
            raise CheckpointError(
                f"{path}: lacks {_some(sorted(absent))}, which {index.name} says it holds; "
                "index and shards are of different downloads"
            )
    return files


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN_KEYS])
    return shown if len(names) <= SHOWN_KEYS else f"{shown} and {len(names) - SHOWN_KEYS} more"
