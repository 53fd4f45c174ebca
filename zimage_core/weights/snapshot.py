"""Where weights come from: a snapshot (the Hugging Face folder layout), one of its folders, or a single file.

A snapshot has `transformer/`, `text_encoder/`, `tokenizer/`, `vae/` and `scheduler/`, each with its config, weights in
one safetensors file or in shards listed by an index. A component's folder may lie elsewhere, alone, and a file may be
one part of a set (`parts_of`). Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import SchedulerConfig, VAEConfig
from ..errors import CheckpointError
from ..model.text_encoder import TextEncoder
from ..model.tokenizer import Tokenizer
from ..model.transformer import ZImageTransformer
from ..model.vae import AutoencoderKL
from .component import Component, some
from .specs import SPECS
from .tensor_files import MapFile, TensorFiles, map_safetensors, read_header

INDEX = ".safetensors.index.json"
CHECK = "check name and permissions"
MAX_PARTS = 1000
PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")  # as all tools name them
PUBLISHED_SCHEDULE = SchedulerConfig(
    shift=3.0,
    use_dynamic_shifting=False,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
)  # of Z-Image-Turbo's scheduler_config.json and diffusers' defaults


def open_component(path: str | Path, kind: str, *, map_file: MapFile | None = map_safetensors) -> Component:
    """The transformer, text_encoder or vae (`kind`) that a snapshot, a component's folder or a single file holds.

    map_file: how a file is mapped, whose pages weights stay where nothing is cast; None: all are copied, and the file
    is free again.
    Reads headers and configs only. Raises CheckpointError that says what the file is instead and what to do.
    """
    path = Path(path)
    if is_plain(path):
        config = SPECS[kind].config.from_dict(_read_json(path / "config.json"), str(path / "config.json"))
        return Component.of_snapshot(kind, TensorFiles(_weight_files(path), map_file), config)
    if os.path.isdir(path):
        folder = snapshot_folder(path)
        if folder == path.parent and path.name != kind:
            raise CheckpointError(f"this is the {path.name} of a snapshot, expected its {kind}", path)
        return Snapshot(folder or path).component(kind, map_file=map_file)
    if not os.path.exists(path):
        raise CheckpointError(f"there is no such file or folder, or it can't be read; {CHECK}", path)
    return Component.of_file(kind, TensorFiles(parts_of(path), map_file))


@dataclass(frozen=True)
class ModelSource:
    """A transformer's weights and what sampling needs to know beside them."""

    component: Component
    schedule: SchedulerConfig
    latent_factors: tuple[float, float] | None  # scale and shift of its VAE; None: the published ones
    side: int | None  # of the images that it was trained on, in pixels, where that is known


def open_model(path: str | Path, *, map_file: MapFile | None = map_safetensors) -> ModelSource:
    """Of a snapshot, its transformer's folder or a single file, as `open_component` opens them.

    A single file says nothing of schedule and VAE: they are the published ones, of Turbo.
    """
    component, folder = open_component(path, "transformer", map_file=map_file), snapshot_folder(path)
    if folder is None:
        return ModelSource(component, PUBLISHED_SCHEDULE, None, None)
    snapshot = Snapshot(folder)
    vae = snapshot.vae_config()
    factors = (vae.scaling_factor, vae.shift_factor)
    return ModelSource(component, snapshot.scheduler_config(), factors, vae.sample_size)


