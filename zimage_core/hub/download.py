"""Snapshots from the Hugging Face hub, only when asked for: what is needed, resumable, checked against its hashes.

Files arrive in `.download/` inside the snapshot's folder and are moved to their place when their hash is right, so that
nothing unfinished looks complete. `huggingface_hub` does the transfer, in a process of its own (`worker`), and
honours its usual variables: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..weights.snapshot import Snapshot, open_component, snapshot_folder
from ..weights.specs import SPECS

__all__ = ["KNOWN", "DownloadError", "Progress", "Repository", "fetch", "find", "is_complete", "missing"]

# repository -> component -> bytes, to tell before anything is asked of the hub; bf16 but for the transformers (float32)
KNOWN = {
    "Tongyi-MAI/Z-Image-Turbo": {"transformer": 24.6e9, "text_encoder": 8.0e9, "vae": 0.2e9},
    "Tongyi-MAI/Z-Image": {"transformer": 24.6e9, "text_encoder": 8.0e9, "vae": 0.2e9},
}
SUFFIXES = (".json", ".safetensors", ".txt", ".jinja")  # pickles and images are left where they are
STAGING = ".download"
SPARE = 100_000_000  # bytes that must stay free
POLL = 0.1  # seconds between two looks at how much has arrived; cancelling takes no longer
SPEED_OVER = 5.0  # seconds that the speed is averaged over
MIRROR = "or name a mirror of the hub in the environment variable HF_ENDPOINT"
WORKER = Path(__file__).with_name("worker.py")


class DownloadError(CheckpointError):
    """What went wrong and what to do, then the repository in parentheses. What arrived is kept for the next try."""

    __module__ = "builtins"


@dataclass(frozen=True)
class Progress:
    """How far a download is."""

    done: int  # bytes, those of earlier tries included
    total: int  # bytes of all files that are needed
    speed: float  # bytes a second, lately
    file: str  # that is under way


Callback = Callable[[Progress], Any]  # called about ten times a second; what it raises ends the download at once


@dataclass(frozen=True)
class Repository:
    """A model on the hub: `Org/Name`, and a branch, tag or commit."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Repository:
        """`Org/Name` or `Org/Name@revision`; raises ValueError for anything else."""
        found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text.strip())
        if found is None or ".." in text or "--" in found[1]:
            raise ValueError(f"{text!r} is no repository of the hub, expected Org/Name or Org/Name@revision")
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def folder_name(self) -> str:
        """Of its snapshot: Org--Name, with the revision if it is a particular one."""
        return str(self).replace("/", "--")


def find(repository: Repository, roots: Sequence[Path]) -> Path | None:
    """Where a snapshot of it lies: in one of these folders, in the cache of the hub's tools or in ohmygpu's storage."""
    for root in roots:
        for name in (repository.folder_name, *(() if repository.revision else (repository.name,))):
            if os.path.isdir(root / name):
                return root / name
    if repository.revision is None:
        for folder in (
            hub_cache() / f"models--{repository.folder_name}",
            Path(os.path.expanduser("~/.config/ohmygpu/models")) / repository.folder_name,
        ):
            if os.path.isdir(folder):
                return folder
    return None


def hub_cache() -> Path:
    """Where `huggingface_hub` and diffusers keep their downloads."""
    if path := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expanduser(path))  # of Path itself, it fails for a user without a home
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HOME", cache))) / "hub"


def is_complete(folder: Path, components: Sequence[str]) -> bool:
    """Whether all that these components need is there, judged by indices and by the sizes in the files' headers."""
    return problem(folder, components) is None


def problem(folder: Path, components: Sequence[str]) -> str | None:
    """Why a snapshot is not complete for these components."""
    try:
        snapshot = Snapshot(snapshot_folder(folder) or folder)
        for kind in components:
            open_component(folder, kind)
        if "text_encoder" in components:
            snapshot.tokenizer()
        if "transformer" in components:
            snapshot.scheduler_config()
            snapshot.vae_config()
    except CheckpointError as error:
        return str(error)
    return None


