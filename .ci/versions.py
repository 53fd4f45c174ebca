"""The unit and node tests on other versions than the pinned ones, each set in an environment that is thrown away after.

    .venv/bin/python .ci/versions.py [NAME ...]

Needs `make setup`, and the Pythons where uv finds them. An environment takes up to 8 GB of disk while its tests run;
`docs/versions.md` has the outcome.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import provision
import setup
from provision import ROOT, VENV

TESTS = ["tests", "--ignore=tests/parity", "--ignore=tests/host", "--ignore=tests/browser", "--ignore=tests/nano"]
TOOLS = "import torch, transformers, huggingface_hub as hub, sys; print(sys.version.split()[0], torch.__version__, "
TOOLS += "transformers.__version__, hub.__version__)"


@dataclass(frozen=True)
class Variant:
    """A Python, and the requirements that stand in for those of the same name; the rest is the newest that fits.

    `empty`: package -> its modules, written as empty ones instead of being installed. `without`: is uninstalled.
    `left_out`: reason -> what the beginnings of its tests' ids are.
    """

    python: str
    requirements: tuple[str, ...] = ()
    empty: dict[str, list[str]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    left_out: dict[str, list[str]] = field(default_factory=dict)


OLD_TORCH = {
    "fake CUDA tensors need torch 2.9": [
        "tests/nodes/test_gpu_work.py",
        "tests/test_fused.py",
        "tests/test_gguf.py::test_uncompiled_moves_little_and_waits_for_nothing",
        "tests/test_gguf.py::test_tables_stay_on_their_device",
        "tests/test_lora_use.py::test_a_large_weight_is_changed_in_its_place",
        "tests/test_vae_bands.py::test_bands_on_a_gpu_wait_for_nothing_and_move_little_more_than_plain",
    ],
    "the fake accelerator needs torch 2.9": [
        "tests/nodes/test_memory.py",
        "tests/nodes/test_packed_paging.py",
        "tests/nodes/test_vae.py::test_on_a_gpu_",
        "tests/nodes/test_vae.py::test_with_bands_off_comfyui_falls_back_to_its_tiles",
    ],
    "its counter of graphs takes no options": [
        "tests/nodes/test_compile.py",
        "tests/nodes/test_compiled_parts.py::test_no_choice_breaks_a_compiled_graph",
        "tests/nodes/test_compiled_parts.py::test_another_choice_counts_for_a_compiled_model",
    ],
}
OLD_TRANSFORMERS = {
    "it goes with a huggingface_hub that downloads refuse": [
        "tests/test_download.py",
        "tests/test_download_command.py::test_the_command_line_downloads_when_told_to",
    ],
    "it imports its models with the tokenizer": ["tests/test_command_line.py::test_an_image_from_a_shell"],
    "it reads no folder whose name is not UTF-8": ["tests/test_command_line.py::test_names_that_are_not_utf8"],
}
VARIANTS = {
    # The lower bounds of pyproject.toml, all at once; torchvision and torchaudio are those of torch 2.7. Where there is
    # no GPU, ComfyUI 0.30.0 can't be imported with its triton.
    "oldest": Variant(
        "3.10",
        ("torch==2.7.1", "torchvision==0.22.1", "torchaudio==2.7.1", "transformers==4.50.3"),
        without=("triton",),
        left_out={**OLD_TORCH, **OLD_TRANSFORMERS, "set-up needs Python 3.11": ["tests/test_setup.py"]},
    ),
    # The newest of all. No torchaudio loads beside the newest torch, and ComfyUI imports it for models of sound.
    "newest": Variant("3.13", empty={"torchaudio": ["__init__", "functional", "transforms"]}),
}


def main(names: list[str]) -> int:
    failed = []
    for name in names or list(VARIANTS):
        with tempfile.TemporaryDirectory(prefix=f"versions-{name}-") as folder:
            if run(VARIANTS[name], Path(folder)):
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


def run(variant: Variant, folder: Path) -> int:
    """The exit status of the tests in a new environment in `folder`."""
    python = folder / "bin" / "python"
    uv = VENV / "bin" / "uv"
    made = [uv, "venv", "--quiet", "--clear", "--no-python-downloads", "--python", variant.python, folder]
    if subprocess.run(made).returncode:
        print(f"uv finds no Python {variant.python}; put one first on PATH, or get it by `uv python install`")
        return 1
    wanted = {_name(item): item for item in _comfyui_requirements()}
    wanted |= {name: name for name in setup.pins()} | {_name(item): item for item in variant.requirements}
    kept = [item for name, item in wanted.items() if name not in variant.empty]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *kept], check=True)
    if variant.without:
        subprocess.run([uv, "pip", "uninstall", "--quiet", "--python", python, *variant.without], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name, modules in variant.empty.items():
        (packages / name).mkdir()
        for module in modules:
            (packages / name / f"{module}.py").touch()
    subprocess.run([python, "-c", TOOLS], check=True)
    options = ["-q", "-m", "not slow", "--numprocesses", os.environ.get("PROCESSES", "2"), "-p", "no:cacheprovider"]
    left_out = [f"--deselect={test}" for tests in variant.left_out.values() for test in tests]
    return subprocess.run([python, "-m", "pytest", *TESTS, *options, *left_out], cwd=ROOT).returncode


def _comfyui_requirements() -> list[str]:
    lines = (provision.newest() / "requirements.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _name(requirement: str) -> str:
    return re.split(r"[=<>~!\[ ]", requirement)[0].lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
