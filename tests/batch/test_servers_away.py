"""A batch across servers that go away, forget, answer late, or are left by a run that is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from zimage_core.batch import worker
from zimage_core.batch.plan import Task
from zimage_core.batch.pool import Job, Pool
from zimage_core.batch.rows import Row
from zimage_core.batch.servers import Queued, Server
from zimage_core.batch.uploads import Uploads

from ..helpers import ROOT
from . import with_servers
from .with_servers import WORKFLOW, held, run_of, soon, texts

hasty, one, two = with_servers.hasty, with_servers.one, with_servers.two

HEARD = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


def test_a_prompt_that_a_restart_has_lost_is_queued_again(tmp_path, one):
    run = run_of(tmp_path, ["a", "b", "c"], one)
    thread = held(run, one)
    one.forget()
    one.held = False
    thread.join(20)
    assert len(run.images()) == 3 and sorted(texts(one)) == ["a", "b", "c"] and len(one.posted) == 5


@pytest.mark.parametrize("fault", ["reset", "late"])
def test_an_answer_that_gets_lost_queues_nothing_twice(tmp_path, one, monkeypatch, fault):
    """The prompt has arrived, and waits or has ended; its answer hasn't come."""
    monkeypatch.setattr("zimage_core.batch.servers.TIMEOUT", 0.3)
    lost = []

    def after(path):
        if path == "/prompt" and len(one.posted) in (2, 3) and len(lost) < 2:
            lost.append(path)
            time.sleep(0.4 if fault == "late" else 0)
            return True
        return False

    one.after, one.seconds = after, 0.1
    run = run_of(tmp_path, ["a", "b", "c", "d"], one)
    assert run() == 0 and len(run.images()) == 4 and sorted(texts(one)) == ["a", "b", "c", "d"] and len(lost) == 2


def test_images_that_do_not_arrive_whole_are_asked_for_again(tmp_path, one):
    lost = []
    one.after = lambda path: path == "/view" and len(lost) < 1 and not lost.append(path)
    run = run_of(tmp_path, ["a", "b"], one)
    assert run() == 0 and len(run.images()) == 2 == len(one.ran) and lost


def test_an_image_that_the_server_has_deleted_is_made_anew(tmp_path, one):
    run = run_of(tmp_path, ["a"], one)
    assert run() == 0
    (run.out / "000001_0.png").unlink()
    one._files.clear()
    assert run() == 0 and len(one.ran) == 2 and "zimage_batch" in one.ran[1]["9"]["inputs"]


def test_rows_of_a_server_that_goes_away_go_to_another(tmp_path, two, capsys):
    first, second = two
    first.held = True
    run = run_of(tmp_path, [f"a {number}" for number in range(8)], *two)
    thread = threading.Thread(target=run)
    thread.start()
    soon(lambda: len(first.pending) == 2 and len(second.ran) == 6)
    first.stop()
    thread.join(20)
    first.start()
    assert len(run.images()) == 8 == len(second.ran) == len(run.lines()) and not first.ran
    told = capsys.readouterr().err
    assert told.count(f"{first.url} doesn't answer (") == 1


def test_a_server_that_comes_back_goes_on_where_it_was(tmp_path, one, capsys):
    run = run_of(tmp_path, ["a", "b", "c"], one)
    thread = held(run, one)
    one.stop()
    time.sleep(0.7)
    met = threading.Event()
    one.before = lambda path: met.set() if path == "/history" else None
    one.start()  # with its queue, as after a broken network
    assert met.wait(10)  # its queue has been looked at
    one.held = False
    thread.join(20)
    assert len(run.images()) == 3 and sorted(texts(one)) == ["a", "b", "c"] and len(one.posted) == 3
    told = capsys.readouterr().err
    assert told.count("doesn't answer") == 1 and told.count(f"{one.url} is back") == 1


