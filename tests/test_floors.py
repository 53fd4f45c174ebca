"""Reads the imports of every file: a room may use lower floors only; ComfyUI is met in `nodes/bridge/`.

The order is the one in which the pack can be read and taken apart: each floor works without those above it.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Rooms: packages, and files alone. Each imports from those above it in this list; within a room nothing goes round
FLOORS = [
    {"zimage_core/__init__", "zimage_core/errors"},
    {"zimage_core/config", "zimage_core/images", "zimage_core/image_files", "zimage_core/model/rope"},
    {"zimage_core/backends", "zimage_core/inpaint"},
    {"zimage_core/model"},
    {"zimage_core/diagnostics", "zimage_core/prompts"},
    {"zimage_core/weights"},
    {"zimage_core/lora", "zimage_core/sampling", "zimage_core/hub", "zimage_core/parallel"},
    {"zimage_core/autoencoding", "zimage_core/options"},
    {"zimage_core/pipeline"},
    {"zimage_core/batch"},
    {"zimage_core/__main__"},
    {"nodes/bridge"},
    {"nodes/convert", "nodes/names"},
    {f"nodes/{file}" for file in ("loaders", "lora", "control", "inpaint", "conditioning", "sampling", "vae")},
    {"nodes/__init__"},
    {"__init__"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
PACKAGES = {room for room in FLOOR if room.count("/") == 1 and (ROOT / room).is_dir()}


def room_of(file: str) -> str:
    """The package that a file lies in, or itself."""
    return file if file in FLOOR or (package := file.rpartition("/")[0]) not in PACKAGES else package


LIBRARIES = {"torch", "safetensors", "transformers", "huggingface_hub", "numpy"}
LAZY = {  # inside functions only: the pack's optional extras
    "zimage_core/options": {"tqdm"},
    "zimage_core/image_files": {"PIL"},
    "zimage_core/weights/gguf_dequant": {"gguf"},
    "zimage_core/batch/ray_run": {"ray"},
    "zimage_core/batch/uri_folder": {"pyarrow", "fsspec"},
}
APART = {"zimage_core/backends/triton_kernels": {"triton"}}  # files which are imported inside functions only
COMFYUI = {
    "comfy",
    "comfy_kitchen",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "folder_paths",
    "latent_preview",
    "node_helpers",
}
COMFYUI |= {"nodes", "server", "execution", "app", "utils", "api_server", "comfy_config", "cuda_malloc", "main"}


def violations(root: Path) -> list[str]:
    """One line for each import that the rules forbid, and for each file that has no floor."""
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for path in [root / "__init__.py", *sorted(root.glob("zimage_core/**/*.py")), *sorted(root.glob("nodes/**/*.py"))]:
        file = path.relative_to(root).with_suffix("").as_posix()
        if room_of(file) not in FLOOR:
            found.append(f"{file}.py has no floor; put it into a room, or where its imports allow")
            continue
        for target, line, lazy in imports(path, file, root):
            graph.setdefault(file, set()).add(target)
            reason = forbidden(file, target, lazy)
            if reason:
                found.append(f"{file}.py:{line}: {target}: {reason}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"imports go round: {' '.join(reversed(error.args[1]))}")
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
        theirs, ours = room_of(target), room_of(file)
        if theirs not in FLOOR:
            return "not a file of this pack that has a floor"
        if theirs != ours and FLOOR[theirs] >= FLOOR[ours]:
            return f"floor {FLOOR[theirs]}, and the importing file is on floor {FLOOR[ours]}"
        return "needs what may not be there: inside a function" if target in APART and not lazy else None
    top = target.split(".")[0]
    if top in ("zimage_core", "nano", "tests"):
        return "own files are imported relatively, and nothing imports nano or tests"
    if top in COMFYUI:
        if file.startswith("nodes/bridge/"):
            return None
        if file.startswith("nodes/") and target.startswith("comfy_api.latest"):
            return None
        return "ComfyUI is met in nodes/bridge/ only; other nodes may use comfy_api.latest"
    if top in sys.stdlib_module_names or top in LIBRARIES:
        return None
    if top in APART.get(file, ()) or (lazy and top in LAZY.get(file, ())):
        return None
    return "neither the standard library nor one of " + ", ".join(sorted(LIBRARIES))


def test_every_import_goes_down(root: Path):
    assert violations(root) == []


def test_every_room_exists(root: Path):
    assert [room for room in FLOOR if not (root / f"{room}.py").is_file() and not (root / room).is_dir()] == []


@pytest.fixture
def planted(root: Path, tmp_path: Path) -> Path:
    """Empty files under the names of the pack's."""
    for path in [root / "__init__.py", *root.glob("zimage_core/**/*.py"), *root.glob("nodes/**/*.py")]:
        empty = tmp_path / path.relative_to(root)
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.touch()
    assert violations(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    "file, line, reason",
    [
        ("zimage_core/model/vae", "from ..weights import snapshot", "floor 5, and the importing"),
        ("zimage_core/model/vae", "from ..backends import triton_kernels", "inside a function"),
        ("zimage_core/model/vae", "from ..pipeline import ZImagePipeline", "floor 8, and the importing"),
        ("zimage_core/model/vae", "from zimage_core import config", "imported relatively"),
        ("zimage_core/model/vae", "import zimage_core.config", "imported relatively"),
        ("zimage_core/model/vae", "from ...nodes.bridge import folders", "floor 11, and the importing"),
        ("zimage_core/model/vae", "from ...nano import scenes", "not a file of this pack"),
        ("zimage_core/model/vae", "from .... import anything", "not a file of this pack"),
        ("zimage_core/model/vae", "def f():\n    import comfy.utils", "ComfyUI is met in"),
        ("zimage_core/model/vae", "import folder_paths", "ComfyUI is met in"),
        ("zimage_core/model/vae", "import nodes", "ComfyUI is met in"),
        ("zimage_core/model/vae", "import comfy_api.latest", "ComfyUI is met in"),
        ("zimage_core/model/vae", "import einops", "neither the standard library"),
        ("zimage_core/model/vae", "def f():\n    from PIL import Image", "neither the standard library"),
        ("zimage_core/image_files", "from PIL import Image", "neither the standard library"),
        ("nodes/vae", "from . import loaders", "floor 13, and the importing"),
        ("nodes/vae", "import comfy.utils", "ComfyUI is met in"),
        ("nodes/vae", "from comfy_api import v0_0_2", "ComfyUI is met in"),
        ("nodes/bridge/folders", "from .. import loaders", "floor 13, and the importing"),
        ("nodes/convert", "import folder_paths", "ComfyUI is met in"),
        ("nodes/__init__", "from .. import anything", "floor 15, and the importing"),
    ],
)
def test_planted_violation_is_found(planted: Path, file: str, line: str, reason: str):
    (planted / f"{file}.py").write_text(line)
    (found,) = violations(planted)
    assert found.startswith(f"{file}.py:") and reason in found


