"""How long the transformer takes to be ready, and how much memory that takes: ours, ComfyUI's loader and diffusers.

    python -m benchmarks.loading --layers 15           # half of the layers, so that diffusers' loader fits into 24 GB
    python -m benchmarks.loading --without diffusers   # the published geometry; writes 25 GB into a temporary folder
    python -m benchmarks.loading --layers 15 --pinned  # with the copies that ComfyUI's dynamic memory pins on top

Each load runs in a process of its own, alternating, with the files in the page cache. "Ready" is when the call returns;
where weights are mapped, nothing of them has been read by then. Memory is the growth of the process's anonymous pages.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nano.export import TRANSFORMER_NAMES, renamed
from zimage_core.config import TransformerConfig
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.weights.snapshot import open_component
from zimage_core.weights.specs import PUBLISHED_TRANSFORMER

from . import results

ROOT = Path(__file__).resolve().parents[1]
TOY = {"dim": 256, "n_heads": 2, "cap_feat_dim": 64}  # for the test of this script
FULL = {"dim": 3840, "n_heads": 30, "cap_feat_dim": 2560}
BYTES = {"BF16": 2, "F32": 4}
CACHED = "our nodes, cache converted weights"


# Files with random weights


def geometry(layers: int, toy: bool) -> TransformerConfig:
    numbers: dict[str, Any] = {**PUBLISHED_TRANSFORMER, **(TOY if toy else FULL)}
    return TransformerConfig(**numbers, n_layers=layers, n_refiner_layers=2, in_channels=16, patch_size=2)


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, metadata: dict[str, str]) -> None:
    """A safetensors file, tensor by tensor: the same 64 MB of random numbers over and over."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02
    block = memoryview(numbers.numpy()) if dtype == "F32" else memoryview(numbers.bfloat16().view(torch.int16).numpy())
    raw = block.cast("B")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = math.prod(shape) * BYTES[dtype]
            while left:
                left -= file.write(raw[: min(left, len(raw))])


