"""Draws workflows/*.json, their cards, subgraphs/*.json and the README's graph, in the real frontend.

    .venv/bin/python .ci/draw_workflows.py

workflows/api/*_api.json are the source; run this after changing one. Each node is created, wired and serialized by the
frontend itself, so the result is what a person who drags the same wires would save; what it exports of the result must
equal the API prompt.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blueprints
import browser
import cards
import layouts
import provision
import workflow
from host import Client, Server
from PIL import Image, ImageOps

HELLO = "zimage_nano_txt2img"
SCREENSHOT = provision.ROOT / "docs" / "images" / "graph.jpg"
FOLDERS = {
    "ZImageTransformerLoader": "diffusion_models",
    "ZImageTextEncoderLoader": "text_encoders",
    "ZImageVAELoader": "vae",
    "ZImageLoraLoader": "loras",
    "ZImageControlNet": "model_patches",
}
BUILD = """
const [prompt, layout] = argument;
graph.clear();
const nodes = {};
for (const [id, content] of Object.entries(prompt)) {
  const node = LiteGraph.createNode(content.class_type);
  node.id = Number(id);
  node.title = content._meta.title;
  graph.add(node);
  nodes[id] = node;
  for (const widget of node.widgets ?? []) {
    const value = content.inputs[widget.name];
    if (widget.name === "control_after_generate") widget.value = "randomize";
    else if (value !== undefined && !Array.isArray(value)) widget.value = value;
    if (widget.name === "text")  // App mode shows two of them without the titles of their nodes
      node.inputs.find((input) => input.name === "text").label = widget.label = node.title.toLowerCase();
  }
}
const note = nodes.note = LiteGraph.createNode("MarkdownNote");
graph.add(note);
note.title = layout.note.title;
note.widgets[0].value = layout.note.text;
for (const [id, { pos, size, models, color, bgcolor }] of Object.entries(layout.nodes)) {
  nodes[id].setSize(size);
  nodes[id].pos = pos;
  if (models) nodes[id].properties.models = models;
  if (color) Object.assign(nodes[id], { color, bgcolor });
}
for (const [id, content] of Object.entries(prompt))
  for (const [name, value] of Object.entries(content.inputs))
    if (Array.isArray(value)) nodes[value[0]].connect(value[1], nodes[id], name);