def missing(repository: Repository, folder: Path, components: Sequence[str], how: str) -> CheckpointError:
    """What to say where nothing may be downloaded: what is missing, how large it is, how to get it."""
    sizes = KNOWN.get(repository.name)
    size = f" (about {sum(sizes[kind] for kind in components) / 1e9:.1f} GB)" if sizes else ""
    what = " and ".join(kind.replace("_", " ") for kind in components)
    verb = "are" if len(components) > 1 else "is"
    state = f"not complete: {problem(folder, components)}" if os.path.isdir(folder) else "not here"
    revision = f" --revision {repository.revision}" if repository.revision else ""
    return CheckpointError(
        f"the {what} of {repository}{size} {verb} {state}. {how} Nothing is downloaded otherwise. "
        f"By hand: hf download {repository.name}{revision} --local-dir {folder}"
    )


def fetch(repository: Repository, folder: Path, components: Sequence[str], callback: Callback | None = None) -> None:
    """Downloads what these components (transformer, text_encoder, vae) need and `folder` lacks.

    Raises DownloadError; what the callback raises, KeyboardInterrupt too, ends it at once. Either way what has arrived
    stays in `folder/.download` and the next call goes on from there.
    """
    staging = folder / STAGING
    listing = _listing(repository, staging)
    wanted = [file for file in listing["files"] if any(_is_read(file["path"], kind) for kind in components)]
    for kind in components:
        if not any(file["path"].startswith(f"{kind}/") and file["path"].endswith(".safetensors") for file in wanted):
            raise DownloadError(
                f"it has no {kind}/*.safetensors, so it is no snapshot of Z-Image; check the name", repository
            )
    absent = [file for file in wanted if not _has_size(folder / file["path"], file["size"])]
    total = sum(file["size"] for file in wanted)
    done = total - sum(file["size"] for file in absent)
    _check_space(repository, folder, sum(file["size"] for file in absent) - _arrived(staging))
    if absent:
        meter = _Meter(callback, total)
        _transfer(repository, listing["commit"], folder, staging, absent, done, meter)


def _is_read(path: str, kind: str) -> bool:
    folder, _, name = path.rpartition("/")
    reads = {"": "model_index.json", **SPECS[kind].reads}
    return path.endswith(SUFFIXES) and folder in reads and fnmatchcase(name, reads[folder])


def _has_size(path: Path, size: int) -> bool:
    return os.path.isfile(path) and _size(path) == size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # not begun, or just moved to its place
        return 0


def _arrived(staging: Path) -> int:
    return sum(_size(Path(folder, name)) for folder, _, names in os.walk(staging) for name in names)


