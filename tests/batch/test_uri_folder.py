"""An output folder by its URI: as a local one, in a file system that can't append and in one that is only of names."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import time
import uuid

import pytest
from PIL import Image

from zimage_core.__main__ import main
from zimage_core.batch import uri_folder
from zimage_core.batch.attempts import Attempts
from zimage_core.batch.folder import LOCK, Busy, Folder
from zimage_core.batch.uri_folder import RemoteFolder, opened

from .making import SMALL, Run

pytest.importorskip("pyarrow", reason="folders by URI need it; pip install '.[ray]'")
PROMPTS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture(params=["file", "memory"])
def folder(request, tmp_path) -> RemoteFolder:
    uri = f"file://{tmp_path}/out" if request.param == "file" else f"memory://{uuid.uuid4().hex}/out"
    found = opened(uri)
    assert isinstance(found, RemoteFolder)
    return found


def test_files_are_whole_or_not_there(folder, monkeypatch):
    assert not folder.exists("a/b.png") and folder.listed("a") == []
    folder.write("a/b.png", b"one")
    folder.write("a/b.png", b"two")
    assert folder.exists("a/b.png") and folder.read("a/b.png") == b"two" and folder.listed("a") == ["b.png"]
    assert not folder.exists("a") and not folder.holds("a/b.png", "x") and not folder.holds("c.png", "x")
    system = folder._system

    class Torn:
        """Whose moves fail, as when the network goes."""

        def __getattr__(self, name):
            return getattr(system, name)

        def move(self, *_):
            raise OSError("gone")

    folder._system = Torn()
    with pytest.raises(OSError, match="gone"):
        folder.write("a/b.png", b"three")
    folder._system = system
    assert folder.read("a/b.png") == b"two" and folder.listed("a") == ["b.png"]
    folder.write("a/.zimage-0.half", b"left by a kill")
    assert folder.clean(["a/b.png"]) == 1 and folder.listed("a") == ["b.png"]
    folder.remove("a")
    folder.remove("a")
    assert folder.listed("a") == []


def test_a_store_without_halves_gets_each_file_by_one_write(folder, monkeypatch):
    monkeypatch.setattr(uri_folder, "ATOMIC", {folder._system.type_name})
    folder._system.create_dir(folder._path, recursive=True)
    monkeypatch.setattr(uri_folder, "HALF", "/nowhere/*")
    folder.write("a.png", b"one")
    assert folder.read("a.png") == b"one"


def test_marks_of_attempts(folder):
    attempts = Attempts(folder, "run")
    assert not attempts.seen()
    attempts.begin()
    assert attempts.seen() and attempts.left() == []
    with attempts.mark("chunk-1"), attempts.mark("chunk-1"):
        assert attempts.count("chunk-1") == 2 and attempts.count("chunk-10") == 0 and attempts.left() == ["chunk-1"]
    assert attempts.left() == []
    attempts.end()
    assert not attempts.seen()


def test_lines_reach_the_store_and_those_of_a_killed_run_the_next(folder, monkeypatch):
    monkeypatch.setattr(uri_folder, "REWRITE", 0.1)
    journal = folder.journal("results.jsonl")
    journal.append(b"1\n")
    deadline = time.monotonic() + 10
    while folder.read("results.jsonl") != b"1\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    journal._ticking.close()
    journal.append(b"2\n")  # which a kill leaves in the spool alone
    assert folder.read("results.jsonl") == b"1\n"
    again = folder.journal("results.jsonl")
    assert again.read() == b"1\n2\n"
    again.cut(2)
    again.append(b"3\n")
    again.close()
    assert folder.read("results.jsonl") == b"1\n3\n" and not again.spool.path.exists()


@pytest.mark.parametrize("stored, known", [(b"1\n9\n", b"1\n9\n"), (None, b"")])
def test_a_spool_that_another_machine_or_a_deletion_has_made_old(folder, stored, known):
    journal = folder.journal("results.jsonl")
    journal._ticking.close()
    journal.append(b"1\n2\n")
    folder.remove("results.jsonl")
    if stored is not None:
        folder.write("results.jsonl", stored)
    again = folder.journal("results.jsonl")
    assert again.read() == known
    again.close()


def test_the_lock(folder, monkeypatch):
    with folder.lock():
        with pytest.raises(Busy, match=f"process {os.getpid()} on .* try again in 60 seconds"), folder.lock():
            pass
        held = json.loads(folder.read(LOCK))
        assert held["time"] <= time.time()
    assert LOCK not in folder.listed("") and not folder.exists(LOCK)
    dead = subprocess.Popen(["true"])
    dead.wait()
    takes = [
        {**held, "pid": dead.pid, "time": time.time()},  # killed here
        {**held, "host": "other", "time": time.time() - uri_folder.STALE - 1},  # killed elsewhere
        {},
    ]
    for left in takes:
        folder.write(LOCK, json.dumps(left).encode())
        with folder.lock():
            assert json.loads(folder.read(LOCK))["pid"] == os.getpid()
    folder.write(LOCK, json.dumps({**held, "host": "other", "time": time.time()}).encode())
    with pytest.raises(Busy, match="on other"), folder.lock():
        pass


def test_the_lock_stays_fresh(folder, monkeypatch):
    monkeypatch.setattr(uri_folder, "FRESH", 0.05)
    with folder.lock():
        first, deadline = json.loads(folder.read(LOCK))["time"], time.monotonic() + 10
        while json.loads(folder.read(LOCK))["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_it_can_be_sent(folder):
    folder.write("a.png", b"one")
    assert pickle.loads(pickle.dumps(folder)).read("a.png") == b"one"


def test_a_batch_and_its_resumption_are_those_of_a_local_folder(tmp_path, folder, capsys):
    local = Run(tmp_path, PROMPTS, *SMALL, "--batch-size", "1", "--name", "{prompt}/{row}.png", name="local")
    assert local() == 0
    options = [*local.command[:2], "--output", folder.uri, *local.options]
    assert main(options) == 0, capsys.readouterr().err
    for name, content in local.images().items():
        assert folder.read(name) == content
    lines = [json.loads(line) for line in folder.read("results.jsonl").splitlines()]
    assert [{**line, "seconds": 0} for line in lines] == [{**line, "seconds": 0} for line in local.lines()]
    folder.remove("a-blue-square/2.png")
    text = folder.read("results.jsonl")
    folder.write("results.jsonl", text[: text.rindex(b"\n", 0, -1) + 1])  # as if the last line had been lost
    assert main(options) == 0
    assert capsys.readouterr().out.count("3 of 3 images done") == 3
    assert [json.loads(line)["row"] for line in folder.read("results.jsonl").splitlines()] == [1, 2, 3, 2]
    assert {name: folder.read(name) for name in local.images()} == local.images()


def test_a_local_run_takes_over_where_one_by_uri_ended(tmp_path):
    run = Run(tmp_path, PROMPTS, *SMALL)
    assert main([*run.command[:2], "--output", f"file://{run.out}", *run.options]) == 0
    before = {path: path.stat().st_mtime_ns for path in run.out.glob("*.png")}
    assert run() == 0 and len(run.lines()) == 3
    assert {path: path.stat().st_mtime_ns for path in run.out.glob("*.png")} == before
    for path in before:
        Image.open(path).load()


def test_what_is_no_uri_of_a_folder(tmp_path, capsys):
    run = Run(tmp_path, PROMPTS, *SMALL)
    assert run("--output", "nothing://a/b") == 2
    assert capsys.readouterr().err.startswith("error: --output nothing://a/b: ")
    assert isinstance(opened(str(tmp_path)), Folder) and isinstance(opened("C:/images"), Folder)
