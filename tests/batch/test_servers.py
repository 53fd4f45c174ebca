"""A batch across servers that stand in for ComfyUI: what they are asked for, and every fault they may have."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from PIL import Image

from zimage_core.batch import worker
from zimage_core.batch.plan import Task
from zimage_core.batch.pool import Job, Pool
from zimage_core.batch.rows import Row
from zimage_core.batch.servers import Refused, Server

from ..helpers import ROOT
from .making import Run
from .stand_in import StandIn

WORKFLOW = ROOT / "workflows" / "api" / "zimage_nano_txt2img_api.json"
HEARD = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def hasty(monkeypatch) -> None:
    monkeypatch.setattr(worker, "POLL", (0.01, 0.05))


@pytest.fixture
def one() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@pytest.fixture
def two() -> Iterator[tuple[StandIn, StandIn]]:
    with StandIn() as first, StandIn() as second:
        yield first, second


def run_of(folder, rows, *servers: StandIn, options=()) -> Run:
    urls = [word for server in servers for word in ("--comfyui", server.url)]
    return Run(folder, rows, *urls, "--workflow", str(WORKFLOW), "--width", "64", "--height", "48", "--quiet", *options)


def texts(server: StandIn) -> list[str]:
    return [nodes["4"]["inputs"]["text"] for nodes in server.ran]


def soon(true, seconds=10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_images_are_named_recorded_and_kept_as_the_server_made_them(tmp_path, one, capsys):
    rows = [{"prompt": "a", "images": 2, "name": "x"}, {"prompt": "b\u00e9", "seed": 9, "steps": 3}]
    run = run_of(tmp_path, rows, one, options=("--seed", "5", "--name", "{name}/{seed}.png"))
    assert run() == 0
    assert capsys.readouterr().out.startswith("3 of 3 images done (2 of 2 rows), ")
    assert {*run.images()} == {"x/5.png", "x/6.png", "000002/9.png"}
    lines = {(line["row"], line["image"]): line for line in run.lines()}
    assert [*lines[2, 1]] == ["row", "image", "file", "seed", "seconds", "status", "error", "key"]
    assert lines[2, 1]["seed"] == 9 and lines[2, 1]["file"] == "000002/9.png" and lines[1, 2]["seed"] == 6
    image = Image.open(run.out / "000002/9.png")
    image.load()
    assert (run.out / "000002/9.png").read_bytes().count(b"parameters\0") == 1
    workflow = json.loads(image.info["prompt"])  # the server's text is kept, somebody else's parameters aren't
    assert workflow["4"]["inputs"]["text"] == "b\u00e9" and workflow["7"]["inputs"]["seed"] == 9
    assert image.size == (64, 48) and image.info["parameters"] == (
        "b\u00e9\nSteps: 3, CFG scale: 3, Seed: 9, Size: 64x48, Model: Z-Image-Nano (built in), "
        f"Key: {lines[2, 1]['key']}"
    )
    assert run() == 0 and len(one.ran) == 3 and len(run.lines()) == 3
    (run.out / "x/5.png").unlink()
    run.journal.unlink()
    assert run() == 0 and len(run.lines()) == 3 and len(one.posted) == 3  # by their texts, and the history


@pytest.mark.parametrize("extension, kind", [("jpg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_are_converted(tmp_path, one, extension, kind):
    run = run_of(tmp_path, ["a"], one, options=("--name", "{row}." + extension))
    assert run() == 0
    assert Image.open(run.out / f"1.{extension}").format == kind
    run.journal.unlink()
    assert run() == 0 and len(one.posted) == 1 and run.lines()[0]["seconds"] == 0


def test_several_images_of_a_prompt(tmp_path, one, capsys):
    one.images = 3
    run = run_of(tmp_path, ["a", "b"], one)
    assert run() == 0
    assert capsys.readouterr().out.startswith("6 of 6 images done (2 of 2 rows)")
    made = run.images()
    assert {*made} == {f"00000{row}_{row - 1}{end}.png" for row in (1, 2) for end in ("", "_2", "_3")}
    # the first has its line last: once it is there, so are the others
    for row in (1, 2):
        assert [line["image"] for line in run.lines() if line["row"] == row] == [3, 2, 1]
    (run.out / "000001_0_3.png").unlink()
    assert run() == 0 and run.images() == made and len(one.posted) == 2  # fetched from the history
    run.journal.unlink()
    for path in run.out.glob("*_0.png"):
        path.unlink()
    assert run() == 0 and run.images() == made  # further ones are known by their text
    (run.out / "000003_2_2.png").write_text("mine")
    run.write(["a", "b", "c"])
    assert run() == 1 and "000003_2_2.png is in the way" in capsys.readouterr().err
    assert run() == 2 and (run.out / "000003_2_2.png").read_text() == "mine"  # it is known to be wanted by now
    (run.out / "000003_2_2.png").unlink()
    assert run() == 0 and len(run.images()) == 9


def test_what_is_shown_is_taken_where_nothing_is_saved(tmp_path, one):
    nodes = json.loads(WORKFLOW.read_text())
    shown = {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}
    for name, content, count in (("both", {**nodes, "10": shown}, 1), ("shown", {**nodes, "9": shown}, 1)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        run = Run(tmp_path, ["a"], "--comfyui", one.url, "--workflow", str(path), "--quiet", name=name)
        assert run() == 0 and len(run.images()) == count
        assert one.viewed == {"both": ["output"], "shown": ["output", "temp"]}[name]


def test_two_wait_at_each_server_and_the_fast_one_makes_more(tmp_path, two):
    slow, fast = two
    slow.seconds, fast.seconds = 0.2, 0.01
    deepest = [0, 0]

    def look(number, server, path) -> None:
        own = [item for item in (*server.pending, *server.running)]
        deepest[number] = max(deepest[number], len(own))

    for number, server in enumerate(two):
        server.before = partial(look, number, server)
    run = run_of(tmp_path, [f"a {number}" for number in range(20)], slow, fast)
    assert run() == 0 and len(run.images()) == 20
    assert sorted(texts(slow) + texts(fast)) == sorted(f"a {number}" for number in range(20))
    assert len(fast.ran) > 2 * len(slow.ran) > 0 and deepest == [2, 2]


def test_equal_rows_get_their_images_from_a_server_that_remembers(tmp_path, one):
    one.remembers = True  # an identical prompt has no outputs in its history
    run = run_of(tmp_path, [{"prompt": "a", "seed": 1}] * 4, one, options=("--name", "{row}.png"))
    assert run() == 0
    assert {*run.images()} == {f"{row}.png" for row in (1, 2, 3, 4)} and len({*run.images().values()}) <= 4
    pixels = {Image.open(run.out / name).convert("RGB").tobytes() for name in run.images()}
    assert len(pixels) == 1 and len({line["key"] for line in run.lines()}) == 1


def test_what_fails_is_told_and_not_sent_to_all(tmp_path, two, capsys):
    run = run_of(tmp_path, ["a", "this fails", "refused", "d"], *two)
    assert run() == 1
    told = capsys.readouterr()
    assert "row 2, image 1 failed: Z-Image Sampler: ValueError: no such latent (http://127.0.0.1:" in told.err
    assert "row 3, image 1 failed: http://127.0.0.1:" in told.err
    assert "refuses it: Prompt: Value not in list: text: 'refused' not in [...]" in told.err
    assert told.out.startswith("2 of 4 images done (2 of 4 rows), 2 failed")
    assert len(two[0].ran) + len(two[1].ran) == 3
    assert run("--retry-failed") == 1 and len(two[0].ran) + len(two[1].ran) == 5  # in this run, and once more


def test_a_prompt_that_a_restart_has_lost_is_queued_again(tmp_path, one):
    one.held = True
    run = run_of(tmp_path, ["a", "b", "c"], one)
    thread = threading.Thread(target=run)
    thread.start()
    soon(lambda: len(one.pending) == 2)
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
    one.held = True
    run = run_of(tmp_path, ["a", "b", "c"], one)
    thread = threading.Thread(target=run)
    thread.start()
    soon(lambda: len(one.pending) == 2)
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


def test_pauses_grow_to_thirty_seconds():
    class Nobody:
        url = "http://nobody"

    class Pool:
        def give_back(self, jobs) -> None:
            pass

    said = []
    orders = worker.Orders("me", lambda job: {}, str, lambda info: [], said.append)
    lost = worker.Worker(Nobody(), Pool(), orders, checked=True)
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


def test_events_as_json(tmp_path, one, capsys):
    run = run_of(tmp_path, ["a", "this fails"], one, options=("--json",))
    run.options = tuple(word for word in run.options if word != "--quiet")
    assert run() == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["start", "row", "row", "end"]
    assert [{**line, "event": "row"} for line in run.lines()] == events[1:3]
    assert (events[3]["status"], events[3]["done"], events[3]["failed"]) == ("failed", 1, 1)


def test_options_that_make_no_sense(tmp_path, one, capsys):
    (tmp_path / "lora.safetensors").touch()
    run = run_of(tmp_path, ["a"], one)
    for options, words in (
        (["--model", "x"], "--model is not for ComfyUI servers: the workflow names the model"),
        (["--lora", str(tmp_path / "lora.safetensors")], "--lora is not for ComfyUI servers: put LoRA nodes"),
        (["--batch-size", "2"], "--batch-size is not for"),
        (["--cpu"], "--cpu is not for"),
        (["--comfyui", one.url], None),
        (["--comfyui", one.url + "/"], "names a server twice"),
        (["--comfyui", "ftp://a"], "'ftp://a' is no address of a server"),
        (["--comfyui", "http://a:b"], "is no address of a server"),
    ):
        if words is not None:
            assert run(*options) == 2 and words in capsys.readouterr().err, options
    run.options = ("--comfyui", one.url)
    assert run() == 2 and "add --workflow FILE_api.json" in capsys.readouterr().err
    run.options = ("--workflow", str(WORKFLOW))
    assert run() == 2 and "--workflow is for ComfyUI servers; add --comfyui" in capsys.readouterr().err
    assert not run.out.exists() and not one.posted


def test_servers_are_checked_before_anything_is_queued(tmp_path, two, capsys):
    first, second = two
    del second.info["ZImageSampler"]
    second.info["ZImageVAELoader"]["input"]["required"]["model"][1]["options"] = ["other.safetensors"]
    run = run_of(tmp_path, ["a"], *two)
    assert run() == 2
    told = capsys.readouterr().err
    assert f"{second.url}: it doesn't know ZImageSampler (node 7" in told and first.url not in told
    assert f"{second.url}: Load Z-Image VAE.model is 'Z-Image-Nano (built in)', which it doesn't offer" in told
    assert not first.posted and not run.out.exists()


def test_no_server_at_all_and_one_of_two(tmp_path, two, capsys):
    first, second = two
    second.stop()
    run = run_of(tmp_path, ["a", "b"], *two)
    assert run() == 0 and len(first.ran) == 2
    assert f"{second.url} doesn't answer (" in capsys.readouterr().err
    first.stop()
    assert run() == 2
    told = capsys.readouterr().err
    assert "no ComfyUI server answers" in told and first.url in told and second.url in told
    first.start(), second.start()


def test_what_is_no_comfyui(tmp_path, one, capsys):
    one.info = []  # type: ignore[assignment]
    assert run_of(tmp_path, ["a"], one)() == 2
    assert "it answers what no ComfyUI does" in capsys.readouterr().err


def test_outputs_that_would_be_left_out_are_a_refusal(one):
    reply = one._reply

    def partly(path, query, body):
        status, answer = reply(path, query, body)
        if path == "/prompt":
            answer["node_errors"] = {"10": {"errors": [{"message": "Required input is missing", "details": "images"}]}}
        return status, answer

    one._reply, one.held = partly, True
    with pytest.raises(Refused) as error:
        Server(one.url).submit(json.loads(WORKFLOW.read_text()), "0" * 32, {"client_id": "me"})
    assert error.value.words(lambda node: f"node {node}") == "node 10: Required input is missing: images"
    assert not one.pending


def test_a_row_that_ends_every_server_is_given_up():
    """It is the one that runs when they go; the one that waits behind it is not to blame."""
    said = []
    row = Row(number=1, prompt="a")
    killer, other = (Job(Task(row, image, 0, 64, 64, "a.png", "key", "a"), {}) for image in (1, 2))
    pool = Pool([])
    orders = worker.Orders("me", lambda job: {}, str, lambda info: [], said.append)
    for _ in range(worker.CRASHES):
        lost = worker.Worker(Server("nowhere"), pool, orders, checked=True)
        lost._flights = {"1": worker.Flight(killer, running=True), "2": worker.Flight(other)}
        lost._lost(worker.Gone("reset", refused=True))
    (failed,) = [one for one in said if one.job is not None]
    assert failed.job is killer and "4 times a server went away while it ran this" in failed.error
    assert other.crashes == 0 and pool.claim(other.mark) is other
