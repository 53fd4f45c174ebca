"""Whole images: through ComfyUI's server with our nodes and with its own, and the nano model beside diffusers.

    python -m benchmarks.images                 # on a CPU: real widths, 2 main layers, 256²
    python -m benchmarks.images --device cuda   # the published geometry at 1024²
    python -m benchmarks.images --words 380     # only through the servers, with prompts of that many words
    python -m benchmarks.images --nano          # only the built-in model, in this process, beside diffusers

A server of its own for each, fed the same prompts in the same order with an empty prompt cache: the first image
after the start reads all three models; then other seeds, other prompts, and a prompt that is known. All that twice,
with short prompts and with long ones. The files have random weights, each in one file as ComfyUI distributes them, and
lie in the page cache.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from zimage_core.config import VAEConfig
from zimage_core.model.vae import AutoencoderKL
from zimage_core.pipeline import ZImagePipeline

from . import memory, models, results, timing
from .loading import shapes_of, write_file
from .vae import PUBLISHED

sys.path.append(str(models.ROOT / ".ci"))
import provision
import workflow
from host import Client, Server

STEPS = 8
NANO = models.ROOT / "nano" / "snapshot"
FILE = "bench.safetensors"
PROMPTS = [
    "a red fox in the snow, photographed in the morning light",
    "an old harbour with three blue fishing boats",
    "a bowl of oranges on a wooden table",
]
LONG = "with many small things around it, each told of at length, "  # repeated until a prompt is long
LONG_WORDS = 380  # that is about 400 tokens
# what is queued, in order: (row of the table, prompt, seed)
QUEUE = [("first image", 0, 1)]
QUEUE += [("new seed", 0, 2), ("new prompt", 1, 3), ("new seed", 1, 4), ("new prompt", 2, 5), ("known prompt", 0, 6)]


# Files with random weights


def write_models(folder: Path, layers: int, encoder_layers: int) -> None:
    """Transformer, text encoder and autoencoder, each in one file where ComfyUI looks for it."""
    config = models.geometry(layers)
    vae = AutoencoderKL(VAEConfig.from_dict(PUBLISHED, "here"), device="meta")
    files = {
        "diffusion_models": shapes_of(config),
        "text_encoders": encoder_shapes(encoder_layers),
        "vae": {name: tuple(value.shape) for name, value in vae.state_dict().items()},
    }
    for kind, shapes in files.items():
        (folder / "models" / kind).mkdir(parents=True)
        write_file(folder / "models" / kind / FILE, shapes, "BF16", {"format": "pt"})


def encoder_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Qwen3-4B's parameters, as ComfyUI distributes them."""
    width, inner, heads, groups, head = 2560, 9728, 32, 8, 128
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        block = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        block |= {f"self_attn.{name}_proj": (groups * head, width) for name in "kv"}
        block |= {"self_attn.q_proj": (heads * head, width), "self_attn.o_proj": (width, heads * head)}
        block |= {f"self_attn.{name}_norm": (head,) for name in "qk"}
        block |= {f"mlp.{name}_proj": (inner, width) for name in ("gate", "up")} | {"mlp.down_proj": (width, inner)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


# Prompts for the server


def ours(text: str, seed: int, size: int) -> dict[str, Any]:
    prompt = workflow.load("zimage_nano_txt2img")
    for loader, kind in (
        ("ZImageTransformerLoader", "diffusion_models"),
        ("ZImageTextEncoderLoader", "text_encoders"),
        ("ZImageVAELoader", "vae"),
    ):
        prompt[workflow.only(prompt, loader)]["inputs"]["model"] = f"{kind}/{FILE}"
    return _ours(prompt, text, seed, size)


def nano(text: str, seed: int, size: int) -> dict[str, Any]:
    return _ours(workflow.load("zimage_nano_txt2img"), text, seed, size)


def _ours(prompt: dict[str, Any], text: str, seed: int, size: int) -> dict[str, Any]:
    workflow.set_text(prompt, text)
    workflow.set_size(prompt, size, size)
    workflow.set_sampler(prompt, seed=seed, steps=STEPS, guidance_scale=0.0)
    return prompt


def native(text: str, seed: int, size: int) -> dict[str, Any]:
    """The same with ComfyUI's own nodes."""
    sampling: dict[str, Any] = {"seed": seed, "steps": STEPS, "cfg": 1.0, "denoise": 1.0}
    sampling |= {"sampler_name": "euler", "scheduler": "simple", "latent_image": ["latent", 0]}
    sampling |= {name: [name, 0] for name in ("model", "positive", "negative")}
    nodes = {
        "model": ("UNETLoader", {"unet_name": FILE, "weight_dtype": "default"}),
        "clip": ("CLIPLoader", {"clip_name": FILE, "type": "lumina2"}),
        "vae": ("VAELoader", {"vae_name": FILE}),
        "positive": ("CLIPTextEncode", {"clip": ["clip", 0], "text": text}),
        "negative": ("ConditioningZeroOut", {"conditioning": ["positive", 0]}),
        "latent": ("EmptySD3LatentImage", {"width": size, "height": size, "batch_size": 1}),
        "sampler": ("KSampler", sampling),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "native"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


# One server


class Watched(Client):
    """A client that notes when nodes begin."""

    def __init__(self, server: Server):
        self.began: list[tuple[float, str | None]] = []  # (seconds, node; None at the end)
        super().__init__(server)

    def receive(self, timeout: float) -> dict[str, Any] | None:
        event = super().receive(timeout)
        if event is not None and event["type"] == "executing":
            self.began.append((time.monotonic(), event["data"]["node"]))
        return event

    def seconds_of(self, node: str) -> float:
        """Of the last run."""
        for (begin, name), (end, _) in zip(self.began, self.began[1:], strict=False):
            if name == node:
                return end - begin
        return 0.0


def session(make: Any, folder: Path, size: int, words: int, args: list[str]) -> tuple[dict[str, list[float]], int]:
    """Row -> seconds, of a new server; and the most memory that it took, in bytes. words: of each prompt, at least."""
    found: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as user,
        Server(
            provision.newest(),
            packs={"comfyui-zimage": models.ROOT},
            base=folder,
            args=["--user-directory", user, *args],
            environment={"TRANSFORMERS_OFFLINE": "1"},
        ) as server,
        memory.peak_of(server.process.pid) as peak,
        Watched(server) as client,
    ):
        for row, text, seed in QUEUE:
            prompt = make(lengthened(PROMPTS[text], words), seed, size)
            kinds = ("ZImageSampler", "KSampler"), ("ZImageTextEncode", "CLIPTextEncode")
            sampler, encode = ([name for name in prompt if prompt[name]["class_type"] in kind] for kind in kinds)
            client.began.clear()
            started = time.monotonic()
            client.run(prompt, timeout=3600.0)
            found.setdefault(row, []).append(time.monotonic() - started)
            if row != "first image":
                found.setdefault("sampling, 8 steps", []).append(client.seconds_of(sampler[0]))
                found.setdefault(f"text encoder, {row}", []).append(sum(map(client.seconds_of, encode)))
    return found, peak[0]


def lengthened(text: str, words: int) -> str:
    """The text with so many words, or as it is where it has more."""
    missing = max(0, words - len(text.split()))
    return " ".join([text, *(LONG * missing).split()[:missing]])


def servers(a: argparse.Namespace) -> dict[str, str]:
    """Section of the results -> its table; short prompts and long ones, unless told."""
    layers = a.layers or (30 if a.device == "cuda" else 2)
    size = 64 if a.toy else a.size or (1024 if a.device == "cuda" else 256)
    makers = {"ours": nano} if a.toy else {"ours": ours, "native": native}
    wanted = [a.words] if a.words is not None else [0] if a.toy else [0, LONG_WORDS]
    tables = {}
    with tempfile.TemporaryDirectory(prefix="zimage-bench-", dir=a.folder) as folder:
        if not a.toy:
            write_models(Path(folder), layers, 36)
        for words in wanted:
            long = f", prompts of {words} words" if words else ""
            text = (
                f"{size}²{long}, {STEPS} steps, no guidance, {layers} main layers, 2 + 2 refiner blocks, Qwen3-4B and "
                f"the published autoencoder, bf16 files, ComfyUI {provision.NEWEST}'s defaults; seconds, medians over "
                f"{a.rounds} servers of each. Memory is anonymous: pages that files back are not counted.\n\n"
            )
            text += side_by_side(makers, Path(folder), size, words, a)
            tables[f"{'images of long prompts' if words else 'images'}, {a.device}"] = text
    return tables


def side_by_side(makers: dict[str, Any], folder: Path, size: int, words: int, a: argparse.Namespace) -> str:
    times: dict[str, dict[str, list[float]]] = {name: {} for name in makers}
    most = dict.fromkeys(makers, 0)
    for _ in range(a.rounds):
        for name, make in makers.items():
            found, peak = session(make, folder, size, words, a.server_arg)
            most[name] = max(most[name], peak)
            print(f"{name} took {peak / 1e6:,.0f} MB at most", flush=True)
            for row, seconds in found.items():
                times[name].setdefault(row, []).extend(seconds)
            print(name, {row: [round(one, 2) for one in seconds] for row, seconds in found.items()}, flush=True)
    rows = []
    for row in times["ours"]:
        each = {name: times[name][row] for name in makers}
        cells = [f"{statistics.median(seconds):.3g}" for seconds in each.values()]
        compares = "native" in each and min(each["native"]) > 0  # ComfyUI keeps the last prompt's output as well
        rows.append([row, *cells, timing.ratio(each, "ours", "native") if compares else ""])
    rows.append(["peak memory, MB", *(f"{peak / 1e6:,.0f}" for peak in most.values()), ""])
    return timing.table(["", *(f">{name}" for name in makers), ">ours / native (range)"], rows)


# The nano model


def nano_image(repeats: int, device: torch.device) -> str:
    """Prompt to image, 8 steps at 128x128 in float32, ours and diffusers' pipeline on the same snapshot."""
    pipe = ZImagePipeline.from_pretrained(NANO, device=device)
    theirs = importlib.import_module("diffusers").ZImagePipeline.from_pretrained(NANO).to(device)
    theirs.set_progress_bar_config(disable=True)
    rows = []
    for guidance in (0.0, 2.0):
        text = "two red stars on a blue background"

        def run_ours(text: str = text, guidance: float = guidance) -> torch.Tensor:
            return pipe.generate(text, width=128, height=128, guidance_scale=guidance)

        def run_theirs(text: str = text, guidance: float = guidance) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return theirs(
                text,
                negative_prompt="",
                width=128,
                height=128,
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                generator=generator,
                output_type="pt",
            ).images

        off = (run_ours() - run_theirs()).abs().max().item()
        if not off <= 5e-3:
            raise AssertionError(f"the two nano images differ by {off:.2g}")
        times = timing.alternating({"ours": run_ours, "diffusers": run_theirs}, repeats, device)
        medians = [f"{1000 * statistics.median(times[name]):.0f}" for name in times]
        rows.append([f"guidance {guidance:g}", *medians, timing.ratio(times, "ours", "diffusers"), f"{off:.0e}"])
    text = f"Prompt to image, {STEPS} steps at 128x128 in float32, milliseconds, medians of {repeats}.\n\n"
    return text + timing.table(["", ">ours", ">diffusers", ">ours / diffusers (range)", ">images differ by"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, help="main layers; 2 on a CPU, 30 on a GPU unless told")
    parser.add_argument("--size", type=int, help="of the images; 256 on a CPU, 1024 on a GPU unless told")
    parser.add_argument("--words", type=int, help="only the servers, with prompts of so many; else short and long ones")
    parser.add_argument("--rounds", type=int, default=2, help="servers of each")
    parser.add_argument("--repeats", type=int, default=15, help="of the nano image")
    parser.add_argument("--nano", action="store_true", help="only the nano image")
    parser.add_argument("--folder", type=Path, help="where the files are written for a while")
    parser.add_argument("--server-arg", action="append", default=[], help="for ComfyUI's command line; repeatable")
    parser.add_argument("--toy", action="store_true", help="quick and not written down: does the script work?")
    arguments = parser.parse_args()
    texts = {}
    if arguments.words is None:
        with torch.inference_mode():
            texts[f"nano, {arguments.device}"] = nano_image(arguments.repeats, torch.device(arguments.device))
        print(texts[f"nano, {arguments.device}"], flush=True)
    if not arguments.nano:
        through = servers(arguments)
        print("\n\n".join(through.values()))
        texts |= through
    if not arguments.toy:
        for section, content in texts.items():
            results.write(section, "images", content)
