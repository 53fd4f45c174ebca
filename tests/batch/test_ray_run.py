"""The batch command on real Ray clusters of worker processes: the same images, whoever is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from zimage_core import image_files
from zimage_core.batch.ray_run import SETTINGS, Cluster

from ..helpers import NANO, ROOT
from . import ray_workers
from .making import SMALL, Run
from .test_ending import HEARD, on_a_disk

os.environ.update(SETTINGS)
pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="pip install '.[ray]'")
ALONE = [*SMALL, "--batch-size", "1"]
WAIT = 300  # seconds for what takes some where nothing else runs


def below(pid: int) -> dict[int, str]:
    """All processes that a process has started, and those have: their command lines."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return {one: lines.get(one, "") for one in found - {pid}}


def actors(pid: int) -> list[int]:
    return [one for one, line in below(pid).items() if "MapWorker" in line]


def until(true: Callable[[], Any], what: str, seconds: float = WAIT) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def done(run: Run) -> int:
    return run.journal.read_bytes().count(b"\n") if run.journal.exists() else 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One machine of two CPUs."""
    from ray.cluster_utils import Cluster as Machines

    made = Machines(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    yield made
    made.shutdown()


@pytest.fixture(autouse=True)
def left() -> Iterator[None]:
    """No test leaves this process connected."""
    yield
    import ray

    connected = ray.is_initialized()
    ray.shutdown()
    assert not connected


@pytest.fixture
def ray(cluster) -> list[str]:
    return ["--ray", cluster.address, "--ray-actors", "2", "--ray-cpus", "1"]


def started(run: Run, *options: str) -> subprocess.Popen[str]:
    """The command, in a process group of its own, as a shell would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "zimage_core", *run.command, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=HEARD,
        start_new_session=True,
    )


def test_images_are_those_of_a_local_run_bit_for_bit_and_runs_are_mixed(tmp_path, ray, capfd):
    rows: list[Any] = [{"prompt": f"a star {number}", "images": 1 + number % 2, "steps": 2} for number in range(10)]
    rows += [{"prompt": "a ring", "guidance_scale": 2, "negative_prompt": "a dog", "width": 48}]
    rows += [{"prompt": "a moon", "loras": f"{ROOT / 'nano' / 'zimage_nano_moon.safetensors'}:0.5", "seed": 7}]
    local, there = (Run(tmp_path, rows, *ALONE, name=name) for name in ("local", "there"))
    assert local() == 0
    there.write(rows[:3])
    assert there() == 0
    there.write(rows)
    capfd.readouterr()
    assert there(*ray, "--json") == 0
    said = capfd.readouterr()
    assert said.err == ""
    events = [json.loads(line) for line in said.out.splitlines()]
    assert [event["event"] for event in events] == ["start", *["row"] * 13, "end"]
    assert events[0]["done"] == 4 and events[-1]["done"] == 17 and events[-1]["status"] == "done"
    assert there.images() == local.images()
    assert sorted((line["row"], line["image"], line["seed"], line["key"]) for line in there.lines()) == sorted(
        (line["row"], line["image"], line["seed"], line["key"]) for line in local.lines()
    )
    assert sorted(path.name for path in there.out.iterdir() if path.suffix != ".png") == [
        ".results.lock",
        "results.jsonl",
    ]
    (there.out / "000004_4.png").unlink(missing_ok=True)
    assert there() == 0 and there.images() == local.images()  # here again


def test_a_folder_by_its_uri(tmp_path, ray, capfd):
    local, there = (Run(tmp_path, [f"a star {number}" for number in range(4)], *ALONE, name=name) for name in "lt")
    assert local() == 0 and there("--output", f"file://{there.out}", *ray) == 0
    assert there.images() == local.images() and len(there.lines()) == 4
    assert capfd.readouterr().err == ""


