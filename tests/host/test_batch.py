"""A batch across real ComfyUI servers: what they make is right, whichever of them is killed on the way."""

from __future__ import annotations

import json
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Client, Server
from PIL import Image, ImageChops

from nano import judge, scenes
from zimage_core.__main__ import main
from zimage_core.batch.servers import Server as Batch
from zimage_core.image_files import read

from ..batch.making import Run
from ..batch.stand_in import INFO
from ..helpers import ROOT

# In tests/batch servers stand in, which are checked against real ones here
pytestmark = pytest.mark.slow

API = ROOT / "workflows" / "api"
NANO = API / "zimage_nano_txt2img_api.json"
WORDS = [
    f"a {color} {shape} on a {ground} background"
    for color in ("red", "blue", "green", "yellow", "purple")
    for shape in ("circle", "star", "square", "triangle")
    for ground in ("white", "black", "gray")
]


def run_of(folder: Path, rows: list, *urls: str, workflow: Path = NANO, name: str = "out") -> Run:
    servers = [word for url in urls for word in ("--comfyui", url)]
    return Run(folder, rows, *servers, "--workflow", str(workflow), "--quiet", name=name)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.fixture
def second(host: Server, tmp_path: Path) -> Iterator[Server]:
    """A server of a test's own, to be killed."""
    with Server(host.comfyui, packs=host.packs, base=tmp_path / "second", environment=host.environment) as server:
        yield server


def kill(server: Server) -> None:
    server._signal_group(signal.SIGKILL)
    server.process.wait()


