"""What can't be read in a model folder is left out of the lists, and said once: it takes no node away."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ..helpers import NANO

NOBODY = 65534
BAD = os.fsdecode(b"caf\xe9")  # not UTF-8


@contextmanager
def permissions_count() -> Iterator[None]:
    """Root reads everything; within it, this process is somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def models(pack, monkeypatch) -> Iterator[Path]:
    """Where ComfyUI looks for all kinds of models; everybody may read it."""
    folder_paths = importlib.import_module("folder_paths")
    kinds = ("zimage", "diffusers", "diffusion_models", "text_encoders", "vae", "checkpoints", "loras")
    kinds += tuple(pack.bridge.folders.GGUF_KINDS.values())
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for kind in kinds:
            place = Path(folder, kind.replace("zimage_gguf_", ""))
            place.mkdir(exist_ok=True)
            monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(place)], {".safetensors", ".gguf"}))
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        pack.bridge.folders._skipped.clear()
        yield Path(folder)
        for path, _, _ in os.walk(folder):
            os.chmod(path, 0o755)


def make(folder: Path, mode: int = 0o755) -> Path:
    folder.mkdir(parents=True)
    folder.chmod(mode)
    return folder


def told(caplog, *fragments: str) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if "left out of the lists" in record.getMessage()]
    return [message for message in messages if all(fragment in message for fragment in fragments)]


def schemas(pack) -> list[list[str]]:
    """The choices of the four loaders, as ComfyUI asks for them."""
    nodes = [pack.loaders.ZImageTransformerLoader, pack.loaders.ZImageTextEncoderLoader, pack.loaders.ZImageVAELoader]
    return [next(i.options for i in node.define_schema().inputs if i.id == "model") for node in nodes] + [
        next(i.options for i in pack.lora.ZImageLoraLoader.define_schema().inputs if i.id == "lora")
    ]


def test_folders_without_permission(pack, models, caplog):
    """lost+found, one more without permission a level deeper, and one whose entries can be named but not looked at."""
    make(models / "zimage" / "Good" / "transformer")
    make(models / "zimage" / "Org" / "Model" / "vae")
    make(models / "zimage" / "lost+found", 0o700)
    make(models / "zimage" / "Org" / "closed", 0o700)
    blind = make(models / "diffusers" / "blind")
    (blind / "link").symlink_to(models)
    blind.chmod(0o744)
    with permissions_count():
        for _ in range(2):
            *loaders, _loras = schemas(pack)
        with pytest.raises(FileNotFoundError, match="There is no model 'Other'"):
            pack.bridge.folders.model_path("Other", "vae")
        with pytest.raises(FileNotFoundError):
            pack.bridge.folders.fingerprint("lost+found", "vae")
    assert all(choices[1:3] == ["Good", "Org/Model"] for choices in loaders)
    assert len(told(caplog, "lost+found", "Permission denied")) == len(told(caplog, "closed")) == 1


def test_links_that_lead_nowhere_in_a_way_of_their_own(pack, models, caplog):
    """Real errors of the file system that `Path.is_dir` passes on, for root too."""
    make(models / "zimage" / "Good" / "vae")
    (models / "zimage" / "long").symlink_to("x" * 300)
    (models / "zimage" / "loop").symlink_to("loop")
    (models / "zimage" / "Good" / "model_index.json").symlink_to("y" * 300)
    for _ in range(2):
        assert all(choices[1] == "Good" for choices in schemas(pack)[:3])
    assert len(told(caplog, "/long")) == len(told(caplog, "/loop")) == len(told(caplog, "model_index.json")) == 1


def test_names_that_are_not_utf8(pack, models, caplog):
    """The workflow that holds one could not be sent."""
    make(models / "zimage" / BAD / "vae")
    make(models / "zimage" / "Good" / "vae")
    for kind in ("diffusion_models", "vae", "text_encoders", "loras", "checkpoints"):
        (models / kind / f"{BAD}.safetensors").touch()
        (models / kind / "good.safetensors").touch()
    for _ in range(2):
        *loaders, loras = schemas(pack)
    for choice in sum(loaders, loras):
        choice.encode()
    assert "vae/good.safetensors" in loaders[2] and loras[0] == "good.safetensors" and "Good" in loaders[0]
    assert len(told(caplog, "not UTF-8")) == 6


