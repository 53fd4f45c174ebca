"""The weights of one network: which are its own, read through `key_maps`, loaded strictly without a second copy.

A weight file may be in any published layout, alone or together with the other networks. What it is, is read from its
content (`identify`). No pickle is read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..model import numerics
from . import identify, packed, quantized
from .key_maps import SIGLIP
from .specs import SPECS
from .tensor_files import DTYPES, TensorFiles

logger = logging.getLogger(__name__)

SHOWN_KEYS = 5  # of a list of keys in an error
LAYER_COUNTS = ("n_layers", "n_refiner_layers", "num_hidden_layers", "layers_per_block")  # fields of the configs


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
        self.spec = SPECS[kind]
        self.files = files
        self.config_source = config_source
        self.source = str(_place(files))
        self._given = (keys, prefix, config_source)
        self.weights = quantized.Weights(files, files.entries if keys is None else keys)
        self._keys = {key.removeprefix(prefix): key for key in self.weights.keys}  # without prefix -> in the file
        self.config = config = self._fitted(config)
        self.key_map = self.spec.key_map(config)
        self._sources = self.key_map.sources(self._keys)
        for name in LAYER_COUNTS:  # a network of absurd depth would take forever to build
            if getattr(config, name, 0) > len(self._keys):
                raise CheckpointError(
                    f"{name} is {getattr(config, name)} by {config_source}, but there are only "
                    f"{len(self._keys)} tensors; config and weights are of different models",
                    self.source,
                )

    @classmethod
    def of_file(cls, kind: str, files: TensorFiles) -> Component:
        """What a single file holds of it, its numbers from the file's metadata or shapes."""
        source = str(files.paths[0])
        prefix, keys = _recognized(kind, files, source)
        if prefix is None:
            raise identify.refusal(kind, files.shapes(), source, "choose it in the loader made for it")
        weights = quantized.Weights(files, keys)
        own = {key.removeprefix(prefix): shape for key, shape in weights.shapes().items()}

        def read(key: str) -> Tensor:
            return weights.read(prefix + key, own[key], torch.float32)

        return cls(kind, SPECS[kind].config_of(own, files.metadata, source, read), files, keys, prefix)

    @classmethod
    def of_snapshot(cls, kind: str, files: TensorFiles, config: Any) -> Component:
        """The files of a snapshot's folder, with the numbers of the config.json beside them."""
        source = str(_place(files))
        prefix, keys = _recognized(kind, files, source)
        if prefix is None and identify.held(files.entries):
            raise identify.refusal(kind, files.shapes(), source, f"put the snapshot's own {kind}/ here")
        return cls(kind, config, files, keys, prefix or "", config_source=f"{kind}/config.json")

    def whole(self) -> Component:
        """With what Z-Image never runs (`TextEncoderConfig.whole`); this one where the files lack some of it."""
        config = replace(self.config, whole=True)
        found = Component(self.kind, config, self.files, *self._given)
        network = self.spec.network(config, device="meta")
        return found if all(name in found._sources for name, _ in network.named_parameters()) else self

    def build(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> Any:
        """The network, ready to run. `dtype` None keeps each tensor's own; what is quantized then becomes bfloat16.

        Checks every key and shape from the headers, then assigns the file-mapped tensors. Only tensors that are cast,
        moved, fused or quantized are copied, one at a time. Layers of a GGUF file stay as they are (`packed`).
        """
        shapes = self.shapes
        model = self.spec.network(self.config, device="meta", dtype=dtype)
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
        model = self.spec.network(self.config, device="meta")
        wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._check_keys(wanted)
        return wanted

    def dtype(self) -> torch.dtype:
        """That of most of its values, from the headers alone; what is quantized counts as what it becomes."""
        return self.weights.dtype()

    def sums_fit_half(self) -> bool:
        """Whether the tokens of a transformer may be float16, by its weights (`numerics.largest_sum`)."""

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
            raise CheckpointError(f"shapes don't fit together: {shapes}", self._file(keys[0]))
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
                f"{key} has shape {list(found)}, expected {list(expected)} by "
                f"{self.config_source}; config and weights are of different models",
                self._file(key),
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
                f"{what} {some(keys)}"
                for what, keys in (("missing", missing), ("unknown", unexpected), ("incomplete or double", ill))
                if keys
            ]
            raise CheckpointError(
                f"these weights don't belong to this {self.kind.replace('_', ' ')} "
                f"({'; '.join(problems)}); check that they are Z-Image's own, and download them again",
                self.source,
            )
        for name in wanted:
            for key in self._sources[name]:
                self.weights.check(self._keys[key])

    def _fitted(self, config: Any) -> Any:
        """A transformer's config, with a part for features of reference images only where the file has it as well."""
        if self.kind != "transformer":
            return config
        count = sum(key.startswith(SIGLIP.removesuffix("*")) for key in self._keys)
        if not count:
            return replace(config, siglip_feat_dim=None)
        if config.siglip_feat_dim is None and self.source not in _told:
            _told.add(self.source)
            logger.info(
                "%s has a part for features of reference images (%s, %d tensors) that %s doesn't speak of "
                "(siglip_feat_dim); it is left out.",
                self.source,
                SIGLIP,
                count,
                self.config_source,
            )
        return config

    def _file(self, key: str) -> Path:
        return self.files.entries[key].path


_told: set[str] = set()  # sources of which `_fitted` has spoken


def _place(files: TensorFiles) -> Path:
    """The file, or the folder of several."""
    return files.paths[0] if len(files.paths) == 1 else files.paths[0].parent


def _recognized(kind: str, files: TensorFiles, source: str) -> tuple[str | None, list[str]]:
    """(what stands before the keys of this component, its keys); None and all keys where there is no trace of it.

    Raises CheckpointError for weights of other models and LoRA.
    """
    shapes = files.shapes()
    prefix, apart = SPECS[kind].prefix(shapes), identify.others(shapes, kind)
    if identify.foreign_name(shapes) is not None and (prefix is None or not apart):
        raise identify.refusal(kind, shapes, source)
    if prefix is None:
        return None, list(shapes)
    return prefix, [key for key in shapes if key.startswith(prefix) and not (prefix == "" and key.startswith(apart))]


def some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN_KEYS])
    return shown if len(names) <= SHOWN_KEYS else f"{shown} and {len(names) - SHOWN_KEYS} more"
