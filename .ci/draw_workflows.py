"""Draws workflows/*.json and their thumbnails from workflows/api/*_api.json, in the real ComfyUI frontend.

    .venv/bin/python .ci/draw_workflows.py

The API prompts are the source; run this after changing one. Each node is created, wired and serialised by the frontend
itself, so the result is what a person who drags the same wires would save; it is queued back through the frontend's own
export and must equal the API prompt.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import browser
import provision
import workflow
from host import Server
from PIL import Image

NOTES = {
    "zimage_nano_txt2img": (
        "**Z-Image Nano** ships with the pack: press *Run*.\n\n"
        "It knows 12 colours, 8 shapes (circle, square, triangle, diamond, star, cross, ring, heart), positions, "
        "sizes, `two` or `three` of a thing, and coloured backgrounds."
    ),
    "zimage_nano_img2img": (
        "The second prompt changes the first image. **denoise** says how much: near 0.4 keeps the image, "
        "0.8 follows the new prompt, 1 forgets the image."
    ),
    "zimage_turbo_txt2img": (
        "Switch **download** on in the three loaders (33 GB), or put the snapshot of **Tongyi-MAI/Z-Image-Turbo** into "
        "`models/zimage/Tongyi-MAI--Z-Image-Turbo`.\n\n"
        "8 steps, guidance 0 (CFG 1 in a KSampler). Sizes divisible by 16, around 1024x1024."
    ),
    "zimage_base_txt2img": (
        "Switch **download** on in the three loaders (33 GB), or put the snapshot of **Tongyi-MAI/Z-Image** into "
        "`models/zimage/Tongyi-MAI--Z-Image`.\n\n"
        "28 to 50 steps, guidance 3 to 5 (CFG 4 to 6 in a KSampler), with a negative prompt."
    ),
    "zimage_nano_lora": (
        "A LoRA teaches **Z-Image Nano** the moon. Set strength to 0 to see what it does without.\n\n"
        "The report says what was matched; with several LoRA it also says how much they overlap."
    ),
    "zimage_turbo_single_files": (
        "The files of ComfyUI's own packaging: `z_image_turbo_bf16.safetensors` in `models/diffusion_models`, "
        "`qwen_3_4b.safetensors` in `models/text_encoders`, `ae.safetensors` in `models/vae`. fp8, nvfp4, int8 and "
        "all-in-one files go the same way."
    ),
    "zimage_turbo_gguf": (
        "GGUF files stay quantized in memory. The transformer goes into `models/diffusion_models`, the Qwen3-4B into "
        "`models/text_encoders`; the VAE is `ae.safetensors` in `models/vae`."
    ),
}
GAP = 60  # pixels between columns, and between nodes of one column
BUILD = """
const [prompt, note, gap] = argument;
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
    if (widget.name === "control_after_generate") widget.value = "fixed";
    else if (value !== undefined && !Array.isArray(value)) widget.value = value;
  }
}
for (const [id, content] of Object.entries(prompt))
  for (const [name, value] of Object.entries(content.inputs))
    if (Array.isArray(value)) nodes[value[0]].connect(value[1], nodes[id], name);
// columns by the longest way from a node without inputs; nodes from id 10 on are a second stage, in a row below
const ids = Object.keys(prompt);
const rows = [ids.filter((id) => Number(id) < 10), ids.filter((id) => Number(id) >= 10)];
let top = 80;
for (const row of rows) {
  const depth = {};
  const depthOf = (id) => depth[id] ??= 1 + Math.max(-1, ...Object.values(prompt[id].inputs)
    .filter((value) => Array.isArray(value) && row.includes(value[0])).map(([source]) => depthOf(source)));
  const columns = [];
  for (const id of row) (columns[depthOf(id)] ??= []).push(nodes[id]);
  let x = top === 80 ? 60 : 60 + 360;  // the second stage leaves room for the note
  let bottom = top;
  for (const column of columns) {
    let y = top;
    for (const node of column) {
      node.setSize([Math.max(node.size[0], 300), node.size[1]]);
      node.pos = [x, y];
      y += node.size[1] + gap;
    }
    bottom = Math.max(bottom, y);
    x += Math.max(...column.map((node) => node.size[0])) + gap;
  }
  if (top === 80) nodes.bottom = columns[0].at(-1);
  top = bottom;
}
const remark = LiteGraph.createNode("MarkdownNote");
graph.add(remark);
remark.widgets[0].value = note;
remark.setSize([320, 200]);
remark.pos = [60, nodes.bottom.pos[1] + nodes.bottom.size[1] + gap];
graph.last_node_id = Math.max(...graph.nodes.map((node) => node.id));
return JSON.parse(JSON.stringify(graph.serialize()));  // without what is undefined
"""
FIT = """
await app.loadGraphData(argument);
const nodes = app.graph.nodes;
const left = Math.min(...nodes.map((n) => n.pos[0])) - 30, top = Math.min(...nodes.map((n) => n.pos[1])) - 60;
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
                name = node["inputs"].get("model")
                if isinstance(name, str) and "/" in name:
                    file = server.base / "models" / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.touch()
        settings = {"Comfy.VueNodes.Enabled": False}
        with browser.start() as chromium, browser.open_page(chromium, server, settings, (1420, 1000)) as page:
            for name, prompt in prompts.items():
                graph = browser.run(page, BUILD, [prompt, NOTES[name], GAP])
                x, y, width, height = browser.run(page, FIT, graph)
                _compare(name, prompt, browser.run(page, "return (await app.graphToPrompt()).output"))
                target = provision.ROOT / "workflows" / f"{name}.json"
                target.write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                box = {"x": x, "y": y, "width": width, "height": height}
                _thumbnail(page.screenshot(clip=box), target.with_suffix(".jpg"))
                print(f"{name}: {len(graph['nodes'])} nodes, {len(graph['links'])} wires")


def _compare(name: str, prompt: dict[str, Any], exported: dict[str, Any]) -> None:
    for node, content in prompt.items():
        if exported[node]["class_type"] != content["class_type"] or exported[node]["inputs"] != content["inputs"]:
            raise SystemExit(f"{name}: node {node} comes back as\n{exported[node]}\ninstead of\n{content}")
    if exported.keys() != prompt.keys():
        raise SystemExit(f"{name}: nodes {sorted(exported)} come back instead of {sorted(prompt)}")


def _thumbnail(screenshot: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(screenshot)) as image:
        image = image.convert("RGB")
        image.thumbnail((768, 512))
        image.save(path, quality=85, optimize=True)


if __name__ == "__main__":
    main()