for (const [, target, name, points] of layout.ways) {
  const link = graph.getLink(nodes[target].inputs.find((input) => input.name === name).link);
  let before = link;  // a new reroute comes before what it is given
  for (const point of [...points].reverse()) before = graph.createReroute(point, before);
}
for (const [title, bounds] of layout.groups) {
  const group = new LiteGraph.LGraphGroup(title);
  group.pos = bounds.slice(0, 2);
  group.size = bounds.slice(2);
  graph.add(group);
}
graph.last_node_id = Math.max(...graph.nodes.map((node) => node.id));
const saved = JSON.parse(JSON.stringify(graph.serialize()));  // without what is undefined
saved.id = layout.id;
saved.extra.ds = layout.view;
saved.extra.linearData = layout.app;
return saved;
"""
FIT = """
await app.loadGraphData(argument);
const nodes = app.graph.nodes;
const left = Math.min(...nodes.map((n) => n.pos[0])) - 30, top = Math.min(...nodes.map((n) => n.pos[1])) - 84;
const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0])) + 30;
const bottom = Math.max(...nodes.map((n) => n.pos[1] + n.size[1])) + 30;
const scale = Math.min(1300 / (right - left), 800 / (bottom - top));
const view = app.canvas.ds;
view.scale = scale;
view.offset = [-left + 60 / scale, -top + 120 / scale];  // below the frontend's own bars
app.canvas.setDirty(true, true);
await new Promise((done) => setTimeout(done, 1500));
return [60, 120, (right - left) * scale, (bottom - top) * scale];
"""


def main() -> None:
    prompts = {
        path.name.removesuffix("_api.json"): json.loads(path.read_text()) for path in sorted(workflow.API.glob("*"))
    }
    with Server(provision.newest(), packs={"comfyui-zimage": provision.ROOT}) as server:
        for prompt in prompts.values():
            for node in prompt.values():  # so that every combo knows every name
                name = cards.file(node)
                if isinstance(name, str) and Path(name).suffix in (".safetensors", ".gguf"):
                    file = server.base / "models" / FOLDERS[node["class_type"]] / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.touch()
        settings = {"Comfy.VueNodes.Enabled": False}
        with browser.start() as chromium, browser.open_page(chromium, server, settings, (1420, 1000)) as page:
            for name, prompt in prompts.items():
                graph = browser.run(page, BUILD, [prompt, layouts.layout(name, prompt)])
                x, y, width, height = browser.run(page, FIT, graph)
                _compare(name, prompt, browser.run(page, "return (await app.graphToPrompt()).output"))
                target = provision.ROOT / "workflows" / f"{cards.TITLES[name]}.json"
                _write(target, graph)
                if name == HELLO:
                    box = {"x": x, "y": y, "width": width, "height": height}
                    _save(page.screenshot(clip=box), SCREENSHOT, (1200, 1200))
                with server.connect() as client:
                    _save(_image(client, name, prompt), target.with_suffix(".jpg"), (512, 512), ImageOps.pad)
                print(f"{name}: {len(graph['nodes'])} nodes, {len(graph['links'])} wires")
            for name, (source, *_) in blueprints.BLUEPRINTS.items():
                prompt = blueprints.prompt(name)
                inner = browser.run(page, BUILD, [prompt, layouts.layout(source, prompt)])
                blueprint = blueprints.blueprint(name, inner)
                browser.open_graph(page, blueprint)
                exported = browser.run(page, "return (await app.graphToPrompt()).output")
                _compare(name, prompt, _without_the_outer_node(exported))
                _write(provision.ROOT / "subgraphs" / f"{name}.json", blueprint)
                print(f"{name}: {len(blueprint['nodes'][0]['inputs'])} inputs")


def _compare(name: str, prompt: dict[str, Any], exported: dict[str, Any]) -> None:
    for node, content in prompt.items():
        if exported[node]["class_type"] != content["class_type"] or exported[node]["inputs"] != content["inputs"]:
            raise SystemExit(f"{name}: node {node} comes back as\n{exported[node]}\ninstead of\n{content}")
    if exported.keys() != prompt.keys():
        raise SystemExit(f"{name}: nodes {sorted(exported)} come back instead of {sorted(prompt)}")


def _without_the_outer_node(exported: dict[str, Any]) -> dict[str, Any]:
    """Nodes of a subgraph by their own ids: the page exports them as "outer:inner"."""
    found = {node.split(":")[-1]: content for node, content in exported.items()}
    for content in found.values():
        for name, value in content["inputs"].items():
            if isinstance(value, list):
                content["inputs"][name] = [value[0].split(":")[-1], value[1]]
    return found


def _write(path: Path, graph: dict[str, Any]) -> None:
    path.write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _image(client: Client, name: str, prompt: dict[str, Any]) -> bytes:
    """The last image that a workflow of the nano model saves; for others, one that the nano model draws."""
    if name in cards.CARDS:
        prompt = workflow.load(HELLO)
        workflow.set_text(prompt, cards.CARDS[name])
    last = max(workflow.nodes(prompt, "SaveImage"), key=int)
    (image,) = client.images(client.run(prompt), last)
    return image


def _save(image: bytes, path: Path, size: tuple[int, int], fit: Callable[..., Image.Image] = ImageOps.contain) -> None:
    """As JPEG: a small image enlarged, a large one made smaller, both in proportion."""
    with Image.open(io.BytesIO(image)) as opened:
        fit(opened.convert("RGB"), size).save(path, quality=85, optimize=True)


if __name__ == "__main__":
    main()