def test_files_where_comfyui_gives_up(pack, models, caplog):
    """Its own list fails over a folder that can be named but not looked at; the other files are still there."""
    folder_paths = importlib.import_module("folder_paths")
    for kind in ("loras", "diffusion_models"):
        (models / kind / "good.safetensors").touch()
        make(models / kind / "blind" / "inner")
        (models / kind / "blind").chmod(0o744)
    with permissions_count():
        with pytest.raises(PermissionError):
            folder_paths.get_filename_list("loras")
        for _ in range(2):
            choices = schemas(pack)
    assert choices[3][0] == "good.safetensors" and "good.safetensors" in choices[0]
    assert told(caplog, "blind", "Permission denied")


def test_what_was_loaded_keeps_its_fingerprint(pack, models):
    """Unreadable entries inside a snapshot's own folders don't end the check whether it has changed."""
    shutil.copytree(NANO, models / "zimage" / "Mine")
    before = pack.bridge.folders.fingerprint("Mine", "vae")
    (models / "zimage" / "Mine" / "vae" / "note").symlink_to("z" * 300)
    assert pack.bridge.folders.fingerprint("Mine", "vae") == before and before


def test_entries_are_file_names_and_the_users_own_models_come_first(pack, models):
    """Then the built-in one, other files, and last what is to be downloaded; a folder tells equal names apart."""
    folders = pack.bridge.folders
    (weights,) = (NANO / "transformer").glob("*.safetensors")
    config = {"zimage.transformer.config": (NANO / "transformer" / "config.json").read_text()}
    for place in ("diffusion_models/mine", "diffusion_models/twice", "checkpoints/twice"):
        save_file(load_file(weights), models / f"{place}.safetensors", config)
    (models / "diffusion_models" / "another.safetensors").touch()
    (models / "zimage" / "Empty" / "transformer").mkdir(parents=True)
    shutil.copytree(NANO, models / "zimage" / "Snapshot")
    own = ["checkpoints/twice.safetensors", "diffusion_models/twice.safetensors", "mine.safetensors", "Snapshot"]
    choices = folders.model_choices("transformer")
    assert choices[:7] == [*own, folders.NANO, "another.safetensors", "Empty"]
    assert choices[7:] and all(choice.endswith(" (download)") for choice in choices[7:])
    assert pack.loaders.ZImageTransformerLoader.define_schema().inputs[0].default is None  # so that the first one is

    save_file(load_file(weights), models / "diffusion_models" / "another.safetensors", config)
    assert "another.safetensors" in folders.model_choices("transformer")[:5]


@pytest.mark.parametrize(("component", "folder"), [("transformer", "diffusion_models"), ("vae", "vae")])
def test_what_is_missing_is_told_before_anything_runs(pack, models, component, folder):
    loader = {"transformer": "ZImageTransformerLoader", "vae": "ZImageVAELoader"}[component]
    check = getattr(pack.loaders, loader).validate_inputs
    for name in ("absent.safetensors", f"{folder}/absent.safetensors"):
        told = check(name)
        assert "no model 'absent.safetensors'" in told and f"models/{folder}" in told and "`download`" in told
    remote = next(name for name in pack.bridge.folders.model_choices(component) if name.endswith(" (download)"))
    for name in (remote, remote.removesuffix(" (download)")):  # as saved by 0.1.0
        assert "download" in check(name) and "GB" in check(name)
        assert check(name, download=True) is check(name, download=None) is True
    assert check(None) is check("absent.safetensors", repository=None) is True  # linked: not known yet
    assert "expected" in check(pack.bridge.folders.NANO, repository="no such form")
