"""Snapshots of repositories: where they lie, and their download on the node that was told to, with progress there."""

from __future__ import annotations

import re
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import folder_paths

from ...zimage_core.hub import download
from ...zimage_core.hub.download import Progress, Repository
from . import notices

HOW = "Switch `download` on in this node and queue again: it is then fetched into that folder."


def typed(repository: str | None) -> str:
    """What was typed in; nothing where an API client sent null, of which ComfyUI makes "None"."""
    text = (repository or "").strip()
    return "" if text in ("None", "null", "undefined") else text


def repository_of(choice: str, repository: str) -> Repository | None:
    """The repository that is meant: the one that was typed in, or the one whose folder name was chosen."""
    if repository.strip():
        return Repository.parse(repository)
    found = re.fullmatch(r"([\w.]+(?:-[\w.]+)*)--([\w.-]+?)(?:@([\w.-]+))?", choice)
    return Repository(f"{found[1]}/{found[2]}", found[3]) if found else None


def snapshot(repository: Repository, component: str, *, allowed: bool) -> tuple[Path, bool]:
    """(folder in which this component of it is complete, whether that took a download, which has to be allowed).

    Raises CheckpointError with its size and what to do if it is not there, and what ComfyUI raises on interruption.
    """
    roots = [Path(root) for root in folder_paths.get_folder_paths("zimage")]
    found = download.find(repository, roots)
    if found is not None and download.is_complete(found, [component]):
        return found, False
    folder = found if found is not None and found.parent in roots else roots[0] / repository.folder_name
    if not allowed:
        raise download.missing(repository, folder, [component], HOW)
    download.fetch(repository, folder, [component], _Report())
    return folder, True


class _Report:
    """Bytes and speed on the node; ComfyUI's interruption ends the download."""

    def __init__(self) -> None:
        self.bar: comfy.utils.ProgressBar | None = None

    def __call__(self, progress: Progress) -> None:
        mm.throw_exception_if_processing_interrupted()
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(max(1, progress.total))
        self.bar.update_absolute(progress.done, max(1, progress.total))
        notices.show(
            f"{progress.done / 1e9:.2f} of {progress.total / 1e9:.2f} GB, {progress.speed / 1e6:.1f} MB/s\n"
            f"{progress.file}"
        )
