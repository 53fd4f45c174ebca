"""One image over several processes: what they make together is what one makes, over gloo on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zimage_core import image_files
from zimage_core.backends.operations import Tokens
from zimage_core.config import TransformerConfig
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.parallel.sequence import DividedShare
from zimage_core.parallel.team import Team
from zimage_core.weights.specs import PUBLISHED_TRANSFORMER

from ..helpers import ROOT, relative

SIZES = {
    "axes_dims": (8, 12, 12),
    "patch_size": 2,
    "dim": 960,
    "n_heads": 30,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "cap_feat_dim": 8,
    "in_channels": 16,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """size of a team -> case -> what it makes; 1 is one process on its own. All shapes where 3 or 6 are asked for."""
    folder = tmp_path_factory.mktemp("teams")
    asked = [item.name for item in request.session.items if item.path == request.path]  # others have their own [3]
    whole = any(name.endswith(("[3]", "[6]")) for name in asked)
    shapes = "all" if whole else "mixed captions"
    sizes = ["2", "3", "6"] if whole else ["2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(Path(__file__).with_name("team.py")), str(folder), shapes, *sizes]
    subprocess.run(script, env=environment, check=True, timeout=600)
    return {int(size): load_file(folder / f"{size}.safetensors") for size in ("1", *sizes)}


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 6))])
def test_processes_together_make_what_one_makes(made, size):
    """Sequences that they divide and that they don't, captions of all lengths, guidance, control, LoRA, references."""
    assert len(made[1]) == (27 if 6 in made else 9) and made[size].keys() == made[1].keys()
    for case, alone in made[1].items():
        assert alone.std() > 0.05, case
        assert relative(made[size][case], alone) <= 1e-5, case


@pytest.mark.parametrize(
    "guided, size, fitting",
    [
        (False, 4, "without guidance start 2, 3, 5, 6, 10, 15 or 30"),
        (True, 8, "start 2, 3, 4, 5, 6, 10, 12, 15, 20, 30 or 60"),
    ],
)
def test_heads_that_processes_cannot_share_are_an_error_that_says_how_many_can(guided, size, fitting):
    config = TransformerConfig(**{**PUBLISHED_TRANSFORMER, **SIZES})
    transformer = ZImageTransformer(config, device="meta")
    team = Team(0, size, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"share the 30 heads.*{fitting}"):
        team.model(transformer, guided)


def test_a_share_refuses_masks():
    class Group:
        def size(self):
            return 2

        def rank(self):
            return 0

    share = DividedShare(5, Group())
    tokens = Tokens(torch.zeros(1, 5, 1, 4, 2, 2), None, [5], mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="can't be masked"):
        share.tokens(tokens)


def test_without_torchrun_there_is_no_team(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Team.of_environment() is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Team.of_environment() is None


def test_a_process_without_a_gpu_of_its_own_is_an_error(monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU, there are 2; start as many"):
        Team.of_environment()


@pytest.mark.slow
def test_torchrun_makes_the_image_of_one_process(tmp_path):
    """Guided, so two processes share two prompts. The first speaks and saves; an error ends all."""
    options = ["generate", "two red stars on a blue background", "--steps", "2", "-g", "2", "--seed", "3", "--cpu"]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "zimage_core"]

    def run(start: list[str], *more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *start, *options, *more]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    alone, both = (
        run(["-m", "zimage_core"], "-o", str(tmp_path / "1.png")),
        run(together, "-o", str(tmp_path / "2.png")),
    )
    assert alone.returncode == both.returncode == 0, both.stderr
    assert both.stdout.count("Saved") == both.stdout.count("Prompt ") == 1 and "2 processes" in both.stdout
    images = [image_files.read(tmp_path / f"{name}.png") for name in (1, 2)]
    assert (images[0] - images[1]).abs().max() <= 1.5 / 255 and images[0].std() > 0.1
    failed = run(together, "-o", str(tmp_path / "3.png"), "--model", str(tmp_path / "missing"))
    assert failed.returncode != 0 and "error: " in failed.stderr and "missing" in failed.stderr
    assert not (tmp_path / "3.png").exists()