def _check_space(repository: Repository, folder: Path, needed: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DownloadError(
            f"{folder} can't be written ({error.strerror}); check its permissions", repository
        ) from error
    if needed + SPARE > free:
        raise DownloadError(
            f"{needed / 1e9:.2f} GB are still to come, but {folder} has {free / 1e9:.2f} GB free; "
            "make room and try again",
            repository,
        )


def _listing(repository: Repository, staging: Path) -> dict[str, Any]:
    with _worker({"do": "list", "repo": repository.name, "revision": repository.revision}) as lines:
        for line in lines:
            if line is not None:
                _raise(repository, line, staging)
                return line
    raise DownloadError("the download process ended without an answer; try again", repository)


def _transfer(
    repository: Repository,
    commit: str,
    folder: Path,
    staging: Path,
    files: list[dict[str, Any]],
    done: int,
    meter: _Meter,
) -> None:
    # parts are named by their hash: if the file is another by then, the next try does not go on with this one
    parts = {file["path"]: staging / f"{file['path']}.{(file['sha256'] or file['blob'])[:16]}" for file in files}
    waiting = {file["path"]: file["size"] for file in files}
    asked = [{**file, "part": str(parts[file["path"]]), "place": str(folder / file["path"])} for file in files]
    task = {"do": "get", "repo": repository.name, "revision": commit, "staging": str(staging), "files": asked}
    with _worker(task) as lines:
        for line in lines:
            if line is None:
                current = next(iter(waiting), None)
                if current is None:
                    continue  # it cleans up
                meter.tell(done + _size(parts[current]), current)
                continue
            _raise(repository, line, staging)
            done += waiting.pop(line["done"])
            meter.tell(done, line["done"])
    if waiting:
        raise DownloadError(f"the download process ended early; {_kept(staging)}try again", repository)


class _Meter:
    """Tells the callback how far it is, with the speed of the last seconds."""

    def __init__(self, callback: Callback | None, total: int):
        self.callback = callback
        self.total = total
        self.seen: list[tuple[float, int]] = []

    def tell(self, done: int, file: str) -> None:
        if self.callback is None:
            return
        now = time.monotonic()
        self.seen = [(at, count) for at, count in self.seen if now - at < SPEED_OVER] + [(now, done)]
        since, before = self.seen[0]
        speed = max(0, done - before) / (now - since) if now > since else 0.0
        self.callback(Progress(done, self.total, speed, file))


@contextmanager
def _worker(task: dict[str, Any]) -> Iterator[Iterator[dict[str, Any] | None]]:
    """What the worker prints, and None whenever it has been silent for POLL seconds; it is killed on the way out."""
    process = subprocess.Popen(
        [sys.executable, str(WORKER), json.dumps(task)],
        stdin=subprocess.PIPE,  # the worker ends when this pipe does
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line)
        said.put(None)

    def drain() -> None:
        assert process.stderr is not None
        errors.extend(process.stderr)

    threads = [threading.Thread(target=target, daemon=True) for target in (listen, drain)]
    for thread in threads:
        thread.start()

    def lines() -> Iterator[dict[str, Any] | None]:
        while True:
            try:
                line = said.get(timeout=POLL)
            except queue.Empty:
                yield None
                continue
            if line is None:
                if process.wait() != 0:
                    threads[1].join()
                    raise DownloadError(f"the download process failed: {''.join(errors)[-500:].strip()}")
                return
            yield json.loads(line)

    try:
        yield lines()
    finally:
        process.kill()
        process.wait()
        for thread in threads:
            thread.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _kept(staging: Path) -> str:
    """What to say before "try again"."""
    return "what arrived is kept, " if _arrived(staging) else ""


def _raise(repository: Repository, line: dict[str, Any], staging: Path) -> None:
    if "error" not in line:
        return
    again = f"{_kept(staging)}try again"
    kinds, status, message = set(line["error"]), line["status"], line["message"].splitlines()[0:1]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    said = f" ({message[0]})" if message else ""
    if "Damaged" in kinds:
        why = (
            f"{line['message']} arrived damaged (its hash is not the one that the hub lists); it was deleted, try again"
        )
    elif "TooOld" in kinds:
        why = (
            f"downloads need huggingface_hub 1.0 or newer, here is {line['message']}; update it (together with "
            "transformers, of which 5.0 is the first that goes with it), or download by hand with hf download"
        )
    elif "GatedRepoError" in kinds or status == 403:
        why = f"access is restricted; accept its terms at {endpoint}/{repository.name} and set HF_TOKEN"
    elif status == 401 or ("RepositoryNotFoundError" in kinds and status != 404):
        why = "the hub refused access (401): the name is wrong or it is private; check it, and HF_TOKEN"
    elif "RevisionNotFoundError" in kinds:
        why = f"there is no revision {repository.revision!r}; check the name after @"
    elif "RepositoryNotFoundError" in kinds or status == 404:
        why = f"not found at {endpoint} (404); check the name"
    elif "OfflineModeIsEnabled" in kinds:
        why = "the environment variable HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids downloads; unset it"
    elif status is not None:
        why = f"{endpoint} answered with error {status}; {again} later"
    elif any("Timeout" in kind for kind in kinds):
        why = f"{endpoint} did not answer in time{said}; {again}, {MIRROR}"
    elif any(
        kind in kinds for kind in ("ConnectError", "ConnectionError", "TransportError", "LocalEntryNotFoundError")
    ):
        why = f"the connection to {endpoint} failed{said}; check it and {again}, {MIRROR}"
    else:
        why = f"the download failed{said}; {again}"
    raise DownloadError(f"{why}", repository)
