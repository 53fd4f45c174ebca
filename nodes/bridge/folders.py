"""ComfyUI's model folders: which snapshots and files the loaders offer, where they are, whether they changed."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import torch
from comfy.cli_args import args

from ...zimage_core.errors import CheckpointError
from ...zimage_core.hub.download import KNOWN, Repository, is_complete
from ...zimage_core.weights.snapshot import one_of_each_set, open_component, parts_of, snapshot_folder
from ...zimage_core.weights.specs import SPECS
from . import download as bridge_download

logger = logging.getLogger(__name__)

DOWNLOAD = " (download)"  # ends an entry that is not on disk
NANO = "Z-Image-Nano (built in)"
NANO_FOLDER = Path(__file__).parents[2] / "nano" / "snapshot"
NANO_LORA = "Z-Image-Nano moon (built in)"
NANO_LORA_FILE = NANO_FOLDER.parent / "zimage_nano_moon.safetensors"
NANO_CONTROL = "Z-Image-Nano outlines (built in)"
NANO_CONTROL_FILE = NANO_FOLDER.parent / "zimage_nano_control.safetensors"

FOLDER_KINDS = ("zimage", "diffusers")  # sub-folders of models/, in the order in which equal names win
MARKS = ("transformer", "text_encoder", "vae", "snapshots")  # one of these is in a snapshot, or in a cached one
# ComfyUI's folders of single files, by what the file may hold
FILE_KINDS = {
    "transformer": ("diffusion_models", "checkpoints"),
    "text_encoder": ("text_encoders", "checkpoints"),
    "vae": ("vae", "checkpoints"),
    "control": ("model_patches", "controlnet"),
}
FILE_SUFFIXES = (".safetensors", ".sft")
DEPTH = 2  # models/zimage/<name> and models/zimage/<author>/<name>

# Known to ComfyUI from now on: extra_model_paths.yaml may add further folders under the same name.
folder_paths.add_model_folder_path("zimage", os.path.join(folder_paths.models_dir, "zimage"))
# GGUF files lie in the same folders, but ComfyUI does not list them; the lists of folders are shared, not copied
GGUF_KINDS = {kind: f"zimage_gguf_{kind}" for kind in ("diffusion_models", "text_encoders")}
for _kind, _own in GGUF_KINDS.items():
    folder_paths.folder_names_and_paths[_own] = (folder_paths.folder_names_and_paths[_kind][0], {".gguf"})


def model_choices(component: str) -> list[str]:
    """The user's own Z-Image models, the built-in one, other files, then what can be downloaded.

    The first is the default of a new node.
    """
    snapshots, files = _snapshots(), _files(component)
    paths = {**snapshots, **{name: folder_paths.get_full_path(*place) for name, place in files.items()}}
    own = {name for name, path in paths.items() if _is_ours(path, component)}
    remote = {Repository(name).folder_name for name in KNOWN} - snapshots.keys()
    return [
        *sorted(own, key=str.casefold),
        NANO,
        *sorted(paths.keys() - own, key=str.casefold),
        *(name + DOWNLOAD for name in sorted(remote, key=str.casefold)),
    ]


def model_path(choice: str, component: str, repository: str = "", download: bool = False) -> Path:
    """The folder or file behind an entry of `model_choices`, or of a repository of the hub (Org/Name@revision).

    Entries of earlier versions count as well: files with the folder before them, and without the mark of a download.
    """
    repository = bridge_download.typed(repository)
    choice = choice.removesuffix(DOWNLOAD)
    if choice == NANO and not repository:
        return NANO_FOLDER
    path = _snapshots().get(choice) if not repository else None
    wanted = bridge_download.repository_of(choice, repository)
    if wanted is not None and (path is None or not is_complete(path, [component])):
        path, fetched = bridge_download.snapshot(wanted, component, allowed=download)
        if fetched:
            _downloaded[path, component] = _stamps(path, component)
    if path is None and (file := _file(choice, component)) is not None:
        path = Path(folder_paths.get_full_path_or_raise(*file))
    if path is None:
        kinds = FILE_KINDS[component]
        name, folders = choice.removeprefix(f"{kinds[0]}/"), " or ".join(f"models/{kind}" for kind in kinds)
        raise FileNotFoundError(
            f"There is no model {name!r}: it is not in {folders}, nor is it a snapshot in "
            f"{' or '.join(f'models/{kind}' for kind in FOLDER_KINDS)}. Put it there and press R, or choose an entry "
            f"that ends in{DOWNLOAD} and switch `download` on."
        )
    return path


def problem(choice: str | None, component: str, repository: str | None, download: bool | None) -> str | None:
    """Why `model_path` would fail, told before anything runs; None where it will not, or inputs aren't known yet."""
    if choice is None or repository is None:  # linked
        return None
    try:
        wanted = bridge_download.repository_of(choice.removesuffix(DOWNLOAD), bridge_download.typed(repository))
        if wanted is None or download is False:
            model_path(choice, component, repository)
    except (CheckpointError, OSError, ValueError) as error:
        return str(error)
    return None


