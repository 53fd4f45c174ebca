"""Downloads from a hub that is served here over HTTP: whole, interrupted, killed, resumed, refused and lied to."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.errors import CheckpointError
from zimage_core.hub import download
from zimage_core.hub.download import DownloadError, Progress, Repository
from zimage_core.weights.snapshot import Snapshot, open_component

from . import quick_worker
from .helpers import NANO, ROOT
from .hub import COMMIT, Hub, serve

NAME = "Org/Nano"
REPOSITORY = Repository(NAME)
ALL = ("transformer", "text_encoder", "vae")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch, quick_workers) -> Iterator[Hub]:
    """Its workers are quick ones in this process; those that another process starts are real."""
    monkeypatch.setattr(download, "WORKER", Path(quick_worker.__file__))
    monkeypatch.setenv(quick_worker.SOCKET, quick_workers)
    with serve() as hub:
        source = tmp_path / "source"
        shutil.copytree(NANO, source)
        (source / "README.md").write_text("not needed")
        (source / "transformer" / "old.bin").write_bytes(b"a pickle")
        hub.repositories[NAME] = source
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "2")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "2")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "models" / REPOSITORY.folder_name


def contents(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a download may be at work there
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def looks_complete(folder: Path) -> bool:
    return any(download.is_complete(folder, [kind]) for kind in ALL)


# What it does


def test_a_snapshot_arrives_whole_and_only_what_is_needed(hub, folder):
    seen: list[Progress] = []
    download.fetch(REPOSITORY, folder, ALL, seen.append)
    expected = contents(NANO)
    assert contents(folder) == expected
    assert download.is_complete(folder, ALL)
    assert Snapshot(folder).transformer().config == Snapshot(NANO).transformer().config
    assert seen[-1].done == seen[-1].total == sum(map(len, expected.values()))
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    hub.asked.clear()
    download.fetch(REPOSITORY, folder, ALL)
    assert [path for _, path, _ in hub.asked if "/resolve/" in path] == []  # nothing twice


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("transformer", {"model_index.json", "scheduler/scheduler_config.json", "vae/config.json"}),
        ("vae", {"model_index.json"}),
        ("text_encoder", {"model_index.json"} | {f"tokenizer/{path.name}" for path in (NANO / "tokenizer").iterdir()}),
    ],
)
def test_one_component_alone(hub, folder, kind, others):
    download.fetch(REPOSITORY, folder, [kind])
    found = set(contents(folder))
    assert {path for path in found if not path.startswith(f"{kind}/")} == others
    assert download.is_complete(folder, [kind])
    assert not download.is_complete(folder, [other for other in ALL if other != kind])


def test_a_revision_and_a_token(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.revisions.add("v2")
    download.fetch(Repository.parse(f"{NAME}@v2"), folder, ["vae"])
    assert any("/revision/v2" in path for _, path, _ in hub.asked)
    # one commit, whatever the name comes to mean meanwhile
    assert all(COMMIT in path for _, path, _ in hub.asked if "/resolve/" in path)
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert Repository.parse(f"{NAME}@v2").folder_name == "Org--Nano@v2"


def test_speed_is_told(hub, folder):
    hub.speed = 2e6
    speeds = []
    started = time.monotonic()
    download.fetch(REPOSITORY, folder, ["vae"], lambda progress: speeds.append(progress.speed))
    mean = sum((folder / name).stat().st_size for name in contents(folder)) / (time.monotonic() - started)
    assert mean / 2 < max(speeds) < 4e6  # a busy machine gets less than what the hub sends


class Stop(Exception):
    pass


def test_cancelling_takes_less_than_a_second_and_keeps_what_arrived(hub, folder):
    """A second of the hub, which sends so much in it at most, however busy the machine is."""
    hub.speed = 3e6
    served = 0

    def stop(progress: Progress) -> None:
        nonlocal served
        if progress.done > 3e6:
            served = hub.served
            raise Stop

    with pytest.raises(Stop):
        download.fetch(REPOSITORY, folder, ["transformer"], stop)
    assert 3e6 <= served < len((NANO / WEIGHTS).read_bytes()) - hub.speed
    time.sleep(0.2)  # for what is on its way
    assert hub.served - served < hub.speed
    assert not looks_complete(folder)
    hub.speed = None
    hub.asked.clear()
    download.fetch(REPOSITORY, folder, ["transformer"])
    (ranged,) = hub.sent(WEIGHTS)
    assert int(ranged.removeprefix("bytes=").rstrip("-")) >= 2e6
    assert (folder / WEIGHTS).read_bytes() == (NANO / WEIGHTS).read_bytes()
    assert not (folder / download.STAGING).exists()


def test_killed_in_the_middle_and_resumed(hub, folder):
    """SIGKILL leaves neither a file that looks complete nor a process that goes on."""
    hub.speed = 3e6
    script = (
        "import sys; from pathlib import Path; from zimage_core.hub import download;"
        f"download.fetch(download.Repository({NAME!r}), Path(sys.argv[1]), ['transformer'])"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT)
    deadline = time.monotonic() + 30
    while sum(map(len, contents(folder).values())) < 3e6:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not looks_complete(folder)
    time.sleep(0.3)
    before = sum(map(len, contents(folder).values()))
    time.sleep(0.5)
    assert sum(map(len, contents(folder).values())) == before
    hub.speed = None
    hub.asked.clear()
    download.fetch(REPOSITORY, folder, ["transformer"])
    (ranged,) = hub.sent(WEIGHTS)
    assert int(ranged.removeprefix("bytes=").rstrip("-")) >= 2e6
    assert download.is_complete(folder, ["transformer"])
    assert (folder / WEIGHTS).read_bytes() == (NANO / WEIGHTS).read_bytes()


def test_a_connection_that_breaks_once_goes_on(hub, folder):
    hub.cut[WEIGHTS] = 4_000_000
    download.fetch(REPOSITORY, folder, ["transformer"])
    assert len(hub.sent(WEIGHTS)) == 2 and hub.sent(WEIGHTS)[1].startswith("bytes=")
    assert (folder / WEIGHTS).read_bytes() == (NANO / WEIGHTS).read_bytes()


def run_after(change: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that downloads begins with a change to the hub's library."""
    script = folder / "changed.py"
    run = f"import runpy; runpy.run_path({str(quick_worker.WORKER)!r}, run_name='__main__')"
    script.write_text(f"{change}\n{run}\n")
    monkeypatch.setattr(download, "WORKER", script)