def schedule_of(path: str | Path) -> SchedulerConfig:
    """A snapshot's schedule; for a single file, which says nothing of it, that of Turbo (shift 3)."""
    folder = snapshot_folder(path)
    return PUBLISHED_SCHEDULE if folder is None else Snapshot(folder).scheduler_config()


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a snapshot, or in a folder of its own or beside weights."""
    if is_plain(path) and os.path.isfile(Path(path) / "tokenizer_config.json"):
        return _tokenizer(Path(path))
    folder = snapshot_folder(path)
    if folder is None:
        raise CheckpointError(
            "a single file holds no tokenizer; name a snapshot of Z-Image or a folder with the tokenizer.json "
            "and tokenizer_config.json of Qwen3",
            path,
        )
    if os.path.isfile(folder / "tokenizer_config.json"):
        return _tokenizer(folder)
    return Snapshot(folder).tokenizer()


def snapshot_folder(path: str | Path) -> Path | None:
    """The snapshot that a folder is, holds (in the layout of a Hugging Face cache) or belongs to.

    None for a file, and for the folder of one component that belongs to none.
    """
    path = Path(path)
    if os.path.isfile(path) or is_plain(path):
        return None
    if os.path.isdir(path / "snapshots"):
        return _revision(path)
    return path.parent if path.name in SPECS and os.path.isfile(path / "config.json") else path


def is_plain(path: str | Path) -> bool:
    """Whether this is a folder with the config.json and weights of one component that belongs to no snapshot."""
    path = Path(path)
    if not os.path.isfile(path / "config.json") or any(os.path.isdir(path / kind) for kind in SPECS):
        return False
    others = ("model_index.json", "scheduler", "tokenizer", *SPECS.keys() - {path.name})
    return path.name not in SPECS or not any(os.path.exists(path.parent / name) for name in others)


def parts_of(path: Path) -> list[Path]:
    """All files of the set that a weight file is part of, by an index beside it or by its name; else the file alone.

    Raises CheckpointError that says which part this is and which are missing.
    """
    found = PART.fullmatch(path.name)
    if found is None:
        indices = [] if path.suffix == ".gguf" else _listed(path.parent, INDEX)
        listing = (index for index in indices if _lists(index, path.name))
        index = next(listing, None)
        return [path] if index is None else _indexed_files(index)
    count = int(found["count"])
    paths = [path.with_name(part_name(found, number)) for number in range(1, min(count, MAX_PARTS) + 1)]
    if missing := [part.name for part in paths if not os.path.isfile(part)]:
        raise CheckpointError(
            f"this is part {int(found['number'])} of {count} of a model that is split over files, and "
            f"{some(missing)} {'is' if len(missing) == 1 else 'are'} not beside it; put all {count} into one folder",
            path,
        )
    return paths


def part_name(found: re.Match[str], number: int) -> str:
    """Another part of the set that a match of PART belongs to."""
    return f"{found['name']}-{number:05}-of-{found['count']}{found['suffix']}"


def one_of_each_set(names: Iterable[str]) -> list[str]:
    """The names, of the parts of a set only the first that is there."""
    first: dict[tuple[str, str, str] | str, str] = {}
    for name in sorted(names):
        found = PART.fullmatch(name)
        first.setdefault(name if found is None else (found["name"], found["count"], found["suffix"]), name)
    return list(first.values())


class Snapshot:
    """One model folder. Opening it reads nothing; each method reads what it needs and says what is wrong with it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not os.path.isdir(self.folder):
            raise CheckpointError(
                "there is no such folder; expected a Z-Image snapshot with "
                "transformer/, text_encoder/, tokenizer/, vae/ and scheduler/",
                self.folder,
            )

    # Configurations

    def config(self, kind: str) -> Any:
        """Of the transformer, text_encoder or vae."""
        return SPECS[kind].config.from_dict(*self._json(kind, "config.json"))

    def vae_config(self) -> VAEConfig:
        return self.config("vae")

    def scheduler_config(self) -> SchedulerConfig:
        return SchedulerConfig.from_dict(*self._json("scheduler", "scheduler_config.json"))

    # Components

    def component(self, kind: str, *, map_file: MapFile | None = map_safetensors) -> Component:
        """transformer, text_encoder or vae: its files found and their headers read."""
        config = self.config(kind)
        return Component.of_snapshot(kind, TensorFiles(self.weight_files(kind), map_file), config)

    def transformer(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> ZImageTransformer:
        """The S3-DiT, ready to run. `dtype` None keeps the file's."""
        return self.component("transformer").build(device=device, dtype=dtype)

    def text_encoder(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> TextEncoder:
        """The Qwen3 encoder, ready to run. `dtype` None keeps the file's."""
        return self.component("text_encoder").build(device=device, dtype=dtype)

    def vae(self, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> AutoencoderKL:
        """The autoencoder, ready to run. `dtype` None keeps the file's."""
        return self.component("vae").build(device=device, dtype=dtype)

    def tokenizer(self) -> Tokenizer:
        return _tokenizer(self._component("tokenizer"))

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, as its index lists them or the single one."""
        return _weight_files(self._component(component))

    def _component(self, component: str) -> Path:
        folder = self.folder / component
        if not os.path.isdir(folder):
            raise CheckpointError(f"the folder {component}/ is missing; the snapshot is incomplete", self.folder)
        return folder

    def _json(self, component: str, name: str) -> tuple[dict[str, Any], str]:
        path = self._component(component) / name
        return _read_json(path), str(path)


def _revision(cached: Path) -> Path:
    """The revision that `refs/main` names, or the only one."""
    folder, main = cached / "snapshots", cached / "refs" / "main"
    if os.path.isfile(main) and os.path.isdir(revision := folder / os.fsdecode(_read(main)).strip()):
        return revision
    revisions = [path for path in _listed(folder) if os.path.isdir(path)]
    if len(revisions) != 1:
        names = some([path.name for path in revisions]) or "none"
        raise CheckpointError(f"expected one revision, found {names}; name the one you want", folder)
    return revisions[0]


def _tokenizer(folder: Path) -> Tokenizer:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        if not os.path.isfile(folder / name):
            raise CheckpointError("the file is missing; download the tokenizer folder again", folder / name)
    try:
        return Tokenizer(folder)
    except Exception as error:  # transformers raises many types; each means that the folder is unusable
        raise CheckpointError(f"the tokenizer can't be read ({error}); download it again", folder) from error


def _listed(folder: Path, suffix: str = "") -> list[Path]:
    """What is in a folder, by name, of files with this ending only."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(suffix))
    except OSError as error:
        raise CheckpointError(f"this folder can't be read ({error.strerror}); {CHECK}", folder) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"this file can't be read ({error.strerror}); {CHECK}", path) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise CheckpointError("the file is missing; the snapshot is incomplete, download it again", path)
    try:
        raw = json.loads(_read(path))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"this is not a JSON file ({error}); download it again", path) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"expected a JSON object, found {type(raw).__name__}; download it again", path)
    return raw


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files in a folder, as its index lists them or the single one."""
    indices = _listed(folder, INDEX)
    if len(indices) > 1:
        names = ", ".join(path.name for path in indices)
        raise CheckpointError(f"there are several indices ({names}); keep the one of the weights you want", folder)
    if indices:
        return _indexed_files(indices[0])
    files = _listed(folder, ".safetensors")
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise CheckpointError(
            f"expected one .safetensors file or an index of several (*{INDEX}), found {found}; "
            "the download is incomplete or the weights are in another format",
            folder,
        )
    return files


def _lists(index: Path, name: str) -> bool:
    try:
        return name in _weight_map(index).values()
    except CheckpointError:  # of other weights in this folder, perhaps
        return False


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("there is no weight_map in this index; download the file again", index)
    return weight_map


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    if foreign := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"weight_map points outside its folder ({foreign[0]!r}); download it again", index)
    if missing := [name for name in names if not os.path.isfile(index.parent / name)]:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are missing ({some(missing)}), "
            f"listed in {index.name}; the download is incomplete, download them again",
            index.parent,
        )
    files = [index.parent / name for name in names]
    for path in files:
        entries, _ = read_header(path)
        absent = {key for key, name in weight_map.items() if name == path.name} - entries.keys()
        if absent:
            raise CheckpointError(
                f"{some(sorted(absent))} is not in this shard, though {index.name} says so; "
                "index and shards are of different downloads",
                path,
            )
    return files
