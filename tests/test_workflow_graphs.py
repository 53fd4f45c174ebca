"""The shipped graphs as saved: nothing covers anything in either renderer, and each says where its files are."""

from __future__ import annotations

import itertools
import json
import re
import uuid
from typing import Any

import browser
import cards
import layouts
import pytest
import workflow_page
from PIL import Image

from .helpers import ROOT

GRAPHS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "workflows").glob("*.json")}
PROMPTS = {path.stem.removesuffix("_api") for path in (ROOT / "workflows" / "api").glob("*.json")}
SLOT = 20  # pixels from one wire's end on a node to the next


def drawn(graph: dict[str, Any]) -> dict[str, list[float]]:
    """Node -> [left, top, width, height], title included, in the renderer that draws it higher."""
    return {
        f"{node['type']} {node['id']}": [
            node["pos"][0],
            node["pos"][1] - layouts.TITLE,
            node["size"][0],
            max(node["size"][1], layouts.HEIGHTS[node["type"]]) + layouts.TITLE,
        ]
        for node in graph["nodes"]
    }


def wires(graph: dict[str, Any]) -> list[list[tuple[float, float]]]:
    """The points that each wire passes: the output's, the reroutes', the input's."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    reroutes = {reroute["id"]: reroute for reroute in graph["extra"].get("reroutes", [])}
    last = {link["id"]: link["parentId"] for link in graph["extra"].get("linkExtensions", [])}
    found = []
    for link, source, output, target, slot, _ in graph["links"]:
        way, reroute = [], last.get(link)
        while reroute is not None:
            way.insert(0, tuple(reroutes[reroute]["pos"]))
            reroute = reroutes[reroute].get("parentId")
        (left, top), (width, _) = nodes[source]["pos"], nodes[source]["size"]
        x, y = nodes[target]["pos"]
        found.append([(left + width, top + SLOT * (output + 0.7)), *way, (x, y + SLOT * (slot + 0.7))])
    return found


def covered(way: list[tuple[float, float]], box: list[float]) -> bool:
    """Whether the wire, drawn straight from point to point, has a part inside of a node."""
    left, top, width, height = box
    for (x, y), (to_x, to_y) in itertools.pairwise(way):
        for step in range(1, 100):
            at_x, at_y = x + (to_x - x) * step / 100, y + (to_y - y) * step / 100
            if left + 5 < at_x < left + width - 5 and top + 5 < at_y < top + height - 5:
                return True
    return False


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_covers_anything(name: str):
    graph = GRAPHS[name]
    boxes = drawn(graph)
    assert browser.overlaps(boxes) == []
    assert [(way, node) for way in wires(graph) for node, box in boxes.items() if covered(way, box)] == []
    left, right = min(box[0] for box in boxes.values()), max(box[0] + box[2] for box in boxes.values())
    assert right - left <= 1500
    for node in graph["nodes"]:
        if node["type"] in ("ZImageTransformerLoader", "ZImageTextEncoderLoader", "ZImageVAELoader"):
            assert node["size"][0] >= 380  # room for the name of a file
        if node["type"] == "SaveImage":
            assert min(node["size"]) >= 250


@pytest.mark.parametrize("name", GRAPHS)
def test_looks(name: str):
    graph = GRAPHS[name]
    assert 0.6 <= graph["extra"]["ds"]["scale"] <= 1  # below 0.58, LiteGraph draws no text
    assert len(graph["groups"]) >= 4 and all(group["title"] for group in graph["groups"])
    (note,) = (node for node in graph["nodes"] if node["type"] == "MarkdownNote")
    assert note.get("title") and "`" not in note["widgets_values"][0]
    for node in graph["nodes"]:
        if "egative" in node.get("title", ""):
            assert node["bgcolor"] == layouts.NEGATIVE["bgcolor"]
        if node["type"] == "ZImageSampler":
            assert "randomize" in node["widgets_values"]


def test_names():
    """Cards show the names of files, which Windows has to know, too; sorted by name, hello is first."""
    assert set(GRAPHS) == set(cards.TITLES.values()) and set(cards.TITLES) == PROMPTS
    assert sorted(GRAPHS, key=str.casefold)[0] == "Hello world (Z-Image Nano)"
    for name in GRAPHS:
        assert re.fullmatch(r"[\w() -]+", name, re.ASCII)
        with Image.open(ROOT / "workflows" / f"{name}.jpg") as card:
            assert card.width == card.height


def test_ids_are_distinct():
    """ComfyUI groups what it ran by the workflow's id."""
    ids = {uuid.UUID(graph["id"]) for graph in GRAPHS.values()}
    assert len(ids) == len(GRAPHS) == len(PROMPTS) and uuid.UUID(int=0) not in ids


@pytest.mark.parametrize("name", GRAPHS)
def test_files_can_be_fetched_from_the_dialog_and_the_note(name: str):
    """The frontend offers a download where the name is the widget's value."""
    graph = GRAPHS[name]
    (note,) = (node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")
    offered = 0
    for node in graph["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["name"] == node["widgets_values"][0] and model["url"].endswith("/" + model["name"])
            assert model["directory"] in ("diffusion_models", "text_encoders", "vae", "loras", "model_patches")
            assert f"[{model['name']}]({model['url']})" in note
            offered += 1
    if "nano" not in name.lower() and any("z_image" in str(node["widgets_values"]) for node in graph["nodes"]):
        assert offered >= (1 if "gguf" in name.lower() else 3)


def test_the_page_of_workflows_is_up_to_date():
    """Else: .venv/bin/python .ci/workflow_page.py, with the folder of screenshots where a graph has changed."""
    assert workflow_page.PAGE.read_text(encoding="utf-8") == workflow_page.text()
    shots = {path.stem for path in workflow_page.SCREENSHOTS.iterdir()}
    assert shots == {workflow_page.slug(path.stem) for path in (ROOT / "workflows").glob("*.json")}