def test_a_hub_library_before_1_is_named(hub, folder, tmp_path, monkeypatch):
    run_after("import huggingface_hub; huggingface_hub.__version__ = '0.36.0'", tmp_path, monkeypatch)
    with pytest.raises(DownloadError, match=r"downloads need huggingface_hub 1.* here is 0\.36\.0;.* \(Org/Nano\)$"):
        download.fetch(REPOSITORY, folder, ["vae"])
    assert hub.asked == []


def test_signed_addresses_elsewhere(hub, folder, monkeypatch):
    """As the hub answers for large files. The token stays the hub's; an address that expires is asked for again."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.elsewhere = hub.expiring = True
    hub.cut[WEIGHTS] = 4_000_000
    download.fetch(REPOSITORY, folder, ["transformer"])
    assert (folder / WEIGHTS).read_bytes() == (NANO / WEIGHTS).read_bytes()
    addresses = [path for method, path, _ in hub.asked if method == "GET" and path.startswith("/signed/")]
    assert len(addresses) == 3 and len(set(addresses)) == 2  # cut, refused, then the rest from a new one
    assert int(hub.sent(WEIGHTS)[-1].removeprefix("bytes=").rstrip("-")) >= 3e6
    assert hub.leaked == [] and "Bearer hf_secret" in hub.tokens


def test_shards_and_their_index(hub, folder, tmp_path):
    source = hub.repositories[NAME] / "transformer"
    weights = Snapshot(NANO).transformer().state_dict()
    (source / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for number in range(3):
        shard = f"diffusion_pytorch_model-0000{number + 1}-of-00003.safetensors"
        save_file({name: weights[name].clone() for name in names[number::3]}, source / shard)
        index |= {name: shard for name in names[number::3]}
    (source / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    download.fetch(REPOSITORY, folder, ["transformer"])
    assert download.is_complete(folder, ["transformer"])
    (folder / "transformer" / shard).unlink()
    assert not download.is_complete(folder, ["transformer"])
    hub.asked.clear()
    download.fetch(REPOSITORY, folder, ["transformer"])
    assert {path.rpartition("/")[2] for _, path, _ in hub.asked if "/resolve/" in path} == {shard}


def test_a_truncated_file_is_not_complete_and_is_fetched_again(hub, folder):
    download.fetch(REPOSITORY, folder, ["vae"])
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert not download.is_complete(folder, ["vae"])
    download.fetch(REPOSITORY, folder, ["vae"])
    assert path.read_bytes() == whole


# What goes wrong


def failure(folder: Path, kinds=("transformer",), repository: Repository = REPOSITORY) -> str:
    with pytest.raises(DownloadError) as error:
        download.fetch(repository, folder, kinds)
    assert str(error.value).endswith(f" ({repository})")
    assert not looks_complete(folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "access is restricted; accept its terms at http.*Org/Nano and set HF_TOKEN"),
        (401, None, "the hub refused access .401.*HF_TOKEN"),
        (404, "RepoNotFound", "not found at http.* .404.; check the name"),
        (500, None, "answered with error 500; try again later"),
    ],
)
def test_refusals(hub, folder, status, code, words):
    hub.status[NAME] = (status, code)
    assert re.search(words, failure(folder))


def test_a_revision_that_is_not_there(hub, folder):
    message = failure(folder, repository=Repository(NAME, "nowhere"))
    assert "there is no revision 'nowhere'" in message


def test_no_connection(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = failure(folder)
    assert message.startswith("the connection to http://127.0.0.1:9 failed") and "HF_ENDPOINT" in message
    assert "kept" not in message  # nothing has arrived


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids downloads" in failure(folder)
    assert hub.asked == []


@pytest.mark.slow
def test_a_server_that_stops_answering(hub, folder, tmp_path, monkeypatch):
    """The library waits six times for as long as it is told, in whole seconds, and a second between."""
    impatient = "from huggingface_hub import constants, file_download; constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.3"
    run_after(f"{impatient}; file_download.time.sleep = lambda _: None", tmp_path, monkeypatch)
    hub.stall.add(WEIGHTS)
    assert "did not answer in time" in failure(folder)


@pytest.mark.slow
def test_a_file_that_stays_short(hub, folder):
    hub.short.add(WEIGHTS)
    message = failure(folder)
    assert "what arrived is kept, try again" in message
    hub.short.clear()
    download.fetch(REPOSITORY, folder, ["transformer"])
    assert download.is_complete(folder, ["transformer"])


def test_corrupt_bytes(hub, folder):
    hub.corrupt = {"scheduler/scheduler_config.json"}
    assert "scheduler_config.json arrived damaged" in failure(folder)
    hub.corrupt = {WEIGHTS}
    assert f"{WEIGHTS} arrived damaged" in failure(folder)
    hub.corrupt.clear()
    download.fetch(REPOSITORY, folder, ["transformer"])
    assert download.is_complete(folder, ["transformer"])


def test_a_full_disk(hub, folder, monkeypatch):
    real = shutil.disk_usage(ROOT)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=download.SPARE + 1_000_000))
    assert "0.01 GB are still to come" in failure(folder)
    assert hub.sent(WEIGHTS) == []


def test_another_models_repository(hub, folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    hub.repositories["Org/Other"] = tmp_path / "other"
    assert "it has no transformer/*.safetensors" in failure(folder, repository=Repository("Org/Other"))


# Caches of others


def test_caches_that_cannot_be_read_hold_nothing(hub, tmp_path, monkeypatch):
    """Errors of the file system that `Path.is_dir` passes on, and a user without a home."""
    (tmp_path / "long").symlink_to("x" * 300)
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "long", tmp_path / "loop"):
        with pytest.raises(CheckpointError, match="there is no such file or folder, or it can't be read"):
            open_component(place, "vae")
        monkeypatch.setenv("HF_HUB_CACHE", str(place))
        monkeypatch.setenv("HOME", str(place))
        assert download.find(REPOSITORY, [place, tmp_path]) is None
    shutil.copytree(NANO, tmp_path / "Org--Nano")
    (tmp_path / "Org--Nano" / "vae" / "config.json").unlink()
    (tmp_path / "Org--Nano" / "vae" / "config.json").symlink_to("y" * 300)
    assert not download.is_complete(tmp_path / "Org--Nano", ["vae"])
    assert download.is_complete(tmp_path / "Org--Nano", ["transformer"]) is False
    with pytest.raises(DownloadError, match="can't be written .File name too long"):
        download.fetch(REPOSITORY, tmp_path / ("z" * 300), ["vae"])
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(
        os.path, "expanduser", lambda path: path
    )  # as it is for a user without an entry, in a container
    assert download.find(REPOSITORY, [tmp_path / "loop"]) is None


def test_a_snapshot_in_the_hubs_cache_is_complete(hub, tmp_path, monkeypatch):
    """Downloaded by the hub's own tools."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    code = f"import huggingface_hub as hub, sys; [hub.hf_hub_download({NAME!r}, path) for path in sys.argv[1:]]"
    done = subprocess.run([sys.executable, "-c", code, *contents(NANO)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = download.find(REPOSITORY, [])
    assert found is not None and download.is_complete(found, ALL)


def test_weights_that_are_there_but_not_listed_are_left_alone(hub, folder):
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, folder / "mine.safetensors")
    download.fetch(REPOSITORY, folder, ["vae"])
    assert (folder / "mine.safetensors").is_file()