def fingerprint(choice: str, component: str, repository: str = "") -> list[tuple[str, int, int]]:
    """(file, modification time in ns, size) of all that is read: a changed file is loaded again.

    What this server has downloaded counts as what was there before, nothing: it was loaded when it came.
    """
    try:
        path = model_path(choice, component, repository)
        stamps = _stamps(path, component)
    except CheckpointError:  # a repository that is not here yet
        return []
    return [] if _downloaded.get((path, component)) == stamps else stamps


# what was downloaded since ComfyUI started -> what `_stamps` said right after
_downloaded: dict[tuple[Path, str], list[tuple[str, int, int]]] = {}


def _stamps(path: Path, component: str) -> list[tuple[str, int, int]]:
    folder = snapshot_folder(path)
    if folder is None:  # a file, with all of its set, or the folder of one component
        return [_stamp(file) for file in (sorted(path.iterdir()) if path.is_dir() else parts_of(path))]
    entries = (
        entry
        for part, pattern in SPECS[component].reads.items()
        for entry in _listed(folder / part)
        if fnmatchcase(entry.name, pattern) and entry.is_file()
    )
    return sorted(_stamp(Path(entry.path)) for entry in entries)


def lora_choices() -> list[str]:
    """The LoRA files of ComfyUI's own folder, then the built-in model's."""
    return [*_names("loras"), NANO_LORA]


def lora_path(name: str) -> Path:
    """The file behind an entry of `lora_choices`."""
    return NANO_LORA_FILE if name == NANO_LORA else Path(folder_paths.get_full_path_or_raise("loras", name))


def lora_fingerprint(name: str) -> tuple[str, int, int]:
    """(file, modification time in ns, size): a changed file is read again."""
    return _stamp(lora_path(name))


def control_choices() -> list[str]:
    """Control networks for Z-Image in ComfyUI's folders, the built-in one, then other files that lie there."""
    files = _files("control")
    own = {name for name, place in files.items() if _is_ours(folder_paths.get_full_path(*place), "control")}
    return [*sorted(own, key=str.casefold), NANO_CONTROL, *sorted(files.keys() - own, key=str.casefold)]


def control_path(name: str) -> Path:
    """The file behind an entry of `control_choices`."""
    if name == NANO_CONTROL:
        return NANO_CONTROL_FILE
    file = _file(name, "control")
    if file is None:
        raise FileNotFoundError(
            f"There is no control network {name!r} in models/model_patches or models/controlnet. Put it there and "
            "press R, or choose another."
        )
    return Path(folder_paths.get_full_path_or_raise(*file))


def stamps_of(file: Path) -> tuple[tuple[str, int, int], ...]:
    """(file, modification time in ns, size) of all that a weight file belongs to."""
    return tuple(_stamp(part) for part in parts_of(file))


def _stamp(file: Path) -> tuple[str, int, int]:
    state = file.stat()
    return (str(file), state.st_mtime_ns, state.st_size)


def asked_dtype() -> torch.dtype | None:
    """What ComfyUI's flags (--fp32-unet and the like, --force-fp32) want a transformer stored in; None without one."""
    asked = args.force_fp32 or any(name.endswith("_unet") and value for name, value in vars(args).items())
    return mm.unet_dtype() if asked else None