def test_what_another_made_meanwhile_is_taken_out_of_the_queue(tmp_path, two):
    first, second = two
    first.held = second.held = True
    run = run_of(tmp_path, ["a", "b", "c", "d", "e"], *two)
    thread = threading.Thread(target=run)
    thread.start()
    soon(lambda: len(first.pending) == 2 == len(second.pending))
    first.stop()
    time.sleep(0.6)  # until its rows are given back
    second.held = False
    soon(lambda: len(second.ran) >= 4)
    second.held = True
    first.start()
    soon(lambda: not first.pending)
    second.held = False
    thread.join(20)
    assert len(run.images()) == 5 and not first.ran and len(second.ran) == 5


def test_patience_has_an_end_and_the_next_run_goes_on(tmp_path, one, capsys):
    one.held = True
    run = run_of(tmp_path, ["a", "b"], one, options=("--comfyui-patience", "1"))
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run()))
    thread.start()
    soon(lambda: len(one.pending) == 2)
    one.stop()
    thread.join(20)
    told = capsys.readouterr()
    assert codes == [1] and "error: no server has answered for " in told.err and "stopped" in told.out
    one.held = False
    one.start()
    assert run() == 0 and len(run.images()) == 2 and len(one.posted) == 2


def test_one_that_comes_late_and_lacks_something_gets_no_rows(tmp_path, two, capsys):
    first, late = two
    first.seconds = 0.1
    late.stop()
    late.info.pop("ZImageSampler")
    run = run_of(tmp_path, [f"a {number}" for number in range(12)], *two)
    thread = threading.Thread(target=run)
    thread.start()
    soon(lambda: first.ran)
    late.start()
    thread.join(30)
    assert not thread.is_alive() and len(run.images()) == 12 and not late.posted
    assert f"{late.url} is left out: it doesn't know ZImageSampler" in capsys.readouterr().err


def test_what_begins_while_it_is_handed_on_stays():
    class Server:
        url = "http://somebody"
        found: list[Queued] = []
        done = None

        def delete(self, prompts) -> None:
            self.deleted = prompts

        def queue(self) -> list[Queued]:
            return self.found

        def ended(self, prompt):
            return self.done

    row = Row(number=1, prompt="a")
    running, waiting = (Job(Task(row, image, 0, 64, 64, "a.png", "key", "a"), {}) for image in (1, 2))
    server, pool = Server(), Pool([])
    orders = worker.Orders("me", lambda job: {}, Uploads(Path()), str, lambda info: [], print)
    one = worker.Worker(server, pool, orders, checked=True)
    one._flights = {"r": worker.Flight(running, running=True), "w": worker.Flight(waiting)}
    server.found = [Queued("w", {}, True)]  # it runs now
    assert not one._hand_on() and server.deleted == ["w"] and [*one._flights] == ["r", "w"]
    server.found, server.done = [], "ended"
    assert not one._hand_on() and [*one._flights] == ["r", "w"]
    server.done = None
    assert one._hand_on() and [*one._flights] == ["r"] and pool.take("http://other", busy=False) is waiting


def test_pauses_grow_to_thirty_seconds():
    class Nobody:
        url = "http://nobody"

    said = []
    orders = worker.Orders("me", lambda job: {}, Uploads(Path()), str, lambda info: [], said.append)
    lost = worker.Worker(Nobody(), Pool([]), orders, checked=True)
    gone = worker.Gone("refused", refused=True)
    pauses = [lost._lost(gone) for _ in range(9)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30] and len(said) == 1


@pytest.mark.slow
def test_a_killed_run_is_taken_up(tmp_path, two):
    """SIGKILL, with prompts of its own and of others in the queues; one of its rows has changed since."""
    first, second = two
    first.held = second.held = True
    theirs = first.queue(json.loads(WORKFLOW.read_text()), {"client_id": "other"})
    run = run_of(tmp_path, ["a", "b", "c", "d", "e"], *two)
    process = subprocess.Popen([sys.executable, "-m", "zimage_core", *run.command], cwd=ROOT, stderr=subprocess.DEVNULL)
    soon(lambda: len(first.pending) == 3 and len(second.pending) == 2, 60)
    process.kill()
    process.wait(30)
    queued = {item[1] for item in (*first.pending, *second.pending)}
    run.write(["a", "changed", "c", "d", "e"])
    first.held = second.held = False
    soon(lambda: not second.pending and len(second.ran) == 2)  # ended while nobody looked
    assert run() == 0 and len(run.images()) == 5
    assert theirs in queued and theirs in {*first.history}
    ours = [text for text in texts(first) + texts(second) if text in "abcde" or text == "changed"]
    assert sorted(ours) in (sorted(["a", "c", "d", "e", "changed"]), sorted(["a", "b", "c", "d", "e", "changed"]))
    assert Image.open(run.out / "000002_1.png").text["parameters"].startswith("changed\n")


