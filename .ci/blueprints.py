"""Subgraph blueprints, subgraphs/*.json: a workflow without notes and outputs, as one node that shows what one changes.

ComfyUI lists them among its own. draw_workflows.py draws the inner graph and calls `blueprint`.
"""

from __future__ import annotations

import copy
import uuid
from typing import Any

import layouts
import workflow

TEXT_TO_IMAGE = "Image generation and editing/Text to image"
IMAGE_TO_IMAGE = "Image generation and editing/Edit image"
# name -> (API prompt that it is made of, category, description)
BLUEPRINTS = {
    "Text to Image (Z-Image Turbo, ComfyUI-ZImage)": (
        "zimage_turbo_single_files",
        TEXT_TO_IMAGE,
        "Makes an image from a prompt with Z-Image Turbo in 8 steps.",
    ),
    "Text to Image (Z-Image Base, ComfyUI-ZImage)": (
        "zimage_base_single_files",
        TEXT_TO_IMAGE,
        "Makes an image from a prompt and a negative prompt with Z-Image.",
    ),
    "Text to Image with LoRA (Z-Image Turbo, ComfyUI-ZImage)": (
        "zimage_turbo_lora",
        TEXT_TO_IMAGE,
        "Makes an image from a prompt with Z-Image Turbo and a LoRA, and tells what of the LoRA was matched.",
    ),
    "Image to Image (Z-Image Turbo, ComfyUI-ZImage)": (
        "zimage_turbo_single_files",
        IMAGE_TO_IMAGE,
        "Changes an image by a prompt with Z-Image Turbo; denoise says how much.",
    ),
}
# node type -> its widgets that the blueprint shows, each with its name there
SHOWN = {
    "ZImageTextEncode": {"text": "prompt"},
    "EmptySD3LatentImage": {"width": "width", "height": "height"},
    "ZImageVAEEncode": {"pixels": "image"},
    "ZImageSampler": {"seed": "seed", "steps": "steps"},
    "ZImageLoraLoader": {"lora": "lora", "strength": "strength", "strength_clip": "strength_clip"},
    "ZImageTransformerLoader": {"model": "transformer"},
    "ZImageTextEncoderLoader": {"model": "text_encoder"},
    "ZImageVAELoader": {"model": "vae"},
}
INPUT, OUTPUT = -10, -20  # ids of the subgraph's two ends
OUTER = 100  # id of the node that holds the subgraph, no id within it


def prompt(name: str) -> dict[str, Any]:
    """The API prompt within a blueprint: the ends are open."""
    found = workflow.load(BLUEPRINTS[name][0])
    for node in [*workflow.nodes(found, "SaveImage"), *workflow.nodes(found, "PreviewAny")]:
        del found[node]
    if BLUEPRINTS[name][1] == IMAGE_TO_IMAGE:
        size = workflow.only(found, "EmptySD3LatentImage")
        vae = workflow.only(found, "ZImageVAELoader")
        found[size] = {
            "inputs": {"vae": [vae, 0], "safe_retry": True},
            "class_type": "ZImageVAEEncode",
            "_meta": {"title": "Z-Image VAE Encode"},
        }
        workflow.set_sampler(found, denoise=0.6)
    return found


