"""The pack inside a ComfyUI that runs in this process: its real classes, without a server."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import provision
import pytest
import torch

from .inside import load_pack


@pytest.fixture(scope="session")
def pack() -> SimpleNamespace:
    """The modules of nodes/, by name."""
    if not (provision.newest() / "main.py").is_file():
        pytest.skip(f"there is no ComfyUI in {provision.newest()}; `make setup` provisions one")
    return load_pack()


@pytest.fixture(scope="session")
def comfy(pack):
    """The host's own modules, by the last part of their names."""
    names = "model_management model_patcher sd utils samplers sample supported_models lora conds ops".split()
    return SimpleNamespace(**{name: importlib.import_module(f"comfy.{name}") for name in names})


@pytest.fixture(autouse=True)
def _as_the_host_runs_nodes():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def _prompts_of_this_test_alone(pack, tmp_path):
    """What is cached under the host's user directory belongs to one test."""
    import folder_paths

    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path / "user"))
    yield
    folder_paths.set_user_directory(before)
