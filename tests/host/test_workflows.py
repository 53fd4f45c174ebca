"""Every shipped workflow fits the running host, as a graph and as an API prompt; those of the nano model are run."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import cards
import provision
import pytest
import torch
import workflow
from host import Client, PromptRejected, Server
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

from nano import judge

from .. import gguf_writing
from ..helpers import NANO, ROOT

GRAPHS = {name: ROOT / "workflows" / f"{title}.json" for name, title in cards.TITLES.items()}
FRONTEND_ONLY = {"MarkdownNote"}  # nodes that the frontend knows and the server doesn't


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_says_what_the_api_prompt_says(name: str, each_client: Client):
    """Widget values are stored by position; read with this host's schema they must give the API prompt."""
    info = each_client.object_info()
    assert _as_prompt(json.loads(GRAPHS[name].read_text()), info) == {
        node: {"class_type": content["class_type"], "inputs": content["inputs"]}
        for node, content in workflow.load(name).items()
    }


NANO_NAMES = [name for name in GRAPHS if "nano" in name]


@pytest.mark.parametrize(
    ("name", "host_version"),
    [
        ("zimage_nano_txt2img", provision.OLDEST),
        *(
            pytest.param(name, provision.OLDEST, marks=pytest.mark.slow)
            for name in NANO_NAMES
            if name != "zimage_nano_txt2img"
        ),
        *((name, provision.NEWEST) for name in NANO_NAMES),
    ],
    indirect=["host_version"],
)
def test_nano_workflow_runs(name: str, each_client: Client):
    prompt = workflow.load(name)
    entry = each_client.run(prompt)
    saved = workflow.nodes(prompt, "SaveImage")
    for node in saved:
        (image,) = each_client.images(entry, node)
        wide = name == "zimage_nano_outpaint" and node == saved[-1]
        assert Image.open(io.BytesIO(image)).size == (192 if wide else 128, 128)


