"""A batch across servers that stand in for ComfyUI: what they are asked for, and what becomes of it."""

from __future__ import annotations

import json
from functools import partial

import pytest
from PIL import Image

from zimage_core.batch.servers import Refused, Server

from . import with_servers
from .making import Run
from .with_servers import WORKFLOW, run_of, texts

hasty, one, two = with_servers.hasty, with_servers.one, with_servers.two


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
    assert len(fast.ran) > 2 * len(slow.ran) > 0
    assert deepest[0] == max(deepest) == 2  # the fast one may be done with two before anybody looks


def test_a_server_that_has_nothing_left_takes_what_waits_at_another(tmp_path, two):
    slow, fast = two
    slow.seconds, fast.seconds = 1.5, 0.01
    run = run_of(tmp_path, [f"a {number}" for number in range(12)], slow, fast)
    assert run() == 0 and len(run.images()) == 12
    assert len(slow.ran) == 1 and sorted(texts(slow) + texts(fast)) == sorted(f"a {number}" for number in range(12))


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
