"""How the nodes behave for the person at the screen: previews, progress, interruption, laziness, errors."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import provision
import pytest
import torch
import workflow
from host import Client, ExecutionFailed, PromptRejected, Server
from safetensors.torch import save_file

from zimage_core.config import TextEncoderConfig
from zimage_core.model.text_encoder import TextEncoder

from ..helpers import NANO

BUILT_IN = "Z-Image-Nano (built in)"
SAMPLER, MODEL, CLIP, VAE, LATENT = "7", "1", "2", "3", "6"  # node ids of the nano workflow
SCHEMAS = {
    "ZImageTransformerLoader": (
        ["model", "weight_dtype"],
        ["download", "repository", "compile", "cache_converted", "network"],
        ["MODEL"],
    ),
    "ZImageTextEncoderLoader": (
        ["model", "weight_dtype"],
        ["download", "repository", "cache_converted", "network"],
        ["CLIP"],
    ),
    "ZImageVAELoader": (["model"], ["download", "repository"], ["VAE"]),
    "ZImageLoraLoader": (["model", "lora", "strength"], ["clip", "strength_clip"], ["MODEL", "CLIP", "STRING"]),
    "ZImageTextEncode": (["clip", "text"], ["cache"], ["CONDITIONING"]),
    "ZImageSampler": (
        "model positive latent_image seed steps guidance_scale cfg_normalization cfg_truncation denoise".split(),
        ["negative", "attention", "safe_retry"],
        ["LATENT"],
    ),
    "ZImageVAEDecode": (["vae", "samples"], ["low_memory", "safe_retry"], ["IMAGE"]),
    "ZImageVAEEncode": (["vae", "pixels"], ["safe_retry"], ["LATENT"]),
    "ZImageControlNet": (
        ["model", "vae", "control_net", "strength", "start", "end"],
        ["image", "inpaint_image", "mask", "fit", "on_negative"],
        ["MODEL"],
    ),
    "ZImageInpaintPrepare": (
        ["vae", "image", "grow", "feather", "crop", "context", "megapixels", "fill"],
        ["mask", "left", "top", "right", "bottom"],
        ["LATENT", "ZIMAGE_CROP", "IMAGE", "MASK"],
    ),
    "ZImageInpaintFinish": (["image", "crop", "match_color"], [], ["IMAGE"]),
}
DEFAULTS = {
    "seed": 0,
    "steps": 8,
    "guidance_scale": 0.0,
    "cfg_normalization": 0.0,
    "cfg_truncation": 1.0,
    "denoise": 1.0,
}


def nano(**sampler: Any) -> dict[str, Any]:
    prompt = workflow.load("zimage_nano_txt2img")
    prompt[SAMPLER]["inputs"].update(sampler)
    return prompt


# The frozen interface


def test_ids_inputs_outputs_and_help_of_every_node(each_client: Client):
    info = each_client.object_info()
    ours = {name: node for name, node in info.items() if node["category"] == "Z-Image"}
    assert ours.keys() == SCHEMAS.keys()
    for name, (required, optional, outputs) in SCHEMAS.items():
        node = ours[name]
        assert (node["input_order"].get("required", []), node["input_order"].get("optional", [])) == (
            required,
            optional,
        )
        assert node["output"] == outputs
        assert node["description"]
        for spec in {**node["input"]["required"], **node["input"].get("optional", {})}.values():
            assert spec[1].get("tooltip"), name
    sampler = ours["ZImageSampler"]["input"]["required"]
    assert {key: sampler[key][1]["default"] for key in DEFAULTS} == DEFAULTS


def test_help_is_served(client: Client, host: Server):
    """Where the browser asks for it. Not for the oldest's pack here: nothing is served of a folder with a space."""
    (pack,) = host.packs
    for page in (provision.ROOT / "web" / "docs").glob("*/*.md"):
        answer = client.read(f"/extensions/{pack}/docs/{page.parent.name}/{page.name}")
        assert answer == page.read_bytes() and len(answer) > 500


def test_translations_are_served(each_client: Client):
    names = each_client.get("/i18n")["zh"]["nodeDefs"]
    assert names.items() >= json.loads((provision.ROOT / "locales/zh/nodeDefs.json").read_text("utf-8")).items()


