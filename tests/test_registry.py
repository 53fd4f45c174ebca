"""What ComfyUI's registry takes: fields of pyproject, the archive that users install, the rules of its validators."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

from .helpers import ROOT, tracked

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture(scope="module")
def archive() -> set[str]:
    """The files that users get: those of the repository that .comfyignore does not name."""
    return tracked() - tracked("--cached", "--ignored", "--exclude-from=.comfyignore")


def test_the_project_says_what_the_registry_shows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    fields = project["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"} <= fields.keys()
    icon, banner = Image.open(ROOT / fields["Icon"]), Image.open(ROOT / fields["Banner"])
    assert icon.width <= 800 and icon.height <= 400
    assert banner.width * 9 == banner.height * 21
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"]) and project["project"]["description"]


def test_the_archive_holds_what_users_need(archive):
    assert {"__init__.py", "pyproject.toml", "README.md", "LICENSE", "nano/zimage_nano_moon.safetensors"} <= archive
    for folder, fewest in (
        ("zimage_core", 40),
        ("nodes", 15),
        ("workflows", 10),
        ("subgraphs", 4),
        ("docs", 10),
        ("web", 16),
        ("locales", 1),
        ("nano/snapshot", 9),
    ):
        assert sum(name.startswith(f"{folder}/") for name in archive) >= fewest, folder
        whole = {name for name in tracked() if name.startswith(f"{folder}/")}
        assert whole <= archive
    left = {name.partition("/")[0] for name in archive}
    assert not left & {"tests", "benchmarks", ".ci", "Makefile"}
    assert not [name for name in archive if name.startswith("nano/") and name.endswith(".py")]


def test_its_size_is_what_the_docs_say(archive):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in sorted(archive):
            file.write(ROOT / name, name)
    said = re.search(r"archive of ([\d.]+) MB", (ROOT / "docs" / "development.md").read_text(encoding="utf-8"))
    assert said is not None and abs(packed.tell() / 1e6 - float(said[1])) < 0.5


@pytest.mark.slow
def test_the_archive_draws(archive, tmp_path):
    for name in archive:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "zimage_core", "generate", "a red circle", "--steps", "1", "-o", "image.png"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "image.png").is_file()


# The validators


def test_no_code_is_run_from_text():
    """S102 and S307 as `comfy node validate` selects them, in tests as well."""
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--select", "S102,S307,E702", "--ignore-noqa", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_comfyui_is_asked_for_no_attributes_of_modules():
    """Not for `comfy.x.__path__` or `comfy.x.__file__`, which are no names of its API."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "nodes").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and re.fullmatch(r"__(path|file|spec|loader|package)__", node.attr)
        and ast.unparse(node.value).split(".")[0].startswith("comfy")
    ]
    assert not found, found


def test_what_windows_may_not_encode_is_written_as_escapes():
    """comfy-test refuses what Windows' cp1252 does not have, in all Python files."""
    found = []
    for path in (ROOT / name for name in tracked("*.py")):
        try:
            path.read_text(encoding="utf-8").encode("cp1252")
        except UnicodeEncodeError as error:
            found.append(f"{path.relative_to(ROOT)}: {error.object[error.start : error.end]!r}")
    assert not found, found


def test_no_layer_of_torch_by_its_dotted_name():
    """comfy-test's rule, for all Python files: such a name is taken for a network that ComfyUI can't manage."""
    layers = "Linear|Conv[123]d|ConvTranspose[12]d|LayerNorm|GroupNorm|Embedding"
    rule = re.compile(rf"(?<![\w.])(torch\.)?nn\.({layers})\(|torch\.autocast\(|\.to\([\"']cuda")
    found = [
        f"{name}:{number}"
        for name in sorted(tracked("*.py"))
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if rule.search(line) and not line.lstrip().startswith("#")
    ]
    assert not found, found