def published_names(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """diffusers' names of our parameters; a fused q, k, v becomes three."""
    found = {}
    for name, shape in shapes.items():
        if name.endswith("attention.qkv.weight"):
            for letter in "qkv":
                found[name.replace("qkv", f"to_{letter}")] = (shape[0] // 3, shape[1])
        else:
            found[renamed(name, TRANSFORMER_NAMES)] = shape
    return found


def config_json(config: TransformerConfig) -> dict[str, Any]:
    numbers = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "patch_size"}
    numbers = {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()}
    fixed = {"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "all_f_patch_size": [1], "qk_norm": True}
    return {**numbers, **fixed, "n_kv_heads": config.n_heads}


def shapes_of(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in ZImageTransformer(config, device="meta").state_dict().items()}


def write_folder(folder: Path, config: TransformerConfig) -> None:
    """A snapshot's transformer/ in float32, three shards and their index."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    (transformer / "config.json").write_text(json.dumps(config_json(config)))
    shapes = published_names(shapes_of(config))
    names = list(shapes)
    index = {}
    for number in range(3):
        shard = f"diffusion_pytorch_model-0000{number + 1}-of-00003.safetensors"
        part = names[len(names) * number // 3 : len(names) * (number + 1) // 3]
        write_file(transformer / shard, {name: shapes[name] for name in part}, "F32", {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": False}
    scheduler |= {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


# Loaders, each called in a fresh process


def core(path: Path) -> Any:
    return open_component(path, "transformer").build(dtype=torch.bfloat16)


def our_nodes(path: Path) -> Any:
    return _pack().bridge.model.load_model(path, torch.bfloat16)


def our_nodes_cached(path: Path) -> Any:
    pack = _pack()
    importlib.import_module("folder_paths").set_user_directory(str(path.parent / "user"))
    return pack.bridge.model.load_model(path, torch.bfloat16, cache_converted=True)


def comfyui(path: Path) -> Any:
    return importlib.import_module("comfy.sd").load_diffusion_model(str(path), {"dtype": torch.bfloat16})


def diffusers(path: Path) -> Any:
    model = importlib.import_module("diffusers").ZImageTransformer2DModel
    if path.is_file():
        return model.from_single_file(
            str(path), config=str(path.parent), subfolder="transformer", torch_dtype=torch.bfloat16
        )
    return model.from_pretrained(path / "transformer", torch_dtype=torch.bfloat16)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "core": core,
    "our nodes": our_nodes,
    CACHED: our_nodes_cached,
    "ComfyUI": comfyui,
    "diffusers": diffusers,
}
ON_HOST = ("our nodes", CACHED, "ComfyUI")


def _pack() -> Any:
    sys.path.append(str(ROOT / "tests" / "nodes"))
    return importlib.import_module("inside").load_pack()


def measure_here(loader: str, path: Path, pinned: bool = False) -> dict[str, float]:
    """Seconds until ready and bytes of anonymous memory at its peak, imports apart.

    pinned: the peak includes a copy of each weight, as ComfyUI's dynamic memory pins one.
    """
    if loader in ON_HOST:
        _pack()
    elif loader == "diffusers":
        getattr(importlib.import_module("diffusers"), "ZImageTransformer2DModel")  # noqa: B009 imported lazily
    with _anonymous_peak() as peak:
        started = time.perf_counter()
        model = LOADERS[loader](path)
        seconds = time.perf_counter() - started
        copies = [weight.clone() for weight in model.model.parameters()] if pinned else []
    assert len(copies) or not pinned
    assert model is not None
    return {"seconds": seconds, "bytes": peak[0]}


@contextmanager
def _anonymous_peak() -> Iterator[list[int]]:
    """How much the process's anonymous memory grew at most, looked at every two milliseconds."""
    before, peak, over = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], _anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak[0] = max(peak[0], _anonymous() - before)


def _anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measure(loader: str, path: Path, pinned: bool = False) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loading", "--measure", loader, str(path)]
    command += ["--pinned"] if pinned else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{loader} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# The run


def main(layers: int, repeats: int, toy: bool, folder: Path | None, without: list[str]) -> str:
    config = geometry(layers, toy)
    shapes = shapes_of(config)
    count = sum(math.prod(shape) for shape in shapes.values())
    largest = max(math.prod(shape) for shape in shapes.values())
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        single = Path(temporary) / "single" / "model.safetensors"
        (single.parent / "transformer").mkdir(parents=True)
        (single.parent / "transformer" / "config.json").write_text(json.dumps(config_json(config)))
        print(f"writing {2 * count / 1e9:.1f} GB", flush=True)
        write_file(single, shapes, "BF16", {"format": "pt"})
        # ComfyUI's own loader knows the published width only
        left_out = {*without, CACHED} | ({"ComfyUI"} if toy else set())
        rows += _rows("bf16 file", single, [name for name in LOADERS if name not in left_out], repeats, toy)
        shutil.rmtree(single.parent)
        snapshot = Path(temporary) / "snapshot"
        print(f"writing {4 * count / 1e9:.1f} GB", flush=True)
        write_folder(snapshot, config)
        (snapshot / "vae").mkdir()
        shutil.copy(ROOT / "nano" / "snapshot" / "vae" / "config.json", snapshot / "vae")
        left_out = {*without, CACHED, "ComfyUI"} | ({"core", "our nodes"} if toy else set())
        rows += _rows("fp32 folder to bf16", snapshot, [name for name in LOADERS if name not in left_out], repeats, toy)
    note = (
        f"{count / 1e9:.2f} G parameters ({layers} of 30 layers), {2 * count / 1e9:.2f} GB in bf16; the largest tensor "
        f"has {4 * largest / 1e6:.0f} MB in float32. Medians of {repeats}, processes alternating; ComfyUI's own loader "
        "reads single files only."
    )
    head = ["| file | loader | seconds to ready | peak anonymous memory |", "|---|---|---:|---:|"]
    return "\n".join([note, "", *head, *rows])


def pinned_copies(layers: int, repeats: int, folder: Path | None) -> str:
    """Our nodes on weights that have to be cast and fused."""
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        snapshot = Path(temporary) / "snapshot"
        write_folder(snapshot, geometry(layers, toy=False))
        (snapshot / "vae").mkdir()
        shutil.copy(ROOT / "nano" / "snapshot" / "vae" / "config.json", snapshot / "vae")
        for loader in ("our nodes", CACHED):
            measure(loader, snapshot)  # which writes what is kept
            runs = [measure(loader, snapshot, pinned=True) for _ in range(repeats)]
            seconds, size = (statistics.median(run[key] for run in runs) for key in ("seconds", "bytes"))
            rows.append(f"| fp32 folder to bf16 | {loader} | {seconds:.2f} | {size / 1e6:,.0f} MB |")
    note = f"{layers} of 30 layers, medians of {repeats}; a copy of each weight on top, as dynamic memory pins one."
    head = ["| file | loader | seconds to ready | peak anonymous memory with copies |", "|---|---|---:|---:|"]
    return "\n".join([note, "", *head, *rows])


def _rows(what: str, path: Path, loaders: list[str], repeats: int, toy: bool) -> list[str]:
    found: dict[str, list[dict[str, float]]] = {loader: [] for loader in loaders}
    if repeats > 1:  # a single one is a look at whether it works
        measure(loaders[0], path)  # fills the page cache
    for _ in range(repeats):
        for loader in loaders:
            # at toy size imports take longest, and all but one loader share this process's
            measured = measure_here(loader, path) if toy and loader != "core" else measure(loader, path)
            found[loader].append(measured)
            print(what, loader, found[loader][-1], flush=True)
    rows = []
    for loader, runs in found.items():
        seconds, size = (statistics.median(run[key] for run in runs) for key in ("seconds", "bytes"))
        rows.append(f"| {what} | {loader} | {seconds:.2f} | {size / 1e6:,.0f} MB |")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="tiny and not written down: does the script work?")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--without", action="append", default=[], choices=list(LOADERS), help="leave this loader out")
    parser.add_argument("--pinned", action="store_true", help="our nodes with a copy of each weight on top")
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "PATH"), help="one load in this process")
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure_here(a.measure[0], Path(a.measure[1]), a.pinned)))
    elif a.pinned:
        results.write("loading, pinned", "loading", pinned_copies(a.layers, a.repeats, a.folder))
    else:
        table = main(a.layers, a.repeats, a.toy, a.folder, a.without)
        print(table)
        if not a.toy:
            section = "loading" if a.layers == 30 else "loading, fewer layers"
            results.write(section, "loading", table)