def test_choices_are_the_built_in_model_then_snapshots_of_both_folders(each_client: Client, each_host: Server):
    models = each_host.base / "models"
    made = [models / "zimage" / "B-Model", models / "diffusers" / "a-model", models / "zimage" / "Org" / "Model"]
    for folder in made:
        (folder / "transformer").mkdir(parents=True)
    (models / "zimage" / "not a snapshot").mkdir()
    try:
        spec = each_client.object_info("ZImageVAELoader")["ZImageVAELoader"]["input"]["required"]["model"]
        options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
        known = [f"Tongyi-MAI--{name} (download)" for name in ("Z-Image", "Z-Image-Turbo")]
        assert options == [BUILT_IN, "a-model", "B-Model", "Org/Model", *known]
    finally:
        for folder in [*made, models / "zimage" / "Org", models / "zimage" / "not a snapshot"]:
            shutil.rmtree(folder, ignore_errors=True)


# At the screen


def test_progress_counts_the_steps_and_previews_come(each_client: Client):
    seen = []
    each_client.run(nano(seed=101), on_progress=lambda node, value, total: seen.append((node, value, total)))
    assert [(value, total) for node, value, total in seen if node == SAMPLER][-1] == (8, 8)
    assert each_client.previews


def test_negative_prompt_is_not_even_encoded_without_guidance(client: Client):
    def executed(guidance: float) -> set[str]:
        client.free()
        client.events.clear()
        client.run(nano(guidance_scale=guidance, seed=7))
        return {event["data"]["node"] for event in client.events if event["type"] == "executing"}

    assert "5" not in executed(0.0)
    assert "5" in executed(1.0)


LATE = (
    10  # steps of a third of a second, until an interruption has gone to the server and the one that it met has ended
)


@pytest.mark.parametrize("after", [1, 5, pytest.param(50, marks=pytest.mark.slow)])
def test_interruption_is_prompt_at_any_step(client: Client, after: int):
    prompt = nano(steps=1000, seed=after)
    prompt[LATENT]["inputs"].update(width=512, height=512)
    prompt_id = client.queue(prompt)
    reached = 0
    while reached < after:
        event = client.receive(60)
        if event and event["type"] == "progress":
            reached = event["data"]["value"]
    client.interrupt(prompt_id)
    entry = client.wait(prompt_id)
    steps = [event["data"]["value"] for event in client.events if event["type"] == "progress"]
    assert max(steps) <= reached + LATE
    assert entry["status"]["status_str"] == "error" and not entry["status"]["completed"]
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    client.run(nano(seed=after))


def test_a_changed_file_is_loaded_again(client: Client, host: Server):
    folder = Path(shutil.copytree(NANO, host.base / "models" / "zimage" / "Mine"))
    try:
        prompt = nano(seed=3)
        for node in (MODEL, CLIP, VAE):
            prompt[node]["inputs"]["model"] = "Mine"
        client.run(prompt)
        config = folder / "transformer" / "config.json"
        config.write_text(config.read_text().replace('"ZImageTransformer2DModel"', '"OtherModel"'))
        with pytest.raises(ExecutionFailed, match="_class_name is 'OtherModel'"):
            client.run(prompt)
    finally:
        shutil.rmtree(folder)


# Input that can't work: each error names the thing and what to do, and the next good prompt runs


seeds = itertools.count(1000)  # a prompt that ran already would be answered from ComfyUI's cache


@pytest.fixture
def refused(client: Client):
    """Runs a prompt that must fail, returns what the user reads, and checks that a good prompt runs afterwards."""

    def run(prompt: dict[str, Any]) -> str:
        with pytest.raises((PromptRejected, ExecutionFailed)) as failure:
            client.run(prompt)
        client.run(nano(steps=2, seed=next(seeds)))
        error = failure.value
        if isinstance(error, ExecutionFailed):
            assert "Traceback" not in error.details["exception_message"]
        return str(error)

    return run


def test_steps_0(refused):
    assert "Value 0 smaller than min of 1" in refused(nano(steps=0))


def test_denoise_0(refused):
    message = refused(nano(denoise=0.0))
    assert "denoise" in message and "Value 0.0 smaller than min" in message


def test_no_prompt_at_all(refused):
    prompt = nano()
    del prompt[SAMPLER]["inputs"]["positive"]
    assert "Required input is missing: positive" in refused(prompt)


def test_guidance_without_a_negative(refused):
    prompt = nano(guidance_scale=2.0)
    del prompt[SAMPLER]["inputs"]["negative"]
    message = refused(prompt)
    assert "nothing is connected to `negative`" in message and "guidance_scale to 0" in message


def test_image_whose_size_is_not_a_multiple_of_16(refused):
    prompt = nano()
    size = {"width": 136, "height": 128, "batch_size": 1, "color": 0}
    prompt["60"] = {"class_type": "EmptyImage", "inputs": size}
    prompt["61"] = {"class_type": "ZImageVAEEncode", "inputs": {"pixels": ["60", 0], "vae": [VAE, 0]}}
    prompt[SAMPLER]["inputs"]["latent_image"] = ["61", 0]
    message = refused(prompt)
    assert "136x128" in message and "divisible by 16" in message and "128x128" in message


