"""Reads the imports of every file: a file may use lower floors only, and ComfyUI is met in `nodes/host*.py` alone.

The order is the one in which the pack can be read and taken apart: each floor works without those above it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = [
    {"zimage_core/__init__", "zimage_core/config", "zimage_core/key_maps", "zimage_core/attention"},
    {"zimage_core/gguf_types", "zimage_core/half", "zimage_core/products"},
    {"zimage_core/gguf_files", "zimage_core/fused"},
    {"zimage_core/rope", "zimage_core/row_blocks", "zimage_core/patchify", "zimage_core/scheduler"}
    | {"zimage_core/tensor_files", "zimage_core/detect", "zimage_core/adapters", "zimage_core/prompt_cache"},
    {"zimage_core/transformer", "zimage_core/text_encoder", "zimage_core/tokenizer", "zimage_core/vae"}
    | {"zimage_core/quantised"},
    {"zimage_core/packed", "zimage_core/vae_bands", "zimage_core/finite"},
    {"zimage_core/checkpoint", "zimage_core/sampling", "zimage_core/lora"},
    {"zimage_core/pipeline", "zimage_core/download_worker", "zimage_core/converted"},
    {"zimage_core/download", "nodes/host_attention", "nodes/host_operations", "nodes/host_packed"},
    {"zimage_core/__main__", "nodes/convert", "nodes/host_download", "nodes/host_packed_patcher", "nodes/host_sampler"},
    {"nodes/host", "nodes/host_files"},
    {"nodes/host_prompts", "nodes/host_vae", "nodes/host_model"},
    {"nodes/host_clip"},
    {"nodes/host_lora"},
    {"nodes/loaders", "nodes/lora", "nodes/conditioning", "nodes/sampling", "nodes/vae"},
    {"nodes/__init__"},
    {"__init__"},
]
FLOOR = {file: number for number, floor in enumerate(FLOORS) for file in floor}

LIBRARIES = {"torch", "safetensors", "transformers", "huggingface_hub", "numpy"}
LAZY = {  # inside functions only: the pack's optional extras
    "zimage_core/__main__": {"PIL", "tqdm"},
    "zimage_core/gguf_types": {"gguf"},
}
HOST = {
    "comfy",
    "comfy_kitchen",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "latent_preview",
    "node_helpers",
}
HOST |= {"nodes", "server", "execution", "app", "utils", "api_server", "comfy_config", "cuda_malloc", "main"}


def violations(root: Path) -> list[str]:
    """One line for each import that the rules forbid, and for each file that has no floor."""
    found = []
    for path in [root / "__init__.py", *sorted(root.glob("zimage_core/**/*.py")), *sorted(root.glob("nodes/**/*.py"))]:
        file = path.relative_to(root).with_suffix("").as_posix()
        if file not in FLOOR:
            found.append(f"{file}.py has no floor; put it where its imports allow")
            continue
        for target, line, lazy in imports(path, file, root):
            reason = forbidden(file, target, lazy)
            if reason:
                found.append(f"{file}.py:{line}: {target}: {reason}")
    return found


def imports(path: Path, file: str, root: Path) -> Iterator[tuple[str, int, bool]]:
    """What a file imports: (dotted module, or own file such as "zimage_core/rope"), line, whether inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from comfy_api import latest` is comfy_api.latest, as `import comfy_api.latest` is.
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [relative(node, alias.name, file, root) for alias in node.names]
        else:
            continue
        for target in targets:
            yield target, node.lineno, id(node) in inside


def relative(node: ast.ImportFrom, name: str, file: str, root: Path) -> str:
    """The own file that a relative import reads, "nowhere" if there is none."""
    package = Path(file).parent
    for _ in range(node.level - 1):
        package = package.parent if package != Path() else Path("outside")
    base = package.joinpath(*(node.module or "").split("."))
    for candidate in (base / name, base / name / "__init__", base, base / "__init__"):
        if (root / candidate).with_suffix(".py").is_file():
            return candidate.as_posix()
    return f"{base.as_posix()}/{name} (nowhere)"


def forbidden(file: str, target: str, lazy: bool) -> str | None:
    """Why this file may not import this, or None."""
    if "/" in target or target in FLOOR:
        if target not in FLOOR:
            return "not a file of this pack that has a floor"
        if FLOOR[target] >= FLOOR[file]:
            return f"floor {FLOOR[target]}, and the importing file is on floor {FLOOR[file]}"
        return None
    top = target.split(".")[0]
    if top in ("zimage_core", "nano", "tests"):
        return "own files are imported relatively, and nothing imports nano or tests"
    if top in HOST:
        if file.startswith("nodes/host"):
            return None
        if file.startswith("nodes/") and target.startswith("comfy_api.latest"):
            return None
        return "ComfyUI is met in nodes/host*.py only; other nodes may use comfy_api.latest"
    if top in sys.stdlib_module_names or top in LIBRARIES:
        return None
    if lazy and top in LAZY.get(file, ()):
        return None
    return "neither the standard library nor one of " + ", ".join(sorted(LIBRARIES))


def test_every_import_goes_down(root: Path):
    assert violations(root) == []


def test_every_file_with_a_floor_exists(root: Path):
    assert [file for file in FLOOR if not (root / f"{file}.py").is_file()] == []


@pytest.fixture
def planted(root: Path, tmp_path: Path) -> Path:
    """Empty files with all the names that have a floor."""
    for file in FLOOR:
        path = tmp_path / f"{file}.py"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert violations(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    "file, line, reason",
    [
        ("zimage_core/rope", "from .transformer import ZImageTransformer", "floor 4, and the importing"),
        ("zimage_core/rope", "from . import patchify", "floor 3, and the importing"),
        ("zimage_core/rope", "from zimage_core import config", "imported relatively"),
        ("zimage_core/rope", "import zimage_core.config", "imported relatively"),
        ("zimage_core/rope", "from ..nodes import host", "floor 10, and the importing"),
        ("zimage_core/rope", "from ..nano import scenes", "not a file of this pack"),
        ("zimage_core/rope", "from ... import anything", "not a file of this pack"),
        ("zimage_core/rope", "def f():\n    import comfy.utils", "ComfyUI is met in"),
        ("zimage_core/rope", "import folder_paths", "ComfyUI is met in"),
        ("zimage_core/rope", "import nodes", "ComfyUI is met in"),
        ("zimage_core/rope", "import comfy_api.latest", "ComfyUI is met in"),
        ("zimage_core/rope", "import einops", "neither the standard library"),
        ("zimage_core/rope", "def f():\n    from PIL import Image", "neither the standard library"),
        ("zimage_core/__main__", "from PIL import Image", "neither the standard library"),
        ("nodes/vae", "from . import loaders", "floor 14, and the importing"),
        ("nodes/vae", "import comfy.utils", "ComfyUI is met in"),
        ("nodes/vae", "from comfy_api import v0_0_2", "ComfyUI is met in"),
        ("nodes/host", "from . import loaders", "floor 14, and the importing"),
        ("nodes/convert", "import folder_paths", "ComfyUI is met in"),
        ("nodes/__init__", "from .. import anything", "floor 16, and the importing"),
    ],
)
def test_planted_violation_is_found(planted: Path, file: str, line: str, reason: str):
    (planted / f"{file}.py").write_text(line)
    (found,) = violations(planted)
    assert found.startswith(f"{file}.py:") and reason in found


@pytest.mark.parametrize(
    "file, line",
    [
        ("zimage_core/pipeline", "from . import sampling\nfrom .config import A, B\nimport torch.nn.functional as F"),
        ("zimage_core/__main__", "def f():\n    from PIL import Image\n    from tqdm import tqdm"),
        ("nodes/vae", "from comfy_api.latest import io\nfrom . import convert\nfrom ..zimage_core.vae import A"),
        ("nodes/host", "import comfy.utils, folder_paths\nfrom ..zimage_core.pipeline import A"),
        ("__init__", "async def f():\n    from .nodes import Extension"),
    ],
)
def test_permitted_import_passes(planted: Path, file: str, line: str):
    (planted / f"{file}.py").write_text(line)
    assert violations(planted) == []


def test_file_without_a_floor_is_found(planted: Path):
    (planted / "zimage_core" / "extra.py").touch()
    (found,) = violations(planted)
    assert found.startswith("zimage_core/extra.py has no floor")