def wait_for(run: Run, lines: int, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not run.journal.exists() or run.journal.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_stands_in_says_what_the_server_does(client: Client):
    """So that the quick tests of batches are about the real one."""
    real = client.object_info()
    for name, node in INFO.items():
        assert node["output_node"] == real[name]["output_node"]
        for group, inputs in node["input"].items():
            told = real[name]["input"][group]
            assert inputs.keys() == told.keys() and all(
                inputs[one][0] == told[one][0] for one in inputs if one != "image"
            )


def test_rows_that_are_equal_or_fail(tmp_path: Path, each_host: Server, capsys):
    rows = [
        {"prompt": "a red circle", "seed": 3},
        {"prompt": "a red circle", "seed": 3},
        {"prompt": "a red circle", "seed": 3, "9.filename_prefix": "../outside"},
        {"prompt": "a blue star", "images": 2},
    ]
    run = run_of(tmp_path, rows, each_host.url)
    options = ("--steps", "2", "--width", "64", "--height", "48", "--name", "{row}.png")
    assert run(*options) == 1
    told = capsys.readouterr()
    assert "row 3, image 1 failed: Save Image: " in told.err and "outside the output folder" in told.err
    assert told.out.startswith("4 of 5 images done (3 of 4 rows), 1 failed")
    assert {*run.images()} == {"1.png", "2.png", "4_1.png", "4_2.png"}
    assert pixels(run.out / "1.png") == pixels(run.out / "2.png")
    image = Image.open(run.out / "4_2.png")
    image.load()
    assert image.size == (64, 48) and json.loads(image.info["prompt"])["7"]["inputs"]["seed"] == 4
    assert image.info["parameters"].startswith("a blue star\nSteps: 2, CFG scale: 3, Seed: 4, Size: 64x48, Model: ")
    # a prompt that the server knows, whose image it has lost: the input that makes it new is no node's
    (run.out / "1.png").unlink()
    for path in (each_host.base / "output").glob("Z-Image-Nano_*.png"):
        path.unlink()
    run.write(rows[:2])
    before = pixels(run.out / "2.png")
    assert run(*options) == 0 and pixels(run.out / "1.png") == before


def test_what_the_server_refuses_is_told_plainly(tmp_path: Path, host: Server, capsys):
    nodes = json.loads(NANO.read_text())
    del nodes["8"]["inputs"]["vae"]
    workflow = tmp_path / "broken.json"
    workflow.write_text(json.dumps(nodes))
    run = run_of(tmp_path, ["a red circle"], host.url, workflow=workflow)
    assert run() == 1
    told = capsys.readouterr().err
    assert f"{host.url} refuses it: Z-Image VAE Decode: Required input is missing: vae" in told


def test_files_and_nodes_that_the_server_lacks(tmp_path: Path, host: Server, client: Client, capsys):
    nodes = json.loads(NANO.read_text())
    nodes["1"]["inputs"]["model"] = "mine.safetensors"
    nodes["8"]["class_type"] = "NobodysDecode"
    workflow = tmp_path / "lacking.json"
    workflow.write_text(json.dumps(nodes))
    run = run_of(tmp_path, ["a red circle"], host.url, workflow=workflow)
    assert run() == 2
    told = capsys.readouterr().err
    assert f"{host.url}: Load Z-Image Transformer.model is 'mine.safetensors', which it doesn't offer" in told
    assert f"{host.url}: it doesn't know NobodysDecode (node 8" in told and not run.out.exists()
    assert client.get("/queue") == {"queue_running": [], "queue_pending": []}


def test_an_image_of_a_row_is_sent_to_the_server(tmp_path: Path, each_host: Server):
    """To a workflow that loads it, inverts it and saves it."""
    nodes = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "somewhere.png"}, "_meta": {"title": "Load Image"}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "sent"}},
    }
    workflow = tmp_path / "inverting.json"
    workflow.write_text(json.dumps(nodes))
    images = [Image.effect_noise((40, 24), 60 + 20 * number).convert("RGB") for number in range(2)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    rows = [{"Load Image.image": f"{number}.png"} for number in range(2)]
    run = run_of(tmp_path, rows, each_host.url, workflow=workflow)
    assert run() == 0
    for name, image in zip(sorted(run.images()), images, strict=True):
        with Image.open(run.out / name) as made:
            differences = ImageChops.difference(made.convert("RGB"), ImageChops.invert(image))
        assert max(most for _, most in differences.getextrema()) <= 1  # the server cuts fractions off


def test_own_prompts_are_known_by_what_is_said_of_them(host: Server, client: Client):
    """What a killed run relies on: extra_data and the client in queue and history, deletion of one prompt only."""
    server = Batch(host.url)
    nodes = json.loads(NANO.read_text())
    nodes["7"]["inputs"]["steps"] = 40
    mark = {"row": 1, "image": 1, "key": "k"}
    ids = [f"00000000-0000-4000-8000-00000000000{number}" for number in range(3)]
    for number, prompt in enumerate(ids):
        nodes["7"]["inputs"]["seed"] = 1000 + number
        assert server.submit(nodes, prompt, {"client_id": "me", "zimage_batch": mark}) == prompt
    queued = server.queue()
    assert {item.id for item in queued} == {*ids}
    assert all(item.extra["client_id"] == "me" and item.extra["zimage_batch"] == mark for item in queued)
    server.delete([ids[2]])
    assert {item.id for item in server.queue()} == {*ids[:2]}
    for prompt in ids[:2]:
        client.wait(prompt)
    ended = server.ended(ids[0])
    assert ended.extra["zimage_batch"] == mark and ended.seconds > 0 and ended.error is None
    assert ids[1] in {one.id for one in server.recent()} and server.ended(ids[2]) is None


def test_the_examples_of_the_page(tmp_path: Path, host: Server, monkeypatch):
    page = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workflows").symlink_to(ROOT / "workflows")
    (tmp_path / "prompts.jsonl").write_text(page.split("```jsonl\n")[1].split("```")[0])
    (tmp_path / "pairs.csv").write_text(page.split("```csv\n")[1].split("```")[0])
    commands = [line for line in page.splitlines() if line.startswith("python -m") and "--comfyui" in line]
    assert len(commands) == 2
    for command in commands:
        command = command.replace(" --comfyui http://127.0.0.1:8189", "").replace("http://127.0.0.1:8188", host.url)
        assert main([*shlex.split(command)[3:], "--quiet"]) == 0
    assert len([*(tmp_path / "images").glob("*.png")]) == 5
    pairs = sorted(path.name for path in (tmp_path / "pairs").glob("*.png"))
    assert pairs == ["000001_0.png", "000001_0_2.png", "000002_1.png", "000002_1_2.png"]
    graph = json.loads(Image.open(tmp_path / "pairs" / "000002_1_2.png").text["prompt"])
    texts = [node["inputs"]["text"] for node in graph.values() if node["class_type"] == "ZImageTextEncode"]
    assert texts == ["a green star", "a yellow star"]


def test_a_server_that_is_killed_loses_nothing(tmp_path: Path, host: Server, second: Server, capsys):
    """60 rows over two servers, one of which is killed in the middle and stays away."""
    rows = [{"prompt": text, "seed": 100 + number} for number, text in enumerate(WORDS)]
    assert len(rows) == 60
    run = run_of(tmp_path, rows, host.url, second.url)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run("--name", "{row}.png")))
    thread.start()
    wait_for(run, 20)
    kill(second)
    thread.join(400)
    assert codes == [0]
    told = capsys.readouterr()
    assert told.err.count(f"{second.url} doesn't answer (") == 1 and told.out.startswith("60 of 60 images done")
    assert second.log_text().count("got prompt") >= 5  # it has had its share
    lines = run.lines()
    assert sorted(line["row"] for line in lines) == [*range(1, 61)] and {*run.images()} == {
        f"{row}.png" for row in range(1, 61)
    }
    right = 0
    for line in lines:
        text = WORDS[line["row"] - 1]
        image = Image.open(run.out / line["file"])
        image.load()
        graph = json.loads(image.info["prompt"])
        assert image.size == (128, 128) and graph["4"]["inputs"]["text"] == text
        assert graph["7"]["inputs"]["seed"] == line["seed"] == 99 + line["row"]
        assert image.info["parameters"].startswith(f"{text}\n") and image.info["parameters"].endswith(line["key"])
        _, color, shape, _, _, ground, _ = text.split()
        background, seen = judge.read(read(run.out / line["file"])[0])
        right += (background, [(one.color, one.shape) for one in seen]) == (ground, [(color, shape)])
    assert {"white", "black", "gray"} <= {*scenes.COLORS} and right >= 50
    assert run("--name", "{row}.png") == 0 and len(run.lines()) == 60  # nothing is left to do
    single = run_of(tmp_path, rows[17:26], host.url, name="single")
    assert single("--name", "{row}.png") == 0
    for number in range(9):
        assert pixels(single.out / f"{number + 1}.png") == pixels(run.out / f"{number + 18}.png")


def test_a_run_waits_for_its_server_and_finishes(tmp_path: Path, second: Server, capsys):
    rows = [{"prompt": text, "width": 64, "height": 64} for text in WORDS[:24]]
    run = run_of(tmp_path, rows, second.url)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run("--comfyui-patience", "300")))
    thread.start()
    wait_for(run, 5)
    kill(second)
    made = len(run.lines())
    assert made < 24
    time.sleep(2)
    second.start()
    thread.join(300)
    assert codes == [0]
    told = capsys.readouterr().err
    assert told.count("doesn't answer (") == 1 and told.count(f"{second.url} is back") == 1
    assert sorted(line["row"] for line in run.lines()) == [*range(1, 25)] and len(run.images()) == 24