def test_latent_whose_size_is_not_a_multiple_of_16(refused):
    """The stock encoder takes multiples of 8; the sampler names the size in pixels before it starts."""
    prompt = nano()
    size = {"width": 136, "height": 128, "batch_size": 1, "color": 0}
    prompt["60"] = {"class_type": "EmptyImage", "inputs": size}
    prompt["61"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["60", 0], "vae": [VAE, 0]}}
    prompt[SAMPLER]["inputs"]["latent_image"] = ["61", 0]
    message = refused(prompt)
    assert "136x128" in message and "divisible by 16" in message


def test_latent_of_another_model(refused, client: Client):
    """An empty 4-channel latent only says how large the image is, so it is fitted, as stock samplers do; one that
    holds an image is refused."""
    prompt = nano()
    prompt[LATENT] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    client.run(prompt)
    latent = {"latent_tensor": torch.ones(1, 4, 16, 16), "latent_format_version_0": torch.tensor([])}
    save_file(latent, client.server.base / "input" / "four.latent")
    prompt["60"] = {"class_type": "LoadLatent", "inputs": {"latent": "four.latent"}}
    prompt[SAMPLER]["inputs"]["latent_image"] = ["60", 0]
    message = refused(prompt)
    assert "4 channels, expected 16" in message and "EmptySD3LatentImage" in message


def test_clip_and_model_of_different_widths(refused, host: Server):
    folder = Path(shutil.copytree(NANO, host.base / "models" / "zimage" / "Narrow"))
    try:
        _halve_text_encoder(folder)
        prompt = nano()
        prompt[CLIP]["inputs"]["model"] = "Narrow"
        message = refused(prompt)
        width = json.loads((NANO / "transformer" / "config.json").read_text())["cap_feat_dim"]
        assert (
            f"width of {width // 2}" in message and f"expects {width}" in message and "same Z-Image snapshot" in message
        )
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def broken(host: Server):
    """A copy of the nano snapshot among ComfyUI's models, and a prompt that uses it."""
    folder = Path(shutil.copytree(NANO, host.base / "models" / "zimage" / "Broken"))
    prompt = nano()
    prompt[MODEL]["inputs"]["model"] = "Broken"
    yield folder / "transformer", prompt
    shutil.rmtree(folder)


def test_snapshot_without_its_config(refused, broken):
    folder, prompt = broken
    (folder / "config.json").unlink()
    message = refused(prompt)
    assert "Broken/transformer/config.json" in message and "missing" in message and "download it again" in message


def test_snapshot_with_a_missing_shard(refused, broken):
    folder, prompt = broken
    shard = "diffusion_pytorch_model-00002-of-00002.safetensors"
    first = "diffusion_pytorch_model-00001-of-00002.safetensors"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / first)
    index = {"metadata": {}, "weight_map": {"x_pad_token": first, "cap_pad_token": shard}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(prompt)
    assert "Broken/transformer" in message and shard in message and "incomplete" in message


def test_truncated_weights(refused, broken):
    folder, prompt = broken
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    message = refused(prompt)
    assert f"Broken/transformer/{path.name}" in message and "truncated" in message and "download" in message


def test_weights_of_another_model(refused, broken):
    folder, prompt = broken
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(NANO / "vae" / name, folder / name)
    message = refused(prompt)
    for words in (
        "Broken/transformer",
        name,
        "this is an AutoencoderKL (VAE)",
        "put the snapshot's own transformer/ here",
    ):
        assert words in message


def test_snapshot_without_the_component(refused, broken):
    folder, prompt = broken
    shutil.rmtree(folder.parent / "vae")
    prompt[VAE]["inputs"]["model"] = "Broken"
    message = refused(prompt)
    assert "Broken" in message and "vae/ is missing" in message


def _halve_text_encoder(folder: Path) -> None:
    """Replaces the text encoder by a random one of half the width."""
    path = folder / "text_encoder" / "config.json"
    raw = json.loads(path.read_text())
    raw["hidden_size"] //= 2
    path.write_text(json.dumps(raw))
    encoder = TextEncoder(TextEncoderConfig.from_dict(raw, "config.json"), dtype=torch.bfloat16)
    for file in (folder / "text_encoder").glob("*.safetensors*"):
        file.unlink()
    save_file({key: value.clone() for key, value in encoder.state_dict().items()}, path.with_name("model.safetensors"))