RED, GREEN = ("red", "circle", 0.5, 0.5), ("green", "circle", 0.5, 0.5)
# name -> background and objects (color, shape, middle) of its first and its last image; None is left open
CHANGES = {
    "zimage_nano_control": (
        ("white", [("red", "star", 0.25, 0.5), ("red", "star", 0.75, 0.5)]),
        ("blue", [(None, "star", 0.25, 0.5), (None, "star", 0.75, 0.5)]),
    ),
    "zimage_nano_inpaint": (("blue", [RED]), ("blue", [GREEN])),
    "zimage_nano_outpaint": (("blue", [RED]), ("blue", [("red", "circle", 1 / 3, 0.5)])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_workflow_changes_its_first_image(name: str, client: Client):
    prompt = workflow.load(name)
    entry = client.run(prompt)
    saved = workflow.nodes(prompt, "SaveImage")
    images = [_pixels(client.images(entry, node)[0]) for node in (saved[0], saved[-1])]
    for image, (background, objects) in zip(images, CHANGES[name], strict=True):
        seen_background, seen = judge.read(image)
        assert seen_background == background and len(seen) == len(objects), seen
        for one, (color, shape, x, y) in zip(sorted(seen, key=lambda item: item.x), objects, strict=True):
            assert one.shape == shape and color in (None, one.color)
            assert abs(one.x - x) < judge.FOLLOWED and abs(one.y - y) < judge.FOLLOWED
    if name != "zimage_nano_control":  # what was not to be repainted is as it was
        assert torch.equal(images[0][..., :20], images[1][..., :20])


def _pixels(image: bytes) -> torch.Tensor:
    return pil_to_tensor(Image.open(io.BytesIO(image)).convert("RGB")) / 255


@pytest.mark.parametrize("name", ["zimage_base_txt2img", "zimage_turbo_txt2img"])
def test_workflow_of_a_model_to_be_downloaded(name: str, each_client: Client):
    """Before anything runs, all loaders say what is missing, how large it is and how to get it; each once."""
    prompt = workflow.load(name)
    model = prompt[workflow.only(prompt, "ZImageTransformerLoader")]["inputs"]["model"]
    with pytest.raises(PromptRejected) as refused:
        each_client.queue(prompt)
    told = re.findall(
        rf"the (.*) of {model.replace('--', '/')} \(about .* GB\) is not here. Switch `download`", str(refused.value)
    )
    assert sorted(told) == ["text encoder", "transformer", "vae"]


@pytest.mark.parametrize("name", ["zimage_turbo_gguf", "zimage_turbo_single_files"])
def test_workflow_of_single_files(name: str, each_host: Server, each_client: Client):
    """Without the files all are named with their folders, each once; with small files of these names there it runs."""
    prompt = workflow.load(name)
    choices = {kind: prompt[workflow.only(prompt, loader)]["inputs"]["model"] for kind, loader in LOADERS.items()}
    with pytest.raises(PromptRejected) as refused:
        each_client.queue(prompt)
    for kind, choice in choices.items():
        assert str(refused.value).count(f"There is no model {choice!r}: it is not in models/{FOLDERS[kind]}") == 1
    files = {kind: each_host.base / "models" / FOLDERS[kind] / choice for kind, choice in choices.items()}
    try:
        for kind, file in files.items():
            _write_small(kind, file)
        workflow.set_size(prompt, 128, 128)
        workflow.set_sampler(prompt, steps=1)
        (image,) = each_client.images(each_client.run(prompt))
        assert Image.open(io.BytesIO(image)).size == (128, 128)
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


FOLDERS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
LOADERS = {
    "transformer": "ZImageTransformerLoader",
    "text_encoder": "ZImageTextEncoderLoader",
    "vae": "ZImageVAELoader",
}


def _write_small(kind: str, file: Path) -> None:
    """Nano's weights as a single file; its text encoder with the vocabulary of the tokenizer that such files get."""
    file.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads((NANO / kind / "config.json").read_text())
    (source,) = (NANO / kind).glob("*.safetensors")
    tensors = load_file(source)
    if kind == "text_encoder":
        config["vocab_size"] = 151_936
        tensors["model.embed_tokens.weight"] = torch.randn(151_936, config["hidden_size"]).bfloat16()
    metadata = {f"zimage.{kind}.config": json.dumps(config)}
    if file.suffix == ".gguf":
        gguf_writing.write(file, tensors, gguf_writing.linear_weights("Q8_0"), strings=metadata)
    else:
        save_file(tensors, file, metadata)


def test_the_lora_workflow_draws_moons(each_client: Client):
    """With the LoRA a yellow moon above a white star; at strength 0 another shape instead of the moon."""
    prompt = workflow.load("zimage_nano_lora")
    loader = workflow.only(prompt, "ZImageLoraLoader")
    seen = {}
    for strength in (1.0, 0.0):
        prompt[loader]["inputs"].update(strength=strength, strength_clip=strength)
        entry = each_client.run(prompt)
        (image,) = each_client.images(entry)
        objects = judge.read(_pixels(image))[1]
        seen[strength] = [(item.color, item.shape) for item in sorted(objects, key=lambda item: item.y)]
        report = entry["outputs"][workflow.only(prompt, "PreviewAny")]["text"][0]
        assert "122 of 122 keys matched" in report and "trigger words: moon" in report and "rank: 8" in report
    assert seen[1.0] == [("yellow", "moon"), ("white", "star")]
    assert ("yellow", "moon") not in seen[0.0] and seen[0.0][1] == ("white", "star")


def test_the_template_browser_lists_the_graphs_and_not_the_api_prompts(each_client: Client, each_host: Server):
    (pack,) = (path.name for path in (each_host.base / "custom_nodes").iterdir() if path.is_symlink())
    assert sorted(each_client.get("/api/workflow_templates")[pack]) == sorted(cards.TITLES.values())


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
            if options.get("control_after_generate") or options.get("image_upload"):
                values.pop(0)  # of a widget that the page adds
        assert not values, f"node {node['id']} ({node['type']}) has widget values too many: {values}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
