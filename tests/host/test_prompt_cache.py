"""Prompts that a server has encoded cost the next one nothing: not one weight of the text encoder is read."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import workflow
from host import Client, ExecutionFailed, Server
from PIL import Image
from safetensors.torch import save_file

from ..helpers import NANO
from ..poisoning import poison

LOADERS = ("ZImageTransformerLoader", "ZImageTextEncoderLoader", "ZImageVAELoader")
DAMAGED = r"embed_tokens\.weight of the text encoder has values that are not finite"
LOADED = "Requested to load ZImageTextModel"  # in ComfyUI's log, once the encoder goes to its device
LORA = "90"  # node id


@contextmanager
def started_after(other: Server, folder: Path) -> Iterator[tuple[Server, Client]]:
    """A server that has the other's pack, models, LoRA files and user directory, and its log and database in folder."""
    args = ["--database-url", f"sqlite:///{folder / 'comfyui.db'}"]
    server = Server(other.comfyui, base=other.base, args=args, log=folder / "comfyui.log")
    with server, server.connect() as client:
        yield server, client


@pytest.fixture
def mine(each_host: Server) -> Iterator[tuple[Path, Path]]:
    """A copy of the nano snapshot among ComfyUI's models, and the place of a LoRA."""
    folder = Path(shutil.copytree(NANO, each_host.base / "models" / "zimage" / "Mine"))
    lora = each_host.base / "models" / "loras" / "l.safetensors"
    yield folder, lora
    shutil.rmtree(folder)
    lora.unlink()


def entries(server: Server) -> set[Path]:
    return set((server.base / "user" / "zimage" / "prompts").glob("*"))


def prompt(text: str, seed: int, strength: float | None = None, **encoding: Any) -> dict[str, Any]:
    """The nano workflow with the model `mine`; strength: of its LoRA, None is without. encoding: inputs."""
    found = workflow.load("zimage_nano_txt2img")
    for loader in LOADERS:
        found[workflow.only(found, loader)]["inputs"]["model"] = "Mine"
    workflow.set_text(found, text)
    workflow.set_sampler(found, seed=seed, steps=2)
    for node in workflow.nodes(found, workflow.TEXT):
        found[node]["inputs"].update(encoding)
    if strength is not None:
        model, clip = (workflow.only(found, loader) for loader in LOADERS[:2])
        inputs = {"model": [model, 0], "clip": [clip, 0], "lora": "l.safetensors", "strength": 1.0}
        found[LORA] = {"class_type": "ZImageLoraLoader", "inputs": {**inputs, "strength_clip": strength}}
        for node in workflow.nodes(found, workflow.TEXT):
            found[node]["inputs"]["clip"] = [LORA, 1]
    return found


def image(client: Client, *arguments: Any, **settings: Any) -> bytes:
    (png,) = client.images(client.run(prompt(*arguments, **settings)))
    return Image.open(io.BytesIO(png)).tobytes()


def write_lora(file: Path, size: float) -> None:
    name, down = "lora_te_layers_1_self_attn_q_proj", torch.eye(4, 128)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": size * torch.ones(128, 4)}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


@pytest.mark.slow
def test_after_a_restart_a_known_prompt_needs_no_encoder(each_host, each_client, mine, tmp_path):
    folder, lora = mine
    weights = folder / "text_encoder" / "model.safetensors"
    write_lora(lora, 0.5)
    text = "two red stars on a blue background"
    before = entries(each_host)
    plain, with_lora = image(each_client, text, 1), image(each_client, text, 1, strength=0.8)
    assert plain != with_lora and LOADED in each_host.log_text()
    known = entries(each_host)
    assert len(known - before) == 4  # positive and negative, without and with LoRA

    poison(weights)
    with started_after(each_host, tmp_path) as (server, client):
        assert image(client, text, 1) == plain
        assert image(client, text, 1, strength=0.8) == with_lora
        assert image(client, text, 2) != plain
        assert image(client, text, 3, cache=True) != plain
        assert LOADED not in server.log_text()
        for other in (
            prompt("a green ring", 1),
            prompt(text, 1, cache=False),
            prompt(text, 1, strength=0.7),
        ):
            with pytest.raises(ExecutionFailed, match=DAMAGED):
                client.run(other)
        assert LOADED in server.log_text()
        write_lora(lora, 0.6)
        with pytest.raises(ExecutionFailed, match=DAMAGED):
            client.run(prompt(text, 1, strength=0.8))
        write_lora(lora, 0.5)  # the same content again, in a new file
        assert image(client, text, 1, strength=0.8) == with_lora
        os.utime(weights, ns=(1, 1))
        with pytest.raises(ExecutionFailed, match=DAMAGED):
            client.run(prompt(text, 4))
    assert entries(each_host) == known
