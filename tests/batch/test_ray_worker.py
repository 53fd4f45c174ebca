"""What runs in the actors of a cluster, without one: chunks, marks of those who died, and what is told of it."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from zimage_core.batch.attempts import FOLDER, Attempts
from zimage_core.batch.folder import Folder, NoRoom
from zimage_core.batch.identity import Fingerprints
from zimage_core.batch.maker import Settings
from zimage_core.batch.names import Template
from zimage_core.batch.plan import Model, Task, tasks
from zimage_core.batch.ray_run import CHUNK, LOCAL, Sizes, Wanted, chunks, sizes
from zimage_core.batch.ray_worker import Job, Worker, packed, unpacked
from zimage_core.batch.rows import Row

from ..helpers import NANO, ROOT
from .making import SMALL, Run

GPU = {"CPU": 32.0, "GPU": 8.0}


def planned(count: int, **values: Any) -> list[Task]:
    rows = [Row(number, f"a star {number}", steps=1, **values) for number in range(1, count + 1)]
    return tasks(rows, Template("{row}.png"), 0, Model("nano", "0", 32), Fingerprints())


@pytest.fixture
def job(tmp_path) -> Job:
    Attempts(Folder(tmp_path), "run").begin()
    return Job(Settings(str(NANO), batch_size=1), Folder(tmp_path), "run", tries=3, limit=4, gpus=0)


def told(worker: Worker, *pieces: list[Task]) -> list[tuple[str, Any]]:
    batch = {"number": [*range(len(pieces))], "tasks": [packed(piece) for piece in pieces]}
    return [pickle.loads(one) for one in worker(batch)["told"]]


class Killed(BaseException):
    """In place of a signal: nothing of the worker runs any more, so its marks stay."""


def die(worker: Worker, monkeypatch: pytest.MonkeyPatch, *prompts: str) -> None:
    """The worker dies of these prompts, as by SIGKILL."""
    maker = worker._load()
    make = maker.make

    def deadly(these: list[Task]) -> Any:
        for made in make(these):
            if made.task.row.prompt in prompts:
                monkeypatch.setattr(Attempts, "clear", lambda *_: None)
                raise Killed
            yield made

    monkeypatch.setattr(maker, "make", deadly)
    worker._maker = maker


def test_outcomes_of_a_chunk(job):
    worker = Worker(job)
    found = told(worker, planned(3)[:2], planned(3)[2:])
    assert [(kind, one.row, one.status) for kind, one in found] == [("outcome", row, "done") for row in (1, 2, 3)]
    assert sorted(path.name for path in job.store.path.glob("*.png")) == ["1.png", "2.png", "3.png"]
    assert not worker.attempts.left() and worker.attempts.seen()


def test_a_row_that_kills_is_given_up_after_so_many_tries(job, monkeypatch):
    todo = planned(4)
    deaths = 0
    for _ in range(9):
        worker = Worker(job)  # as Ray starts another one for the same chunk
        with monkeypatch.context() as patch:
            die(worker, patch, "a star 2")
            try:
                found = told(worker, todo)
                break
            except Killed:
                deaths += 1
    assert deaths == 3
    assert [(one.row, one.status) for _, one in found] == [(1, "done"), (2, "failed"), (3, "done"), (4, "done")]
    assert found[0][1].seconds == 0 and found[2][1].seconds > 0  # saved before the first death; made after it
    assert "its worker died 3 times while making it" in found[1][1].error
    assert worker.attempts.left() == ["image-2-1"]  # else the chunk would be made again, were its outcomes lost
    assert [one.status for _, one in told(worker, todo)] == ["done", "failed", "done", "done"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("tries, count, deaths", [(1, 1, 1), (1, 3, 2), (2, 1, 2), (2, 2, 2)])
def test_tries(job, monkeypatch, tries, count, deaths):
    """Others of its chunk are never given up for it, which takes two deaths at least."""
    todo, died = planned(count), 0
    for _ in range(9):
        worker = Worker(replace(job, tries=tries))
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            die(worker, patch, "a star 1")
            died += 1
            found = told(worker, todo)
            died -= 1
            break
    assert died == deaths
    assert [one.status for _, one in found] == ["failed"] + ["done"] * (count - 1)
    assert f"died {deaths} times" in found[0][1].error


def test_errors_of_a_row_leave_no_mark(job):
    todo = planned(1, width=2**20, height=2**20) + planned(2)[1:]
    found = told(Worker(job), todo)
    assert {(one.row, one.status) for _, one in found} == {(1, "failed"), (2, "done")}
    assert not Attempts(job.store, "run").left()


def test_what_every_worker_would_meet_ends_the_run(job, tmp_path, monkeypatch):
    def fatal(**changes: Any) -> str:
        ((kind, text),) = told(Worker(replace(job, **changes)), planned(1))
        assert kind == "fatal"
        return text

    assert "is not the same here" in fatal(store=Folder(tmp_path / "elsewhere"))
    assert "CheckpointError" in fatal(settings=Settings(str(tmp_path)))
    for number in range(4):
        job.store.touch(f"{FOLDER}/run/load-{number}.0")
    assert "workers died again and again while they loaded the model" in fatal()

    def full(*_: Any) -> None:
        raise NoRoom(28, "there is no room left to write", "here")

    Attempts(job.store, "run").begin()
    monkeypatch.setattr(Folder, "write", full)
    assert told(Worker(job), planned(1)) == [("no room", (28, "there is no room left to write", "here"))]


def test_chunks_hold_each_task_once_and_alike_side_by_side():
    rows = [Row(n, "a star", steps=1 + n % 2, loras=((str(NANO / "model_index.json"), n % 3),)) for n in range(1, 301)]
    todo = tasks(rows, Template("{row}.png"), 0, Model("nano", "0", 32), Fingerprints())
    found = chunks(todo, 2)
    assert sorted(task.row.number for chunk in found for task in chunk) == [*range(1, 301)]
    assert all(len({task.row.loras for task in chunk}) == 1 and len(chunk) <= CHUNK for chunk in found)
    assert sum(len({task.row.steps for task in chunk}) > 1 for chunk in found) <= 3
    assert max(map(len, chunks(todo[:8], 2))) == 1  # both get something
    assert {len(chunk) for chunk in chunks(planned(400), 2, batch_size=5)} == {15, 10}
    assert max(map(len, chunks(planned(400), 2, batch_size=40))) == 40
    assert unpacked(packed(todo[:3])) == todo[:3]


@pytest.mark.parametrize(
    "wanted, machines, found",
    [
        (Wanted(), [GPU, GPU, {"CPU": 4.0}], Sizes(16, 1, 1)),
        (Wanted(gpus=0.5), [GPU], Sizes(16, 0.5, 1)),
        (Wanted(gpus=0.4), [GPU], Sizes(16, 0.4, 1)),
        (Wanted(gpus=2), [GPU], Sizes(4, 2, 1)),
        (Wanted(cpus=16), [GPU], Sizes(2, 1, 16)),
        (Wanted(actors=3), [GPU], Sizes(3, 1, 1)),
        (Wanted(), [{"CPU": 8.0}, {"CPU": 4.0}], Sizes(3, 0, 4)),
        (Wanted(cpus=1), [{"CPU": 8.0}, {"CPU": 4.0}], Sizes(12, 0, 1)),
        (Wanted(actors=2), [{"CPU": 2.0}], Sizes(2, 0, 1)),
        (Wanted(actors=5), [{"CPU": 2.0}], Sizes(5, 0, 1)),
        (Wanted(gpus=0), [GPU], Sizes(1, 0, 32)),
    ],
)
def test_how_many_actors_and_what_each_takes(wanted, machines, found):
    assert sizes(wanted, machines) == found


def test_where_no_actor_fits():
    with pytest.raises(ValueError, match="no machine of the Ray cluster has 1 GPUs and 1 CPUs"):
        sizes(Wanted(gpus=1), [{"CPU": 8.0}])


def test_addresses():
    for address in (LOCAL, "auto", "head:6379", "10.0.0.1:6379", "[::1]:6379"):
        assert Wanted(address).address == address
    for address in ("prompts.txt", "ray://head:10001", "head"):
        with pytest.raises(ValueError, match="give auto or host:port"):
            Wanted(address)


def test_wrong_options_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    run = Run(tmp_path, ["a star"], *SMALL)
    assert run("--ray-actors", "2") == 2
    assert capsys.readouterr().err == "error: --ray-actors is for a Ray cluster; add --ray\n"
    with pytest.raises(SystemExit):
        run("--ray", "--ray-gpus", "1.5")
    assert "neither a share (0 to 1) nor a whole number" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("--ray") == 2
    assert capsys.readouterr().err == "error: --ray needs Ray; pip install 'comfyui-zimage[ray]'\n"
    assert not run.out.exists()


@pytest.mark.slow
def test_without_the_option_ray_is_never_imported(tmp_path):
    run = Run(tmp_path, ["a star"], *SMALL)
    script = "import sys; from zimage_core.__main__ import main; print(main(sys.argv[1:]), *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script, *run.command], cwd=ROOT, capture_output=True, text=True)
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0" and "zimage_core.batch.run" in modules
    assert not {"ray", "pyarrow", "zimage_core.batch.ray_run"} & {*modules}
