"""Images that rows name, sent to servers that stand in for ComfyUI."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from . import with_servers
from .making import Run
from .stand_in import StandIn
from .with_servers import WORKFLOW, held, run_of

hasty, one, two = with_servers.hasty, with_servers.one, with_servers.two
COLUMN = "Load Image.image"


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    nodes = json.loads(WORKFLOW.read_text())
    loads = {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "Load Image"}}
    path = tmp_path / "workflow_api.json"
    path.write_text(json.dumps({**nodes, "20": loads}))
    return path


@pytest.fixture
def shown(tmp_path: Path) -> list[str]:
    """Two images beside the file of rows, one of them in a folder."""
    (tmp_path / "in").mkdir()
    names = ["red.png", "in/blue.jpg"]
    for name in names:
        Image.new("RGB", (8, 8), Path(name).stem).save(tmp_path / name)
    return names


def run_with(tmp_path: Path, workflow: Path, rows: list[dict], *servers: StandIn) -> Run:
    for server in servers:
        server.info["LoadImage"]["input"]["required"]["image"][0] = ["example.png"]
    return run_of(tmp_path, rows, *servers, options=("--workflow", str(workflow)))


def test_each_server_gets_an_image_once_before_it_is_used(tmp_path, workflow, shown, two):
    rows = [{"prompt": f"a {number}", COLUMN: shown[number % 2]} for number in range(12)]
    rows.append({"prompt": "of the server's own", COLUMN: "example.png"})
    run = run_with(tmp_path, workflow, rows, *two)
    assert run() == 0 and len(run.images()) == 13
    for server in two:
        places = dict(server.uploaded)
        assert len(places) == len(server.uploaded) <= 2
        assert {*places.values()} <= {(tmp_path / name).read_bytes() for name in shown}
        for nodes in server.ran:
            place = nodes["20"]["inputs"]["image"]
            number = nodes["4"]["inputs"]["text"].split()[-1]
            own = (tmp_path / shown[int(number) % 2]).read_bytes() if number.isdigit() else None
            assert place == "example.png" if own is None else places[place] == own


def test_the_key_is_that_of_the_content(tmp_path, workflow, shown, one):
    run = run_with(tmp_path, workflow, [{"prompt": "a", COLUMN: shown[0]}], one)
    assert run() == 0 and run() == 0 and len(one.ran) == 1
    (tmp_path / shown[0]).rename(tmp_path / "moved.png")
    run.write([{"prompt": "a", COLUMN: "moved.png"}])
    assert run() == 0 and len(one.ran) == 1
    Image.new("RGB", (8, 8), "green").save(tmp_path / "moved.png")
    assert run("--redo-changed") == 0 and len(one.ran) == 2 and len(one.uploaded) == 2


def test_an_odd_name_stays_here(tmp_path, workflow, one):
    Image.new("RGB", (8, 8)).save(tmp_path / 'a "b".p\n"g', "PNG")
    run = run_with(tmp_path, workflow, [{"prompt": "a", COLUMN: 'a "b".p\n"g'}], one)
    assert run() == 0
    ((place, content),) = one.uploaded
    assert (
        place.isascii()
        and place.replace("/", "_").isidentifier()
        and content == (tmp_path / 'a "b".p\n"g').read_bytes()
    )


def test_a_server_that_was_away_gets_it_again(tmp_path, workflow, shown, one):
    run = run_with(tmp_path, workflow, [{"prompt": f"a {number}", COLUMN: shown[0]} for number in range(4)], one)
    thread = held(run, one)
    one.stop()
    one.forget()
    time.sleep(0.3)  # for the run to notice
    one.held = False
    one.start()
    thread.join(30)
    assert not thread.is_alive() and len(run.images()) == 4
    assert len(one.uploaded) == 2 and len({place for place, _ in one.uploaded}) == 1


def test_what_can_not_be_sent_is_told_of_its_row(tmp_path, workflow, shown, one, capsys):
    one.largest = (tmp_path / shown[0]).stat().st_size
    Image.effect_noise((90, 90), 50).save(tmp_path / "large.png")
    run = run_with(tmp_path, workflow, [{"prompt": "a", COLUMN: shown[0]}, {"prompt": "b", COLUMN: "large.png"}], one)
    assert run() == 1 and len(run.images()) == 1
    (failed,) = (line for line in run.lines() if line["status"] == "failed")
    assert failed["row"] == 2 and failed["error"].endswith("refuses it: the server answers HTTP 413")


def test_a_server_that_takes_no_images_loses_no_rows(tmp_path, workflow, shown, two):
    two[0].seconds, two[1].status = 0.3, 500
    run = run_with(tmp_path, workflow, [{"prompt": f"a {number}", COLUMN: shown[0]} for number in range(8)], *two)
    assert run() == 0 and len(two[0].ran) == 8 and not two[1].posted


def test_an_image_that_changes_meanwhile(tmp_path, workflow, shown, one):
    run = run_with(tmp_path, workflow, [{"prompt": f"a {number}", COLUMN: shown[0]} for number in range(4)], one)

    def change(path: str) -> None:
        if path == "/queue" and not one.posted:  # it has been checked, and nothing is sent yet
            Image.new("RGB", (8, 8), "green").save(tmp_path / shown[0])

    one.before = change
    assert run() == 1 and not run.images() and not one.uploaded
    assert all("red.png has changed since the run began; run the same command again" in x["error"] for x in run.lines())


def test_files_that_are_no_images_or_nowhere(tmp_path, workflow, shown, one, capsys):
    (tmp_path / "notes.png").write_text("no image")
    run = run_with(tmp_path, workflow, [{"prompt": "a", COLUMN: "notes.png"}], one)
    assert run() == 2
    told = capsys.readouterr().err
    assert "row 1" in told and COLUMN in told and "notes.png is no image that can be read" in told
    run.write([{"prompt": "a", COLUMN: "nowhere.png"}])
    assert run() == 2 and not one.posted
    assert f"{COLUMN} is 'nowhere.png', which it doesn't offer; it offers example.png" in capsys.readouterr().err
