"""Every shipped workflow fits the running host, as a graph and as an API prompt; those of the nano model are run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import workflow
from host import Client, PromptRejected, Server
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
NAMES = [path.stem for path in GRAPHS]
FRONTEND_ONLY = {"MarkdownNote"}  # nodes that the frontend knows and the server doesn't


def test_each_graph_has_its_api_prompt_and_thumbnail():
    assert NAMES == ["zimage_base_txt2img", "zimage_nano_img2img", "zimage_nano_txt2img", "zimage_turbo_txt2img"]
    for path in GRAPHS:
        assert (ROOT / "workflows" / "api" / f"{path.stem}_api.json").is_file()
        with Image.open(path.with_suffix(".jpg")) as thumbnail:
            assert thumbnail.width >= 256


@pytest.mark.parametrize("path", GRAPHS, ids=NAMES)
def test_graph_says_what_the_api_prompt_says(path: Path, each_client: Client):
    """Widget values are stored by position; read with this host's schema they must give the API prompt."""
    info = each_client.object_info()
    assert _as_prompt(json.loads(path.read_text()), info) == {
        node: {"class_type": content["class_type"], "inputs": content["inputs"]}
        for node, content in workflow.load(path.stem).items()
    }


@pytest.mark.parametrize("name", [name for name in NAMES if "nano" in name])
def test_nano_workflow_runs(name: str, each_client: Client):
    prompt = workflow.load(name)
    pictures = each_client.pictures(each_client.run(prompt))
    assert len(pictures) == len(workflow.nodes(prompt, "SaveImage"))
    for picture in pictures:
        assert Image.open(io.BytesIO(picture)).size == (128, 128)


@pytest.mark.parametrize("name", [name for name in NAMES if "nano" not in name])
def test_workflow_of_a_model_to_be_installed(name: str, each_host: Server, each_client: Client):
    """Without the snapshot the host names the missing model; with its folder there the prompt is accepted."""
    prompt = workflow.load(name)
    model = prompt[workflow.only(prompt, "ZImageTransformerLoader")]["inputs"]["model"]
    folder = each_host.base / "models" / "zimage" / model
    with pytest.raises(PromptRejected, match=model):
        each_client.queue(prompt)
    (folder / "transformer").mkdir(parents=True)
    try:
        prompt_id = each_client.queue(prompt)
        each_client.wait(prompt_id)  # accepted; it fails at the loader, as the folder is empty
    finally:
        (folder / "transformer").rmdir()
        folder.rmdir()


def test_the_template_browser_lists_the_graphs_and_not_the_api_prompts(each_client: Client, each_host: Server):
    (pack,) = (path.name for path in (each_host.base / "custom_nodes").iterdir() if path.is_symlink())
    assert sorted(each_client.get("/api/workflow_templates")[pack]) == NAMES


def _as_prompt(graph: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """What the frontend would send for this graph."""
    wires = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in FRONTEND_ONLY:
            continue
        schema = info[node["type"]]["input"]
        specs = {**schema["required"], **schema.get("optional", {})}
        inputs = {slot["name"]: wires[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
        values = list(node.get("widgets_values", []))
        for name, spec in specs.items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if not (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")):
                continue
            inputs[name] = values.pop(0)
            if options.get("control_after_generate"):
                values.pop(0)
        assert not values, f"node {node['id']} ({node['type']}) has widget values too many: {values}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
