"""The host's model folders: which snapshots the loaders offer, where they are, whether they changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

NANO = "Z-Image-Nano (built in)"
NANO_FOLDER = Path(__file__).parent.parent / "nano" / "snapshot"

FOLDER_KINDS = ("zimage", "diffusers")  # sub-folders of models/, in the order in which equal names win
COMPONENTS = ("transformer", "text_encoder", "vae")
DEPTH = 2  # models/zimage/<name> and models/zimage/<author>/<name>

# Known to the host from now on: extra_model_paths.yaml may add further folders under the same name.
folder_paths.add_model_folder_path("zimage", os.path.join(folder_paths.models_dir, "zimage"))


def model_choices() -> list[str]:
    """The built-in model, then the snapshot folders under the host's models/zimage/ and models/diffusers/."""
    return [NANO, *sorted(_snapshots(), key=str.casefold)]


def model_folder(choice: str) -> Path:
    """The folder behind an entry of `model_choices`."""
    if choice == NANO:
        return NANO_FOLDER
    folder = _snapshots().get(choice)
    if folder is None:
        searched = ", ".join(str(root) for root in _roots())
        raise FileNotFoundError(
            f"There is no model folder {choice!r} in {searched}. Put the whole Z-Image snapshot (model_index.json, "
            "transformer/, text_encoder/, tokenizer/, vae/, scheduler/) there and press R to refresh the list."
        )
    return folder


def fingerprint(choice: str, *components: str) -> list[tuple[str, int, int]]:
    """(file, modification time in ns, size) of every file of these components: a changed file is loaded again."""
    folder = model_folder(choice)
    files = sorted(path for component in components for path in (folder / component).glob("*") if path.is_file())
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]


def _roots() -> list[Path]:
    return [Path(root) for kind in FOLDER_KINDS for root in folder_paths.get_folder_paths(kind)]


def _snapshots() -> dict[str, Path]:
    """Name, as the combo shows it, to folder. Runs whenever the host asks for the schema, so it only lists folders."""
    found: dict[str, Path] = {}
    for root in _roots():
        for folder in _snapshots_in(root, DEPTH):
            found.setdefault(folder.relative_to(root).as_posix(), folder)
    return found


def _snapshots_in(root: Path, depth: int) -> Iterator[Path]:
    if not root.is_dir():
        return
    for entry in root.iterdir():
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if (entry / "model_index.json").is_file() or any((entry / name).is_dir() for name in COMPONENTS):
            yield entry
        elif depth > 1:
            yield from _snapshots_in(entry, depth - 1)
