"""The subgraph blueprints as saved: whole, of nodes that there are, and with the files' addresses."""

from __future__ import annotations

import json
import uuid
from typing import Any

import browser
import pytest

from .helpers import ROOT
from .test_workflow_graphs import covered, drawn

BLUEPRINTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "subgraphs").glob("*.json")}
OURS = {path.name for path in (ROOT / "web" / "docs").iterdir()}
LOADERS = {"ZImageTransformerLoader", "ZImageTextEncoderLoader", "ZImageVAELoader", "ZImageLoraLoader"}


def parts(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one node of a blueprint and the one subgraph that it shows."""
    graph = BLUEPRINTS[name]
    (node,), (subgraph,) = graph["nodes"], graph["definitions"]["subgraphs"]
    return node, subgraph


def test_what_there_is():
    assert set(BLUEPRINTS) == {
        "Text to Image (Z-Image Turbo, ComfyUI-ZImage)",
        "Text to Image (Z-Image Base, ComfyUI-ZImage)",
        "Text to Image with LoRA (Z-Image Turbo, ComfyUI-ZImage)",
        "Image to Image (Z-Image Turbo, ComfyUI-ZImage)",
    }
    ids = [uuid.UUID(parts(name)[1]["id"]) for name in BLUEPRINTS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_it_is_whole(name: str):
    node, subgraph = parts(name)
    assert node["type"] == subgraph["id"] and node["title"] == subgraph["name"] == name
    assert subgraph["category"].startswith("Image generation and editing/") and subgraph["description"]
    inner = {one["id"]: one for one in subgraph["nodes"]}
    assert len(inner) == len(subgraph["nodes"]) and node["id"] not in inner
    assert {one["type"] for one in inner.values()} <= OURS | {"EmptySD3LatentImage"}
    links = {link["id"]: link for link in subgraph["links"]}
    assert len(links) == len(subgraph["links"])
    reroutes = {None, *(reroute["id"] for reroute in subgraph["reroutes"])}
    start, end = subgraph["inputNode"]["id"], subgraph["outputNode"]["id"]
    for link in links.values():
        assert link.get("parentId") in reroutes
        ends = [
            subgraph["inputs"][link["origin_slot"]]["linkIds"]
            if link["origin_id"] == start
            else inner[link["origin_id"]]["outputs"][link["origin_slot"]]["links"],
            subgraph["outputs"][link["target_slot"]]["linkIds"]
            if link["target_id"] == end
            else [inner[link["target_id"]]["inputs"][link["target_slot"]]["link"]],
        ]
        assert all(link["id"] in one for one in ends), link
    wired = {link for one in inner.values() for end in one["inputs"] if (link := end["link"]) is not None}
    wired |= {link for one in inner.values() for end in one["outputs"] for link in end["links"] or []}
    assert wired <= set(links)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_it_shows_what_one_changes(name: str):
    node, subgraph = parts(name)
    shown = {"prompt", "seed", "steps", "transformer", "text_encoder", "vae"}
    shown |= {"image", "denoise"} if "Image to Image" in name else {"width", "height"}
    shown |= {"lora", "strength", "strength_clip"} if "LoRA" in name else set()
    shown |= {"negative_prompt", "guidance_scale"} if "Base" in name else set()
    assert {end["name"] for end in node["inputs"]} == {end["name"] for end in subgraph["inputs"]} == shown
    assert node["outputs"][0]["type"] == subgraph["outputs"][0]["type"] == "IMAGE"
    inner = {one["id"]: one for one in subgraph["nodes"]}
    links = {link["id"]: link for link in subgraph["links"]}
    targets = []
    for end in subgraph["inputs"]:
        (link,) = (links[link] for link in end["linkIds"])
        target = inner[link["target_id"]]["inputs"][link["target_slot"]]
        if "widget" in target:
            targets.append([str(link["target_id"]), target["widget"]["name"]])
    assert [one for one in node["properties"]["proxyWidgets"] if one[1] != "control_after_generate"] == targets


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_its_files_can_be_fetched(name: str):
    _, subgraph = parts(name)
    for node in subgraph["nodes"]:
        if node["type"] in LOADERS:
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0] and model["url"].endswith("/" + model["name"])
            assert model["directory"] in ("diffusion_models", "text_encoders", "vae", "loras")


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_nothing_covers_anything(name: str):
    _, subgraph = parts(name)
    boxes = drawn(subgraph)
    assert browser.overlaps(boxes) == []
    for reroute in subgraph["reroutes"]:
        x, y = reroute["pos"]
        assert not [box for box in boxes.values() if covered([(x, y), (x, y)], box)]
