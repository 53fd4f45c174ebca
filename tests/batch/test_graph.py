"""Columns and the inputs of a workflow: what goes by itself, what is asked for, what is told before anything runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from zimage_core.batch.graph import Target, Workflow, identity
from zimage_core.batch.names import Template
from zimage_core.batch.offers import lacks
from zimage_core.batch.reading import records
from zimage_core.batch.remote_plan import Plan
from zimage_core.batch.remote_rows import checked, resolved
from zimage_core.batch.uploads import Uploads

from ..helpers import ROOT
from .stand_in import INFO

API = ROOT / "workflows" / "api"
NANO = json.loads((API / "zimage_nano_txt2img_api.json").read_text())
CONTROL = json.loads((API / "zimage_nano_control_api.json").read_text())


def stock() -> dict:
    """KSampler and CLIPTextEncode, with a control network between them, a prompt from a primitive node."""
    nodes = copy.deepcopy(NANO)
    nodes["7"] = {
        "class_type": "KSampler",
        "inputs": {"model": ["1", 0], "positive": ["10", 0], "negative": ["10", 1], "latent_image": ["6", 0]}
        | {"seed": 1, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
        "_meta": {"title": "KSampler"},
    }
    for node, text in (("4", ["11", 0]), ("5", "")):
        nodes[node]["class_type"] = "CLIPTextEncode"
        nodes[node]["inputs"] = {"clip": ["2", 0], "text": text}
    nodes["10"] = {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["4", 0], "negative": ["5", 0], "strength": 1.0},
    }
    nodes["11"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a"}, "_meta": {"title": "Words"}}
    return nodes


def made(nodes: dict, lines: list[dict], maps: tuple[str, ...] = (), name="{row}.png", **defaults) -> list[dict]:
    """The workflows that rows ask for."""
    plan = planned(nodes, lines, maps, name, **defaults)
    return [plan.nodes(task) for task in plan.tasks]


def planned(nodes: dict, lines: list[dict], maps: tuple[str, ...] = (), name="{row}.png", **defaults) -> Plan:
    found = records("\n".join(map(json.dumps, lines)).encode(), "prompts", ".jsonl", None)
    names = [*dict.fromkeys(name for record in found for name in record.values)]
    columns = resolved(names, [*defaults], maps, Workflow(nodes), INFO)
    rows, faults = checked(found, columns, defaults, INFO, Uploads(Path()))
    if faults:
        raise ValueError("\n".join(map(str, faults)))
    return Plan(rows, columns, Template(name), 0)


def test_usual_columns_of_our_nodes():
    row = {"prompt": "a ring", "negative_prompt": "a star", "width": 64, "height": "96", "steps": 3, "seed": 2**63}
    (nodes,) = made(NANO, [{**row, "guidance_scale": 1.5, "cfg_normalization": True, "cfg_truncation": 0.5}])
    assert (nodes["4"]["inputs"]["text"], nodes["5"]["inputs"]["text"]) == ("a ring", "a star")
    assert nodes["6"]["inputs"] == {"width": 64, "height": 96, "batch_size": 1}
    sampler = nodes["7"]["inputs"]
    assert (sampler["seed"], sampler["steps"], sampler["guidance_scale"]) == (2**63, 3, 1.5)
    assert (sampler["cfg_normalization"], sampler["cfg_truncation"]) == (1.0, 0.5)
    assert nodes["9"] == NANO["9"] and NANO["4"]["inputs"]["text"] == "two red stars on a blue background"


def test_usual_columns_of_stock_nodes():
    """Through a control network and a primitive node; CFG is guidance_scale + 1."""
    row = {"prompt": "a ring", "negative_prompt": "a star", "guidance_scale": 3.5}
    (nodes,) = made(stock(), [row], steps=5)
    assert (nodes["11"]["inputs"]["value"], nodes["5"]["inputs"]["text"]) == ("a ring", "a star")
    assert nodes["4"]["inputs"]["text"] == ["11", 0]
    assert (nodes["7"]["inputs"]["cfg"], nodes["7"]["inputs"]["steps"], nodes["7"]["inputs"]["seed"]) == (4.5, 5, 0)
    plan = planned(stock(), [row])
    assert "CFG scale: 4.5" in plan.tasks[0].parameters and plan.tasks[0].row.guidance_scale == 3.5
    (nodes,) = made(stock(), [{"KSampler.cfg": 3.5}])
    assert nodes["7"]["inputs"]["cfg"] == 3.5  # the input itself


def test_a_negative_that_is_made_of_the_prompt_is_none():
    nodes = copy.deepcopy(NANO)
    nodes["5"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["4", 0]}}
    assert Workflow(nodes).usual()["negative_prompt"] == []
    with pytest.raises(ValueError, match="no clear input for 'negative_prompt'"):
        made(nodes, [{"prompt": "a", "negative_prompt": "b"}])


def test_columns_by_title_and_by_id():
    row = {"Prompt.text": "a ring", "7.seed": 5, "Z-Image Sampler.denoise": "0.5", "9.filename_prefix": "mine"}
    plan = planned(NANO, [{**row, "8.low_memory": "auto", "Load Z-Image Transformer.download": "false"}])
    nodes = plan.nodes(plan.tasks[0])
    assert nodes["4"]["inputs"]["text"] == "a ring" and nodes["9"]["inputs"]["filename_prefix"] == "mine"
    assert nodes["7"]["inputs"]["denoise"] == 0.5 and nodes["1"]["inputs"]["download"] is False
    # they are the row's prompt and seed, too
    assert plan.tasks[0].seed == 5 == nodes["7"]["inputs"]["seed"] and plan.tasks[0].row.prompt == "a ring"
    assert plan.tasks[0].parameters.startswith("a ring\nSteps: 8, CFG scale: 3, Seed: 5, Size: 128x128, Model: ")


def test_an_input_that_the_file_leaves_out():
    nodes = copy.deepcopy(NANO)
    del nodes["7"]["inputs"]["attention"]
    assert made(nodes, [{"7.attention": "auto"}])[0]["7"]["inputs"]["attention"] == "auto"


def test_what_is_mapped():
    maps = ("prompt=First prompt.text", "style=Second prompt.text", "seed=First image.seed", "seed=Second image.seed")
    (nodes,) = made(CONTROL, [{"prompt": "a", "style": "b", "seed": 9}], maps)
    texts = [one["inputs"]["text"] for one in nodes.values() if one["class_type"] == "ZImageTextEncode"]
    seeds = [one["inputs"]["seed"] for one in nodes.values() if one["class_type"] == "ZImageSampler"]
    assert (texts, seeds) == (["a", "b"], [9, 9])


def test_a_column_by_title_makes_clear_which_is_meant():
    (nodes,) = made(CONTROL, [{"First prompt.text": "a", "Second prompt.text": "b", "Second image.seed": 4}])
    seeds = [one["inputs"]["seed"] for one in nodes.values() if one["class_type"] == "ZImageSampler"]
    first = next(one["inputs"]["seed"] for one in CONTROL.values() if one["class_type"] == "ZImageSampler")
    assert seeds == [first, 4]


def test_seeds_and_images_go_as_locally():
    plan = planned(NANO, [{"prompt": "a"}, {"prompt": "b", "images": 2}, {"prompt": "c", "seed": 7}, {"prompt": "d"}])
    assert [(task.place, task.seed, task.file) for task in plan.tasks] == [
        ((1, 1), 0, "1.png"),
        ((2, 1), 1, "2_1.png"),
        ((2, 2), 2, "2_2.png"),
        ((3, 1), 7, "3.png"),
        ((4, 1), 4, "4.png"),
    ]
    assert [plan.nodes(task)["7"]["inputs"]["seed"] for task in plan.tasks] == [0, 1, 2, 7, 4]
    assert len({task.key for task in plan.tasks}) == 5


def test_names_of_further_images():
    plan = planned(NANO, [{"prompt": "a", "images": 2}], name="{prompt}/{image}.png")
    further = plan.further(plan.tasks[1], 3)
    assert (further.file, further.place, further.seed) == ("a/2_3.png", (1, 6), 1)
    assert plan.first(further) == (1, 2) and plan.output(further) == 3


def test_the_key_is_that_of_all_that_is_queued_but_titles():
    other = copy.deepcopy(NANO)
    other["4"]["_meta"]["title"] = "Other"
    assert identity(other) == identity(NANO)
    other["8"]["inputs"]["low_memory"] = "on"
    assert identity(other) != identity(NANO)


@pytest.mark.parametrize(
    "nodes, line, maps, words",
    [
        (NANO, {"Promt.text": "a"}, (), ["'Promt.text': no node has this title or id, did you mean 'Prompt'?"]),
        (NANO, {"Prompt.txt": "a"}, (), ["has no input 'txt', did you mean 'text'?"]),
        (NANO, {"7.positive": "a"}, (), ["is connected to node 4 ('Prompt')"]),
        (NANO, {"prompt": "a", "style": "b"}, (), ["unknown column 'style'", "--map style=title.input"]),
        (NANO, {"prompt": "a", "loras": "b"}, (), ["no clear input for 'loras'", "--map loras="]),
        (NANO, {"prompt": "a", "4.text": "b"}, (), ["'4.text' and 'prompt' both fill Prompt.text"]),
        (NANO, {"prompt": "a"}, ("style=Prompt.text",), ["the file has no column 'style'"]),
        (NANO, {"prompt": "a"}, ("prompt",), ["--map 'prompt': write column=title.input"]),
        (CONTROL, {"prompt": "a"}, (), ["'prompt' could be", "'seed' could be", "--map prompt='First prompt.text'"]),
        (CONTROL, {"Z-Image VAE Decode.low_memory": "on"}, (), ["2 nodes are titled 'Z-Image VAE Decode'", "8.low_me"]),
    ],
)
def test_columns_that_are_unclear(nodes, line, maps, words):
    with pytest.raises(ValueError) as error:
        made(nodes, [line], maps)
    for word in (*words, "The workflow's nodes and their inputs are:", "(EmptySD3LatentImage): width, height"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "line, words",
    [
        ({"prompt": 5}, "row 1 (line 1), prompt '5': expected text"),
        ({"Prompt.text": 5}, "row 1 (line 1), Prompt.text '5': expected text"),
        ({"width": 100}, "divisible by 16; the nearest is 96"),
        ({"7.steps": 2.5}, "a whole number"),
        ({"7.denoise": 2}, "7.denoise '2': expected a number from 0.01 to 1.0"),
        ({"7.denoise": "much"}, "expected a number"),
        ({"7.denoise": "nan"}, "expected a number"),
        ({"guidance_scale": 101}, "expected a number from 0.0 to 100.0"),
        ({"7.safe_retry": "maybe"}, "expected true or false"),
        ({"6.batch_size": True}, "expected a whole number from 1 to 4096"),
        ({"seed": -1}, "0 to 2^64 - 1"),
        ({"1.model": ["a"]}, "expected one of the choices"),
    ],
)
def test_values_of_a_wrong_type(line, words):
    with pytest.raises(ValueError) as error:
        made(NANO, [line])
    assert words in str(error.value)


def test_every_row_needs_a_prompt_where_one_has_it():
    with pytest.raises(ValueError, match=r"row 2 \(line 2\), prompt '': there is none"):
        made(NANO, [{"prompt": "a"}, {"seed": 1}])
    assert len(made(NANO, [{"seed": 1}, {"seed": 2}])) == 2  # the workflow's own


def test_what_a_server_lacks_is_named():
    plan = planned(NANO, [{"1.model": "mine.safetensors"}, {"1.model": "Z-Image-Nano (built in)"}, {"seed": 1}])
    (fault,) = lacks(INFO, plan.workflow, plan.values())
    assert "Load Z-Image Transformer.model is 'mine.safetensors', which it doesn't offer" in fault
    assert "it offers Z-Image-Nano (built in), " in fault
    info = {name: node for name, node in INFO.items() if name != "ZImageSampler"}
    (fault,) = lacks(info, Workflow(NANO), {})
    assert "it doesn't know ZImageSampler (node 7, 'Z-Image Sampler'); install the pack" in fault
    nodes = {"1": NANO["1"] | {"inputs": NANO["1"]["inputs"] | {"weight_dtype": "fp4"}}}
    assert ["fp4" in fault or "saves an image" in fault for fault in lacks(INFO, Workflow(nodes), {})] == [True]
    nodes = {name: node for name, node in NANO.items() if name != "9"}
    assert "no node of this workflow saves an image" in lacks(INFO, Workflow(nodes), {})[0]
    # a value of the file that every row replaces is nobody's need
    nodes = copy.deepcopy(NANO)
    nodes["1"]["inputs"]["model"] = "gone.safetensors"
    plan = planned(nodes, [{"1.model": "Z-Image-Nano (built in)"}])
    assert lacks(INFO, plan.workflow, plan.values()) == []
    loaded = {"1": {"class_type": "LoadImage", "inputs": {"image": "sub/a.png"}}, "2": NANO["9"]}
    assert lacks(INFO, Workflow(loaded), {}) == []  # files in folders are taken, and not listed


@pytest.mark.parametrize(
    "content, words",
    [
        (json.dumps({"nodes": [], "links": []}), "a graph as the editor saves it"),
        ("{", "is not JSON"),
        ("[]", "is no workflow in API format"),
        ("{}", "is no workflow in API format"),
        ('{"1": {"class_type": "A"}}', "is no workflow in API format"),
        ('{"1": {"class_type": "A", "inputs": {"b": ["2", 0]}}}', "A.b is connected to node 2, which is not in it"),
    ],
)
def test_files_that_are_no_workflow(tmp_path, content, words):
    path = tmp_path / "w.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        Workflow.read(path)
    assert words in str(error.value) and "Workflow > Export (API)" in str(error.value)


@pytest.mark.parametrize("path", sorted(API.glob("*.json")), ids=lambda path: path.stem)
def test_our_workflows_can_be_read(path: Path):
    workflow = Workflow.read(path)
    usual = workflow.usual()
    assert usual["seed"] and usual["prompt"]
    for targets in usual.values():
        assert all(isinstance(target, Target) and workflow.value(target) is not None for target in targets)


def test_a_size_that_is_not_known_in_a_name():
    nodes = copy.deepcopy(NANO)
    nodes["6"] = {"class_type": "VAEEncode", "inputs": {}}
    with pytest.raises(ValueError, match="{width} of row 1 isn't known here; leave it out"):
        made(nodes, [{"prompt": "a"}], name="{row}_{width}.png")