def blueprint(name: str, graph: dict[str, Any]) -> dict[str, Any]:
    """The blueprint made of a graph that the frontend drew of `prompt(name)`."""
    _, category, description = BLUEPRINTS[name]
    graph = copy.deepcopy(graph)
    nodes = {node["id"]: node for node in graph["nodes"] if node["type"] != "MarkdownNote"}
    last = {link["id"]: link["parentId"] for link in graph["extra"].get("linkExtensions", [])}
    ends = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(ends, link, strict=True)) for link in graph["links"]]
    for link in links:
        if link["id"] in last:
            link["parentId"] = last[link["id"]]

    def connect(origin: int, origin_slot: int, target: int, target_slot: int, kind: str) -> int:
        new = max(link["id"] for link in links) + 1
        links.append(dict(zip(ends, (new, origin, origin_slot, target, target_slot, kind), strict=True)))
        return new

    inputs: list[dict[str, Any]] = []
    proxies: list[list[str]] = []
    for node, slot, title in _shown(list(nodes.values())):
        end = nodes[node]["inputs"][slot]
        end["link"] = connect(INPUT, len(inputs), node, slot, end["type"])
        inputs.append({"name": title, "type": end["type"], "linkIds": [end["link"]]})
        if "widget" in end:
            inputs[-1]["widget"] = {"name": title}
            proxies.append([str(node), end["name"]])
    sampler = next(node["id"] for node in nodes.values() if node["type"] == "ZImageSampler")
    outputs: list[dict[str, Any]] = []
    for kind, slot in (("ZImageVAEDecode", 0), ("ZImageLoraLoader", 2)):
        for node in nodes.values():
            if node["type"] == kind:
                end = node["outputs"][slot]
                link = connect(node["id"], slot, OUTPUT, len(outputs), end["type"])
                end["links"] = [link]
                outputs.append({"name": end["name"], "type": end["type"], "linkIds": [link]})
    identity = uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-zimage/subgraphs/{name}")
    subgraph = {
        "id": str(identity),
        "version": 1,
        "state": {
            "lastGroupId": len(graph["groups"]),
            "lastNodeId": max(nodes),
            "lastLinkId": max(link["id"] for link in links),
            "lastRerouteId": max((reroute["id"] for reroute in graph["extra"].get("reroutes", [])), default=0),
        },
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": {"id": INPUT, "bounding": [-260, 0, 140, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUT, "bounding": [1560, 0, 120, 40 + 20 * len(outputs)]},
        "inputs": [_end(identity, "input", one) for one in inputs],
        "outputs": [_end(identity, "output", one) for one in outputs],
        "widgets": [],
        "nodes": list(nodes.values()),
        "groups": graph["groups"],
        "links": links,
        "reroutes": graph["extra"].get("reroutes", []),
        "extra": {"workflowRendererVersion": "LG"},
        "category": category,
        "description": description,
    }
    outer = {
        "id": OUTER,
        "type": str(identity),
        "pos": [130, 200],
        "size": [400, 470],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{key: one[key] for key in one if key != "linkIds"} | {"link": None} for one in inputs],
        "outputs": [{"name": one["name"], "type": one["type"], "links": []} for one in outputs],
        "properties": {"proxyWidgets": [*proxies, [str(sampler), "control_after_generate"]]},
        "widgets_values": [],
        "title": name,
    }
    return {
        "id": str(uuid.uuid5(identity, "workflow")),
        "revision": 0,
        "last_node_id": OUTER,
        "last_link_id": 0,
        "nodes": [outer],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {},
    }


def _shown(nodes: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    """(node, slot of its input, name in the blueprint) of all that is shown, in the order of SHOWN."""
    guided = any("negative" in node.get("title", "").lower() for node in nodes)
    found = []
    for kind, names in SHOWN.items():
        for node in nodes:
            if node["type"] != kind:
                continue
            shown = dict(names)
            if node.get("bgcolor") == layouts.NEGATIVE["bgcolor"]:
                shown = {"text": "negative_prompt"}
            if kind == "ZImageSampler" and guided:
                shown["guidance_scale"] = "guidance_scale"
            if kind == "ZImageSampler" and any(other["type"] == "ZImageVAEEncode" for other in nodes):
                shown["denoise"] = "denoise"
            slots = [end["name"] for end in node["inputs"]]
            found += [(node["id"], slots.index(name), title) for name, title in shown.items()]
    return found


def _end(identity: uuid.UUID, kind: str, end: dict[str, Any]) -> dict[str, Any]:
    """An input or output as the subgraph lists it."""
    listed = {key: end[key] for key in ("name", "type", "linkIds")}
    return {"id": str(uuid.uuid5(identity, f"{kind} {end['name']}")), **listed}
