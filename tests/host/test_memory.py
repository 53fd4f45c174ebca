"""A server that goes on for long takes no more memory than at its beginning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import provision
import pytest
import workflow
from host import Client, Server

SIZES = ((64, 64), (128, 128), (96, 64), (160, 96), (64, 128))  # the first five prompts have all of them
COUNT = 200
MODEL, CLIP, TEXT, SAMPLER, LORA = "1", "2", "4", "7", "90"  # node ids of the nano workflow, and of the LoRA loader


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """Of a server of its own, whose memory only these prompts change."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell a process's memory")
    comfyui = provision.newest()
    if not (comfyui / "main.py").is_file():
        pytest.skip(f"there is no ComfyUI in {comfyui}; `make setup` provisions one")
    packs, environment = {"comfyui-zimage": provision.ROOT}, {"TRANSFORMERS_OFFLINE": "1"}
    args = ["--preview-method", "none"]
    server = Server(comfyui, packs=packs, base=tmp_path, args=args, environment=environment)
    with server, server.connect() as client:
        yield client


def prompt(index: int) -> dict[str, Any]:
    """Another size, text and seed than the one before; every other one with the LoRA, in another strength."""
    found = workflow.load("zimage_nano_txt2img")
    star = ("red", "green", "blue")[index % 3]
    workflow.set_text(found, f"{index} yellow moons above a {star} star" + ", so" * (index % 5))
    workflow.set_sampler(found, seed=index, steps=1, guidance_scale=0.0)
    workflow.set_size(found, *SIZES[index % len(SIZES)])
    if index % 2:
        strength = 0.1 * (1 + index % 9)
        inputs = {"model": [MODEL, 0], "clip": [CLIP, 0], "lora": "Z-Image-Nano moon (built in)"}
        found[LORA] = {
            "class_type": "ZImageLoraLoader",
            "inputs": {**inputs, "strength": strength, "strength_clip": strength},
        }
        found[SAMPLER]["inputs"]["model"], found[TEXT]["inputs"]["clip"] = [LORA, 0], [LORA, 1]
    return found


def anonymous_memory(client: Client) -> int:
    """Bytes of the server that are not a file's."""
    lines = Path(f"/proc/{client.server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def run(client: Client, indices: range) -> None:
    queued = [client.queue(prompt(index)) for index in indices]
    client.wait(queued[-1])
    statuses = {client.history(prompt_id)["status"]["status_str"] for prompt_id in queued}
    assert statuses == {"success"}


@pytest.mark.slow
def test_two_hundred_prompts_take_no_more_memory_than_five(client: Client):
    run(client, range(5))
    early = anonymous_memory(client)
    run(client, range(5, COUNT))
    assert anonymous_memory(client) <= 1.02 * early
