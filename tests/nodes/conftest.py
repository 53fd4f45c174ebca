"""The pack inside a ComfyUI that runs in this process: its real classes, without a server."""

from __future__ import annotations

import functools
import gc
import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import provision
import pytest
import torch

from ..helpers import NANO
from .forked import Scripts
from .inside import load_pack


@pytest.fixture(scope="session")
def pack() -> SimpleNamespace:
    """The modules of nodes/, by name."""
    if not (provision.newest() / "main.py").is_file():
        pytest.skip(f"there is no ComfyUI in {provision.newest()}; `make setup` provisions one")
    pack = load_pack()
    # Qwen's is for every file that brings none, and takes a second
    pack.bridge.clip.Tokenizer = functools.cache(pack.bridge.clip.Tokenizer)
    gc.freeze()  # what is imported stays, and to look through it takes a third of a second each time
    return pack


@pytest.fixture(scope="session")
def scripts():
    """Calls a script of this folder in a process of its own."""
    if not (provision.newest() / "main.py").is_file():
        pytest.skip(f"there is no ComfyUI in {provision.newest()}; `make setup` provisions one")
    scripts = Scripts()
    yield scripts
    scripts.close()


@pytest.fixture(scope="session")
def comfy(pack):
    """ComfyUI's own modules, by the last part of their names."""
    names = "model_management model_patcher sd utils samplers sample supported_models lora conds ops".split()
    return SimpleNamespace(**{name: importlib.import_module(f"comfy.{name}") for name in names})


@pytest.fixture(scope="session")
def positive(pack):
    """An encoded prompt."""
    return pack.bridge.clip.encode(pack.bridge.clip.load_clip(NANO, torch.float32), "a red circle on a blue background")


@pytest.fixture(autouse=True)
def _as_comfyui_runs_nodes():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def user(pack, tmp_path):
    """ComfyUI's user directory is one test's alone, and empty; the folder in it where entries will be."""
    folder_paths = importlib.import_module("folder_paths")
    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path / "user"))
    yield tmp_path / "user" / "zimage" / "prompts"
    folder_paths.set_user_directory(before)


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the nano snapshot, whose files may be changed."""
    return Path(shutil.copytree(NANO, tmp_path / "model"))


@pytest.fixture
def loras(pack, tmp_path):
    """An empty folder in which ComfyUI finds LoRA files."""
    folder_paths = importlib.import_module("folder_paths")
    before = list(folder_paths.get_folder_paths("loras"))
    (tmp_path / "loras").mkdir()
    folder_paths.add_model_folder_path("loras", str(tmp_path / "loras"))
    yield tmp_path / "loras"
    folder_paths.folder_names_and_paths["loras"][0][:] = before
