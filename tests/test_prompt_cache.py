"""The store of encoded prompts on its own; behind the pipeline it is in test_unread_encoder.py."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.prompts.cache import STALE, PromptCache, key_of, stamps

from .helpers import ROOT

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def features(seed: int, tokens: int = 5, width: int = 8, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def entry(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# The store


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_come_back_from_memory_and_from_disk(tmp_path, dtype):
    put = features(1, dtype=dtype)
    cache = PromptCache(tmp_path)
    assert cache.get("a") is None
    cache.put("a", put)
    for found in (cache.get("a"), PromptCache(tmp_path).get("a"), PromptCache(tmp_path, memory_bytes=0).get("a")):
        assert found is not None and found.dtype == dtype and torch.equal(found, put)
    assert PromptCache(tmp_path).get("b") is None


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2.1), (torch.float32, 4.1)], ids=str)
def test_an_entry_is_hardly_larger_than_its_values(tmp_path, dtype, most):
    """Those of a short prompt for the published model: 20 tokens, template included."""
    PromptCache(tmp_path).put("a", features(1, 20, 2560, dtype))
    assert entry(tmp_path, "a").stat().st_size <= most * 20 * 2560


def test_what_callers_write_to_does_not_reach_the_cache(tmp_path):
    put = features(1)
    for folder in (None, tmp_path):
        cache, given = PromptCache(folder), put.clone()
        cache.put("a", given)
        given.zero_()
        for _ in range(2):
            found = cache.get("a")
            assert torch.equal(found, put)
            found.zero_()
    found = PromptCache(tmp_path).get("a")
    found.zero_()
    assert torch.equal(PromptCache(tmp_path).get("a"), put)


def test_memory_gives_up_the_least_recently_used():
    size = features(0).nbytes
    cache = PromptCache(None, memory_bytes=3 * size + 1)
    for number in range(3):
        cache.put(str(number), features(number))
    assert cache.get("0") is not None
    cache.put("3", features(3))
    assert [cache.get(str(number)) is not None for number in range(4)] == [True, False, True, True]
    cache.put("3", features(3))  # again: it counts once
    cache.put("large", features(9, tokens=500))  # would take more than all
    assert [cache.get(key) is not None for key in ("0", "2", "3", "large")] == [True, True, True, False]


@pytest.mark.parametrize("memory", [0, 2**20], ids=["read from disk", "read from memory"])
def test_disk_gives_up_the_least_recently_used(tmp_path, memory):
    PromptCache(tmp_path).put("0", features(0))
    size = entry(tmp_path, "0").stat().st_size
    cache = PromptCache(tmp_path, disk_bytes=3 * size + 1, memory_bytes=memory)
    for number in range(3):
        cache.put(str(number), features(number))
    assert torch.equal(cache.get("0"), features(0))
    cache.put("3", features(3))
    kept = PromptCache(tmp_path, memory_bytes=0)
    assert [kept.get(str(number)) is not None for number in range(4)] == [True, False, True, True]
    cache.put("large", features(9, tokens=500))
    assert kept.get("large") is None and len(entries(tmp_path)) == 3
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3 * size + 1


def test_nothing_is_written_where_nothing_may_be(tmp_path):
    cache = PromptCache(tmp_path / "new", disk_bytes=0)
    cache.put("a", features(1))
    assert torch.equal(cache.get("a"), features(1)) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_not_kept(tmp_path, value):
    bad = features(1)
    bad[2, 3] = value
    cache = PromptCache(tmp_path)
    cache.put("a", bad)
    assert cache.get("a") is None and list(tmp_path.iterdir()) == []


def damaged(kind: str, whole: bytes, folder: Path) -> bytes:
    match kind:
        case "empty":
            return b""
        case "half-written":
            return whole[: len(whole) // 2]
        case "one byte short":
            return whole[:-1]
        case "one byte more":
            return whole + b"\0"
        case "text":
            return b"not an entry at all"
        case "header of any length":
            return b"\xff" * 8 + whole[8:]
        case "header is a list":
            return (2).to_bytes(8, "little") + b"[]"
        case "without metadata":
            save_file({"features": features(1)}, folder / "other")
        case "of another key":
            return entry(folder, "b").read_bytes()
        case "of other weights":
            save_file({"weight": features(1)}, folder / "other", {"format": "pt"})
    return (folder / "other").read_bytes()


@pytest.mark.parametrize(
    "kind",
    "empty|half-written|one byte short|one byte more|text|header of any length|header is a list|without metadata|"
    "of another key|of other weights".split("|"),
)
def test_a_damaged_entry_is_left_out_and_replaced(tmp_path, kind):
    cache = PromptCache(tmp_path, memory_bytes=0)
    cache.put("a", features(1))
    cache.put("b", features(2))
    file = entry(tmp_path, "a")
    file.write_bytes(damaged(kind, file.read_bytes(), tmp_path))
    assert cache.get("a") is None
    assert torch.equal(cache.get("b"), features(2))
    cache.put("a", features(1))
    assert torch.equal(cache.get("a"), features(1))


def test_every_flipped_byte_is_found(tmp_path):
    cache = PromptCache(tmp_path, memory_bytes=0)
    cache.put("a", features(1, tokens=2, width=4))
    file = entry(tmp_path, "a")
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        assert cache.get("a") is None, f"byte {place} of {len(whole)}"
    file.write_bytes(whole)
    assert cache.get("a") is not None


def test_only_what_dead_writers_left_is_cleaned_up(tmp_path):
    cache = PromptCache(tmp_path)
    old = time.time() - STALE - 60
    names = [f".{'a' * 64}.{'b' * 32}.tmp", f".{'a' * 64}.{'c' * 32}.tmp", "notes.txt", "model.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 100)
        if name != names[1]:  # that writer may be at work
            os.utime(tmp_path / name, (old, old))
    cache.put("a", features(1))
    assert {file.name for file in tmp_path.iterdir()} == {*names[1:], entry(tmp_path, "a").name}
    PromptCache(tmp_path, disk_bytes=entry(tmp_path, "a").stat().st_size).put("b", features(2))
    assert {file.name for file in tmp_path.iterdir()} == {*names[1:], entry(tmp_path, "b").name}


def test_a_folder_that_can_t_be_written_is_told_once_and_memory_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    cache = PromptCache(tmp_path / "file" / "prompts")
    for number in range(3):
        cache.put(str(number), features(number))
    assert [torch.equal(cache.get(str(number)), features(number)) for number in range(3)] == [True] * 3
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "can't be kept in" in record.getMessage() and str(cache.folder) in record.getMessage()


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path, caplog):
    """The limit on file sizes stops a write in the middle, as a full disk does."""
    resource = pytest.importorskip("resource")
    cache, whole = PromptCache(tmp_path), features(1, 100, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        cache.put("a", whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "can't be kept in" in caplog.text
    assert list(tmp_path.iterdir()) == [] and torch.equal(cache.get("a"), whole)
    cache.put("a", whole)  # there is room again
    assert torch.equal(PromptCache(tmp_path).get("a"), whole)


def hammer(folder: Path, seed: int, rounds: int, memory_bytes: int = 0) -> int:
    """Asks for random prompts of 20, of which a third have room; returns how many were known. Checks each."""
    cache = PromptCache(folder, disk_bytes=7 * 450, memory_bytes=memory_bytes)
    draw, known = random.Random(seed), 0
    for _ in range(rounds):
        number = draw.randrange(20)
        expected = features(number)
        found = cache.get(str(number))
        if found is None:
            cache.put(str(number), expected)
        else:
            assert torch.equal(found, expected), f"prompt {number}"
            known += 1
    return known


def hammer_in_three(folder: Path) -> list[int]:
    """In forks of this process, which has imported torch once for all and has used no thread."""
    with multiprocessing.get_context("fork").Pool(3, maxtasksperchild=1) as pool:
        return pool.starmap(hammer, [(folder, seed, 500) for seed in range(3)], chunksize=1)


@pytest.mark.slow
def test_servers_that_share_a_folder(tmp_path):
    """Three processes read, write and evict the same few entries; one more of each fails if a value is wrong."""
    script = "import sys, logging; logging.basicConfig(); from pathlib import Path; from tests import test_prompt_cache"
    script += "; print(*test_prompt_cache.hammer_in_three(Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = list(map(int, done.stdout.split()))
    assert len(found) == 3 and all(20 < known < 480 for known in found)  # there were hits, and evictions
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir())
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 7 * 450
    assert len(entries(tmp_path)) >= 5


def test_threads_that_share_a_cache(tmp_path):
    failures = []
    memory = 5 * features(0).nbytes

    def work(seed: int) -> None:
        try:
            hammer(tmp_path, seed, 300, memory)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []


def test_keys_tell_every_ingredient_apart():
    plain = {"encoder": {"files": [["a", 1, 2]]}, "loras": [], "tokens": [1, 2], "dtype": "torch.float32"}
    assert key_of(**plain) == key_of(**dict(reversed(plain.items())))
    others = [
        {"encoder": {"files": [["b", 1, 2]]}},
        {"encoder": {"files": [["a", 2, 2]]}},
        {"encoder": {"files": [["a", 1, 3]]}},
        {"loras": [["l", 1.0]]},
        {"tokens": [1, 2, 3]},
        {"tokens": [12]},
        {"dtype": "torch.bfloat16"},
    ]
    keys = [key_of(**plain), *(key_of(**{**plain, **other}) for other in others)]
    assert len(set(keys)) == len(keys)
    with pytest.raises(TypeError):
        key_of(tokens=[torch.zeros(1)])


def test_stamps_follow_links_and_see_changes(tmp_path):
    file, link = tmp_path / "blob", tmp_path / "model.safetensors"
    file.write_bytes(b"1234")
    link.symlink_to(file)
    before = stamps([link])
    assert before == stamps([file]) == [(str(file.resolve()), 4, file.stat().st_mtime_ns)]
    os.utime(file, ns=(1, 1))
    assert stamps([link]) != before
    file.write_bytes(b"12345")
    os.utime(file, ns=(1, before[0][2]))
    assert stamps([link]) != before
    assert stamps([tmp_path / "none"]) == [(str((tmp_path / "none").resolve()), -1, -1)]