@pytest.mark.parametrize(
    "file, line",
    [
        (
            "zimage_core/pipeline",
            "from .sampling import loop\nfrom .config import A, B\nimport torch.nn as F",
        ),
        (
            "zimage_core/model/vae",
            "from .patchify import padded\nfrom ..backends import matmul\nfrom . import rope",
        ),
        ("zimage_core/options", "def f():\n    from tqdm import tqdm"),
        ("zimage_core/image_files", "def f():\n    from PIL import Image"),
        ("nodes/vae", "from comfy_api.latest import io\nfrom . import convert\nfrom ..zimage_core.model.vae import A"),
        ("nodes/bridge/folders", "import comfy.utils, folder_paths\nfrom ...zimage_core.pipeline import A"),
        ("__init__", "async def f():\n    from .nodes import Extension"),
    ],
)
def test_permitted_import_passes(planted: Path, file: str, line: str):
    (planted / f"{file}.py").write_text(line)
    assert violations(planted) == []


def test_imports_that_go_round_are_found(planted: Path):
    (planted / "zimage_core" / "model" / "vae.py").write_text("from .patchify import padded")
    (planted / "zimage_core" / "model" / "patchify.py").write_text("from .vae import rotate")
    (found,) = violations(planted)
    assert found.startswith("imports go round") and "model/vae" in found and "model/patchify" in found


def test_file_without_a_floor_is_found(planted: Path):
    (planted / "zimage_core" / "extra.py").touch()
    (found,) = violations(planted)
    assert found.startswith("zimage_core/extra.py has no floor")
