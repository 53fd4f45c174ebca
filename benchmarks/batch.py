"""Images per second of `batch`: its plain loop, and Ray with one worker and with two, each on a core of its own.

    python -m benchmarks.batch            # the nano model at 128², 8 steps; two free cores

Start-up is left out: the loop is warm, and with Ray the clock runs from when each worker has answered once, and
until the last answer but one of two workers, so that none is idle.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from zimage_core.batch.folder import Folder
from zimage_core.batch.identity import Fingerprints
from zimage_core.batch.maker import Maker, Settings
from zimage_core.batch.names import Template
from zimage_core.batch.plan import Model, Task, tasks
from zimage_core.batch.ray_run import CHUNK, Cluster, Wanted
from zimage_core.batch.ray_worker import Worker
from zimage_core.batch.rows import Row
from zimage_core.batch.run import outcomes

from . import models, results, timing

NANO = models.ROOT / "nano" / "snapshot"
COLUMNS = ["", ">images per second", ">of the plain loop", ">of one worker"]
TWICE = "plain loop, twice at once"  # what two cores could give
CORES = "ZIMAGE_BENCH_CORES"  # a folder in which each worker takes a core


class Pinned(Worker):
    """On a core that no other worker has; it begins when all have the model."""

    def _load(self) -> Maker:
        folder = Path(os.environ[CORES])
        for core in sorted(os.sched_getaffinity(0)):
            try:
                (folder / str(core)).touch(exist_ok=False)
            except FileExistsError:
                continue
            pin(core)
            break
        maker = super()._load()
        (folder / f"ready-{os.getpid()}").touch()
        while len([*folder.glob("ready-*")]) < int((folder / "count").read_text()):
            time.sleep(0.02)
        return maker


def pin(core: int) -> None:
    """All threads of this process that run, and those that they will start."""
    torch.set_num_threads(1)
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def planned(count: int, side: int, steps: int) -> list[Task]:
    rows = [Row(number, f"a red star number {number}", steps=steps) for number in range(1, count + 1)]
    return tasks(rows, Template("{row}.png"), 0, Model("nano", "0", side), Fingerprints())


def plain(todo: list[Task], settings: Settings, core: int) -> float:
    """Images per second of the loop that a local run is, on one core."""
    pin(core)
    with tempfile.TemporaryDirectory() as place:
        maker = Maker(settings)
        list(outcomes(maker.make(todo[:CHUNK]), Folder(Path(place) / "warm")))
        began = time.perf_counter()
        made = list(outcomes(maker.make(todo), Folder(place)))
        took = time.perf_counter() - began
    assert {one.status for one in made} == {"done"}
    return len(made) / took


def plain_elsewhere(count: int) -> float:
    """That of so many at once, added up, each in a process of its own: what has Ray in it can't be forked."""
    command = [sys.executable, "-m", "benchmarks.batch", *sys.argv[1:], "--plain"]
    cores = sorted(os.sched_getaffinity(0))[:count]
    begun = [subprocess.Popen([*command, str(core)], cwd=models.ROOT, stdout=subprocess.PIPE) for core in cores]
    rates = [float(process.communicate()[0]) for process in begun]
    return sum(rates)


def seconds_beside_workers() -> float:
    """CPU seconds so far of this process and of what Ray has started, but for the workers."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            if not any(Pinned.__name__ in part for part in process.cmdline()):  # Ray names actors after what they run
                spent = process.cpu_times()
                total += spent.user + spent.system
    return total


def workers(cluster: Cluster, todo: list[Task], settings: Settings, count: int) -> tuple[float, float]:
    """Images per second of so many workers, and the cores that driver and Ray took meanwhile."""
    with tempfile.TemporaryDirectory() as place:
        for left in Path(os.environ[CORES]).iterdir():
            left.unlink()
        (Path(os.environ[CORES]) / "count").write_text(str(count))
        cluster.wanted = Wanted(actors=count, cpus=1, gpus=0)
        times, others = [], []
        for outcome in cluster.make(settings, Folder(place), todo, lambda: False):
            assert outcome.status == "done", outcome
            times.append(time.perf_counter())
            others.append(seconds_beside_workers() if len(times) % CHUNK == 0 else others[-1] if others else 0.0)
    assert len(times) == len(todo)
    # answers come a chunk at a time: the first and the last of each worker are left out
    begin, end = CHUNK * count - 1, len(times) - 1 - CHUNK * (count - 1)
    took = times[end] - times[begin]
    return (end - begin) / took, (others[end] - others[begin]) / took


def main(a: argparse.Namespace) -> None:
    side, steps, count = (32, 1, 8 * CHUNK) if a.toy else (128, a.steps, a.images)
    todo = planned(count, side, steps)
    settings = Settings(str(NANO), batch_size=a.batch_size)
    if a.plain is not None:
        print(plain(todo, settings, a.plain))
        return
    found: dict[str, list[float]] = {name: [] for name in ("plain loop", TWICE, "Ray, 1 worker", "Ray, 2 workers")}
    beside: list[float] = []
    with tempfile.TemporaryDirectory() as cores:
        os.environ[CORES] = cores  # before Ray's processes are started
        with Cluster(Wanted(actors=2, cpus=1, gpus=0)) as cluster:
            cluster.worker = Pinned
            for _ in range(a.repeats):
                found["plain loop"].append(plain_elsewhere(1))
                found[TWICE].append(plain_elsewhere(2))
                for worker_count, name in enumerate(("Ray, 1 worker", "Ray, 2 workers"), 1):
                    rate, cores_beside = workers(cluster, todo, settings, worker_count)
                    found[name].append(rate)
                    beside.append(cores_beside)
                print({name: round(rates[-1], 2) for name, rates in found.items()}, file=sys.stderr, flush=True)
    rows = []
    for name, rates in found.items():
        cells = [f"{statistics.median(rates):.2f} ({min(rates):.2f}–{max(rates):.2f})"]
        cells.append("" if name == "plain loop" else timing.ratio(found, name, "plain loop"))
        cells.append(timing.ratio(found, name, "Ray, 1 worker") if name == "Ray, 2 workers" else "")
        rows.append([name, *cells])
    load = f"{a.busy}. " if a.busy else ""
    text = (
        f"{count} images of the nano model at {side}², {steps} steps, float32, batches of {a.batch_size}, a core for "
        f"each worker (the driver and Ray's own processes share both, and take {statistics.median(beside):.2f} of "
        f"one), start-up left out, medians of {a.repeats} and ranges. {load}\n\n{timing.table(COLUMNS, rows)}"
    )
    print(text)
    if not a.toy:
        results.write("batch, cpu", "batch", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=320, help="for each rate")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--busy", default="", metavar="TEXT", help="what else the machine did, to be told beside")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", type=int, metavar="CORE", help="tell the rate of the plain loop alone, once")
    parser.add_argument("--toy", action="store_true", help="tiny and not written down: does the script work?")
    arguments = parser.parse_args()
    if arguments.images % CHUNK:  # answers come a chunk at a time, and what is measured lies between two
        parser.error(f"--images is {arguments.images}, expected a multiple of {CHUNK}")
    main(arguments)
