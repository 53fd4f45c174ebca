"""Our loader and sampler nodes beside ComfyUI's own, 8 steps, with its static and its dynamic memory, and crowded."""

from __future__ import annotations

import importlib
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import loading, memory, models
from .report import Report

FILE = "bench.safetensors"  # written by the first of these phases, for all of them
STEPS = 8
SIZE = 1024
LEFT = 9  # GiB that a crowded device has left
RUNS = {False: 5, True: 3}  # images after the first, by whether the device is crowded; 24 steps or more


@torch.inference_mode()
def run(report: Report, device: torch.device, toy: bool, base: Path, dynamic: bool, crowded: bool = False) -> None:
    """base: ComfyUI's base directory, which is kept for the runs that follow."""
    logging.basicConfig(level=logging.WARNING)
    with _holder(crowded) as hold:
        config = models.geometry(1 if toy else 30)  # ComfyUI knows Z-Image by its width
        _write_once(report, base / "models" / "diffusion_models" / FILE, config)
        pack = models.pack(cpu=device.type == "cpu", base_directory=str(base), disable_dynamic_vram=not dynamic)
        if dynamic:
            _dynamic_memory()
        if crowded:
            report.remark(f"another process holds {hold() / 2**30:.0f} GiB; {LEFT} are left")
        mm = importlib.import_module("comfy.model_management")
        patcher = importlib.import_module("comfy.model_patcher").CoreModelPatcher.__name__
        report.remark(f"{mm.vram_state}, ComfyUI's patcher is {patcher}")
        latent = {"samples": torch.zeros(1, 16, *[8 if toy else SIZE // 8] * 2)}
        generator = torch.Generator().manual_seed(0)
        prompt = [[torch.randn(1, 40, config.cap_feat_dim, generator=generator), {}]]
        times: dict[str, dict[str, list[float]]] = {}
        peaks: dict[str, int] = {}
        images = {}
        users = _users(pack, prompt, latent, 1 if toy else STEPS)
        if not toy:
            warm = _users(pack, prompt, latent, 1)["ours"]
            _use(warm, device, 0)  # what is paid once, such as loading kernels, is nobody's
            mm.unload_all_models()
        for name, use in users.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[name], images[name] = _use(use, device, 1 if toy else RUNS[crowded])
            peaks[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            mm.unload_all_models()
            mm.soft_empty_cache()
        columns = ["", ">load node", ">first 8 steps", ">further 8 steps", ">range", ">MB of torch", ">RAM, MB"]
        report.table("seconds", columns)
        for name, each in times.items():
            further = each["further"]
            cells = [f"{statistics.median(each['load']):.2f}", f"{statistics.median(each['first']):.2f}"]
            cells += [f"{statistics.median(further):.3f}", f"{min(further):.3f}–{max(further):.3f}"]
            report.row("seconds", name, *cells, f"{peaks[name] / 1e6:,.0f}", f"{memory.anonymous() / 1e6:,.0f}")
        ours, stock = (images[name].float() for name in ("ours", "stock"))
        off = ((ours - stock).norm() / stock.norm()).item()
        report.remark(f"latents of the two differ by {off:.1e} (their noise levels are not the same to the last digit)")


Use = tuple[Callable[[], Any], Callable[[Any, int], torch.Tensor]]  # (load, (model, seed) -> latents)


def _users(pack: Any, prompt: Any, latent: dict[str, Any], steps: int) -> dict[str, Use]:
    nodes = importlib.import_module("nodes")

    def load_ours() -> Any:
        return pack.loaders.ZImageTransformerLoader.execute(FILE, "default").args[0]

    def sample_ours(model: Any, seed: int) -> torch.Tensor:
        settings = (prompt, latent, seed, steps, 0.0, 0.0, 1.0, 1.0)
        return pack.sampling.ZImageSampler.execute(model, *settings).args[0]["samples"]

    def load_stock() -> Any:
        return nodes.UNETLoader().load_unet(FILE, "default")[0]

    def sample_stock(model: Any, seed: int) -> torch.Tensor:
        arguments = (model, seed, steps, 1.0, "euler", "simple", prompt, prompt, latent)
        return nodes.KSampler().sample(*arguments)[0]["samples"]

    return {"ours": (load_ours, sample_ours), "stock": (load_stock, sample_stock)}


def _use(use: Use, device: torch.device, runs: int) -> tuple[dict[str, list[float]], torch.Tensor]:
    load, sample = use
    taken, model = _seconds(load, device)
    found = {"load": [taken]}
    taken, image = _seconds(lambda: sample(model, 1), device)
    found["first"] = [taken]
    further = [_seconds(lambda seed=seed: sample(model, seed), device)[0] for seed in range(2, 2 + runs)]
    return {**found, "further": further}, image


def _seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    memory.synchronize(device)
    started = time.perf_counter()
    result = call()
    memory.synchronize(device)
    return time.perf_counter() - started, result


def _write_once(report: Report, file: Path, config: Any) -> None:
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial, started = file.with_suffix(".partial"), time.monotonic()
    loading.write_file(partial, loading.shapes_of(config), "BF16", {"format": "pt"})
    partial.replace(file)
    size = file.stat().st_size / 1e9
    report.remark(f"a file of {size:.1f} GB, written in {time.monotonic() - started:.0f} s")


@contextmanager
def _holder(crowded: bool) -> Iterator[Callable[[], int]]:
    """Starts another process that takes all but LEFT of the device; the call waits until it has, and tells how much."""
    if not crowded:
        yield lambda: 0
        return
    free, _total = torch.cuda.mem_get_info()
    size = free - LEFT * 2**30
    script = f"import sys, torch; x = torch.empty({size}, dtype=torch.uint8, device='cuda'); print('held', flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{script}; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def hold() -> int:
        if b"held" not in holder.stdout.readline():
            raise RuntimeError(f"another process could not take {size / 2**30:.0f} GiB of the device")
        return size

    try:
        yield hold
    finally:
        holder.kill()
        holder.wait()


def _dynamic_memory() -> None:
    """What ComfyUI's main.py does where it finds its library for it."""
    control, mm = importlib.import_module("comfy_aimdo.control"), importlib.import_module("comfy.model_management")
    if not control.init_devices((device.index, 0) for device in mm.get_all_torch_devices()):
        raise RuntimeError("comfy-aimdo does not work on this machine")
    control.set_log_warning()
    patcher = importlib.import_module("comfy.model_patcher")
    patcher.CoreModelPatcher = patcher.ModelPatcherDynamic
    importlib.import_module("comfy.memory_management").aimdo_enabled = True