def _roots() -> list[Path]:
    return [Path(root) for kind in FOLDER_KINDS for root in folder_paths.get_folder_paths(kind)]


def _files(component: str) -> dict[str, tuple[str, str]]:
    """Name, as the combo shows it, to (ComfyUI's folder kind, the file's name in it).

    It is the file's, as stock loaders have it, with the kind of folder before it where several folders have one.
    """
    places = [(kind, kind, name) for kind in FILE_KINDS[component] for name in _names(kind)]
    places += [
        (kind, own, name)
        for kind, own in GGUF_KINDS.items()
        if kind in FILE_KINDS[component]
        for name in _names(own, (".gguf",))
    ]
    counts = Counter(name for *_, name in places)
    return {name if counts[name] == 1 else f"{shown}/{name}": (kind, name) for shown, kind, name in places}


def _file(choice: str, component: str) -> tuple[str, str] | None:
    """What `_files` has for a name, with or without the kind of folder before it."""
    files = _files(component)
    kind, _, name = choice.partition("/")
    return files.get(choice) or (files.get(name) if kind in FILE_KINDS[component] else None)


def _is_ours(path: str | Path | None, component: str) -> bool:
    """Whether a file or snapshot holds this part of Z-Image. Its headers are read once, and again after a change."""
    if path is None:
        return False
    parts = (Path(path), Path(path) / component)
    key, state = (str(path), component), [_stamp(part) for part in parts if os.path.exists(part)]
    if key not in _known or _known[key][0] != state:
        try:
            open_component(path, component)
            _known[key] = (state, True)
        except (CheckpointError, OSError):
            _known[key] = (state, False)
    return _known[key][1]


_known: dict[tuple[str, str], tuple[list[tuple[str, int, int]], bool]] = {}


def _names(kind: str, suffixes: tuple[str, ...] = FILE_SUFFIXES) -> list[str]:
    """The files of a kind as ComfyUI lists them, or as we do where it gives up over a folder that it can't read."""
    try:
        names: Iterable[str] = folder_paths.get_filename_list(kind)
    except OSError:
        names = {
            os.path.relpath(os.path.join(folder, name), root)
            for root in folder_paths.get_folder_paths(kind)
            for folder, _, files in os.walk(root, onerror=lambda error: _skip(error.filename, error), followlinks=True)
            for name in files
        }
    return one_of_each_set(name for name in names if name.lower().endswith(suffixes) and _is_text(name, kind))


def _snapshots() -> dict[str, Path]:
    """Name, as the combo shows it, to folder. Runs whenever ComfyUI asks for the schema, so it only lists folders."""
    found: dict[str, Path] = {}
    for root in _roots():
        for folder in _snapshots_in(_listed(root), DEPTH):
            found.setdefault(folder.relative_to(root).as_posix(), folder)
    return found


def _snapshots_in(entries: list[os.DirEntry[str]], depth: int) -> Iterator[Path]:
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        inner = _listed(Path(entry.path))
        if any(e.is_dir() if e.name in MARKS else e.is_file() and e.name == "model_index.json" for e in inner):
            yield Path(entry.path)
        elif depth > 1:
            yield from _snapshots_in(inner, depth - 1)


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder. What can't be read is left out and the log says so once: it may not end a whole list."""
    found = []
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if _is_text(entry.name, folder) and _is_reachable(entry)]
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        _skip(folder, error)
    return found


def _is_reachable(entry: os.DirEntry[str]) -> bool:
    try:
        entry.is_dir()  # follows links, and remembers where they led
    except OSError as error:
        _skip(entry.path, error)
        return False
    return True


def _is_text(name: str, folder: str | Path) -> bool:
    """Whether a workflow can hold this name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        _skip(os.path.join(folder, name), "its name is not UTF-8, rename it")
        return False
    return True


def _skip(path: str | os.PathLike[str], why: OSError | str) -> None:
    said = os.fsencode(path).decode(errors="backslashreplace")
    if said not in _skipped:
        _skipped.add(said)
        reason = why if isinstance(why, str) else f"{why.strerror}; check its permissions, or the drive that it is on"
        logger.warning("%s is left out of the lists of models: %s.", said, reason)


_skipped: set[str] = set()