@pytest.mark.slow
def test_control_c_takes_back_own_prompts_only(tmp_path, one):
    one.held = True
    theirs = one.queue(json.loads(WORKFLOW.read_text()), {"client_id": "other"})
    run = run_of(tmp_path, ["a", "b", "c", "d"], one)
    process = subprocess.Popen(
        [sys.executable, "-m", "zimage_core", *run.command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=HEARD,
    )
    soon(lambda: len(one.pending) == 3, 60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "what waits in the servers' queues is taken back" in err and "run the same command again to go on" in err
    assert [item[1] for item in one.pending] == [theirs] and "interrupted" in out
    one.held = False
    assert run() == 0 and len(run.images()) == 4 and sorted(texts(one))[:4] == ["a", "b", "c", "d"]


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing_and_queue_nothing_twice(tmp_path, two):
    """SIGKILL, six times at random moments: each row has been run once, and its image is there whole."""
    for server in two:
        server.seconds = 0.15
    rows = [f"a {number}" for number in range(100)]
    run = run_of(tmp_path, rows, *two)
    chance = random.Random(os.environ["FUZZ_SEED"])
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-m", "zimage_core", *run.command], cwd=ROOT)
        made = len(two[0].ran) + len(two[1].ran)
        soon(lambda made=made: len(two[0].ran) + len(two[1].ran) > made + 2, 60)
        time.sleep(chance.random() * 0.4)
        process.kill()
        process.wait(30)
        for path in run.out.glob("*.png"):
            Image.open(path).load()
    assert run() == 0 and len(run.images()) == 100 and not [*run.out.glob("*.half")]
    assert sorted(texts(two[0]) + texts(two[1])) == sorted(rows)
    lines = [line["row"] for line in run.lines()]
    assert sorted(lines) == [*range(1, 101)]


@pytest.mark.slow
def test_a_second_control_c_ends_at_once(tmp_path, one):
    """While a server hangs, for which the first one waits a while."""
    hanging = threading.Event()

    def before(path):
        if path == "/queue" and one.posted:
            hanging.set()
            time.sleep(20)

    one.before = before
    run = run_of(tmp_path, ["a", "b"], one)
    process = subprocess.Popen(
        [sys.executable, "-m", "zimage_core", *run.command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=HEARD,
    )
    assert hanging.wait(60)
    process.send_signal(signal.SIGINT)
    assert "again ends at once" in process.stderr.readline() + process.stderr.readline()
    time.sleep(1)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and time.monotonic() - began < 2


def test_a_row_that_ends_every_server_is_given_up():
    """It is the one that runs when they go; the one that waits behind it is not to blame."""
    said = []
    row = Row(number=1, prompt="a")
    killer, other = (Job(Task(row, image, 0, 64, 64, "a.png", "key", "a"), {}) for image in (1, 2))
    pool = Pool([])
    orders = worker.Orders("me", lambda job: {}, Uploads(Path()), str, lambda info: [], said.append)
    for _ in range(worker.CRASHES):
        lost = worker.Worker(Server("nowhere"), pool, orders, checked=True)
        lost._flights = {"1": worker.Flight(killer, running=True), "2": worker.Flight(other)}
        lost._lost(worker.Gone("reset", refused=True))
    (failed,) = [one for one in said if one.job is not None]
    assert failed.job is killer and "4 times a server went away while it ran this" in failed.error
    assert other.crashes == 0 and pool.claim(other.mark) is other
