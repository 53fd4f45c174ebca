"""Repositories of the hub: their names, and where their files may lie already."""

from __future__ import annotations

import pytest

from zimage_core.errors import CheckpointError
from zimage_core.hub import download
from zimage_core.hub.download import Repository

NAME = "Org/Nano"
REPOSITORY = Repository(NAME)


@pytest.mark.parametrize(
    "text", ["", "name", "a/b/c", "../x", "Org/..", "Org/Name@", "https://huggingface.co/Org/Name"]
)
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match="is no repository of the hub"):
        Repository.parse(text)


def test_what_is_missing_and_how_large_it_is_is_told(tmp_path):
    turbo = Repository("Tongyi-MAI/Z-Image-Turbo")
    error = download.missing(turbo, tmp_path / turbo.folder_name, ["transformer", "vae"], "Say so with --download.")
    assert isinstance(error, CheckpointError)
    text = str(error)
    assert "the transformer and vae of Tongyi-MAI/Z-Image-Turbo (about 24.8 GB) are not here. Say so" in text
    assert "hf download Tongyi-MAI/Z-Image-Turbo --local-dir" in text


def test_snapshots_are_found_in_the_caches_of_others(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    assert download.find(REPOSITORY, [tmp_path]) is None
    cached = tmp_path / ".cache" / "huggingface" / "hub" / "models--Org--Nano"
    ohmygpu = tmp_path / ".config" / "ohmygpu" / "models" / "Org--Nano"
    own = tmp_path / "models" / "Org--Nano"
    for place in (ohmygpu, cached, own):
        place.mkdir(parents=True)
        assert download.find(REPOSITORY, [tmp_path / "models"]) == place
    assert download.find(Repository(NAME, "v2"), [tmp_path / "models"]) is None