def test_a_row_that_kills_its_worker_is_given_up_and_the_rest_is_made(tmp_path, ray, capfd, monkeypatch):
    monkeypatch.setattr(Cluster, "worker", ray_workers.Poisoned)
    prompts = [f"a star {number}" for number in range(40)]
    prompts[21] = "poison"
    run = Run(tmp_path, prompts, *ALONE)
    assert run(*ray, "--ray-tries", "2") == 1
    said = capfd.readouterr()
    assert "row 22, image 1 failed: its worker died 2 times while making it" in said.err and said.err.count("\n") == 1
    assert said.out.startswith("39 of 40 images done (39 of 40 rows), 1 failed")
    assert Counter(line["status"] for line in run.lines()) == {"done": 39, "failed": 1}
    assert len({line["row"] for line in run.lines()}) == 40 and len(run.images()) == 39
    monkeypatch.undo()
    assert run(*ray) == 0 and len(run.images()) == 40  # the row is no poison to others


def test_a_model_that_can_not_be_loaded_is_one_clear_error(tmp_path, ray, capfd, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(NANO, model)
    shutil.rmtree(model / "tokenizer")
    run = Run(tmp_path, ["a star"] * 8, *ALONE, "-m", str(model))
    assert run(*ray) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and "tokenizer" in said and said.count("\n") == 1
    shutil.rmtree(model)
    assert run(*ray) == 2 and "there is no such file or folder" in capfd.readouterr().err
    monkeypatch.setattr(Cluster, "worker", ray_workers.Unloadable)
    run = Run(tmp_path, ["a star"] * 8, *ALONE)
    assert run(*ray, "--ray-tries", "1") == 2
    said = capfd.readouterr().err
    assert "workers died again and again while they loaded the model" in said and said.count("\n") == 1
    assert run.lines() == [] and not [*run.out.glob("*.png")]


def test_a_machine_that_goes_takes_nothing_with_it(tmp_path, cluster, ray, capfd):
    """Of two, where after that only one actor has room."""
    other = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    run = Run(tmp_path, [f"a star {number}" for number in range(150)], *ALONE, "-s", "8")

    def end() -> None:
        until(lambda: done(run) >= 20, "no images")
        cluster.remove_node(other, allow_graceful=False)

    thread = threading.Thread(target=end)
    thread.start()
    assert run(*ray[:2], "--ray-actors", "3", "--ray-cpus", "1") == 0
    thread.join()
    assert capfd.readouterr().err == ""
    assert Counter(line["row"] for line in run.lines()) == {number: 1 for number in range(1, 151)}
    assert len(run.images()) == 150


def test_a_full_disk_stops_the_run_and_a_local_one_goes_on(tmp_path):
    run = Run(tmp_path, [f"a star {number}" for number in range(40)], *ALONE)
    code, out, err = on_a_disk(run, 60, 0, "--ray", "--ray-actors", "2", "--ray-cpus", "1")
    assert code == 1, err
    assert "there is no room left to write" in err and "make room, then run the same command again" in err
    assert "Traceback" not in err and "stopped" in out
    assert 0 < len(run.lines()) < 40 and not [*run.out.glob("*.half")]
    for path in run.out.glob("*.png"):
        Image.open(path).load()
    assert run() == 0 and len(run.lines()) == 40 == len(run.images())


def test_a_cluster_that_goes_ends_the_run_and_a_local_one_goes_on(tmp_path):
    """Its head machine, and with it all workers."""
    from ray.cluster_utils import Cluster as Machines

    made = Machines(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    run = Run(tmp_path, [f"a star {number}" for number in range(400)], *ALONE, "-s", "8")
    process = started(run, "--ray", made.address, "--ray-actors", "2", "--ray-cpus", "1")
    try:
        until(lambda: done(run) >= 10, "no images")
    finally:
        made.shutdown()
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1, err
    # Ray ends the process, or tells it in time
    assert "ended by Ray because its cluster stopped working" in err or "the Ray cluster stopped working (" in err
    assert "run the same command again to go on" in err and "Traceback" not in err
    run.write([f"a star {number}" for number in range(40)])
    assert run() == 0 and len({line["row"] for line in run.lines()} & {*range(1, 41)}) == 40


def test_control_c_ends_the_cluster_and_a_local_run_goes_on(tmp_path):
    run = Run(tmp_path, [f"a star {number}" for number in range(400)], *ALONE, "-s", "8")
    process = started(run, "--ray", "--ray-actors", "2")
    until(lambda: done(run) >= 10, "no images")
    children = below(process.pid)
    assert any("raylet" in line for line in children.values()) and actors(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130, err
    assert "the workers are ended, saved images stay" in err and "run the same command again to go on" in err
    assert err.count("\n") == 3, err
    until(lambda: not [pid for pid in children if alive(pid)], f"still there: {children}")
    lines = run.lines()
    assert 10 <= len(lines) < 400 and out.startswith(f"{len(lines)} of 400 images done") and "interrupted" in out
    assert Counter(line["row"] for line in lines).most_common(1)[0][1] == 1
    assert len(run.images()) == len(lines)  # what was saved has its line
    run.write([f"a star {number}" for number in range(40)])
    assert run() == 0 and len({line["row"] for line in run.lines()} & {*range(1, 41)}) == 40


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_thousand_images_though_two_workers_and_the_driver_are_killed(tmp_path):
    """At random moments. Each image is right, none is missing, none is there twice, and nothing runs on behind."""
    from nano import judge
    from nano.evaluate import cases

    chance = random.Random(os.environ["FUZZ_SEED"])
    told = [case for case in cases(1000) if case.prompt]
    rows: list[dict[str, Any]] = [{"prompt": case.prompt, "width": 64, "height": 64, "steps": 2} for case in told]
    judged = range(0, len(rows), len(rows) // 120)
    for number in judged:
        rows[number] |= {"width": 128, "height": 128, "steps": 8, "guidance_scale": 2}
    run = Run(tmp_path, rows, "--cpu", "--quiet", "--batch-size", "4")
    ray = ["--ray", "--ray-actors", "2"]

    def kill_one(process: subprocess.Popen[str], lines: int) -> None:
        until(lambda: done(run) >= lines or process.poll() is not None, "no images")
        time.sleep(chance.random())
        os.kill(until(lambda: sorted(actors(process.pid)), "no workers")[-1], signal.SIGKILL)

    process = started(run, *ray)
    kill_one(process, chance.randrange(50, 250))
    until(lambda: done(run) >= 400, "no images after a worker was killed")
    left = actors(process.pid)
    process.kill()
    process.communicate(timeout=WAIT)
    assert len(left) >= 1
    until(lambda: not any(map(alive, left)), "workers run on", 60)  # agents of Ray's take a minute
    before = done(run)
    assert 400 <= before < len(rows)
    process = started(run, *ray)
    kill_one(process, before + chance.randrange(50, 250))
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0 and err == "" and out.startswith(f"{len(rows)} of {len(rows)} images done"), err

    lines = {line["row"]: line for line in run.lines()}
    assert len(run.lines()) == len(rows) == len(lines) and {line["status"] for line in lines.values()} == {"done"}
    assert {line["file"] for line in lines.values()} == {*run.images()} and not [*run.out.glob("*.half")]
    right = []
    for number, (row, case) in enumerate(zip(rows, told, strict=True)):
        line = lines[number + 1]
        assert line["seed"] == number
        with Image.open(run.out / line["file"]) as file:
            file.load()
            assert file.size == (row["width"], row["height"])
            assert file.text["parameters"].startswith(f"{case.prompt}\nSteps: {row['steps']}, ")
            assert f"Seed: {number}, " in file.text["parameters"]
            assert file.text["parameters"].endswith(f"Key: {line['key']}")
        if number in judged:
            image = image_files.read(run.out / line["file"])[0]
            right.append(all(judge.mark(image, case.scene).values()))
    assert len(right) >= 100 and sum(right) >= 0.97 * len(right)
