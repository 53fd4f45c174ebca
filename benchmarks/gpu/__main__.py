"""Is the pack right on a GPU, and how fast? One command for a machine with Python, PyTorch with CUDA and no network.

    make gpu-kit                                  # before, where there are package registries: build/gpu-kit/
    python -m benchmarks.gpu --out FOLDER         # there: planned to fit 9 minutes on an H100
    python -m benchmarks.gpu --record FOLDER      # afterwards: the tables of FOLDER into RESULTS.md
    python -m benchmarks.gpu --toy --device cpu   # tiny: does the command work?

Each phase runs in a process of its own and is saved as it goes (FOLDER/results.json): a run that is cut short, or a
phase that fails, loses what was not measured yet and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import kit
from .report import FILE, Report, load, printed, record

ROOT = Path(__file__).resolve().parents[2]
# phase -> (module, its settings), in the order in which they run: what is most wanted comes first
PHASES: dict[str, tuple[str, dict[str, Any]]] = {
    "machine": ("machine", {}),
    "nano": ("nano", {}),
    "step": ("steps", {}),
    "host": ("host", {"dynamic": False}),
    "host, dynamic": ("host", {"dynamic": True}),
    "autoencoder and encoder": ("parts", {}),
    "exact": ("exact", {}),
    "control": ("control", {}),
    "several GPUs": ("team", {}),
    "host, crowded": ("host", {"dynamic": False, "crowded": True}),
    "host, dynamic, crowded": ("host", {"dynamic": True, "crowded": True}),
}
LIMIT = 240  # seconds of one phase, after which it is ended


def main(a: argparse.Namespace) -> int:
    if a.record:
        record(a.record)
        return 0
    kit.unpack_if_needed()
    phases = a.phases or [name for name in PHASES if not (a.toy and "," in name)]
    with tempfile.TemporaryDirectory() as nowhere:
        out = a.out or Path(nowhere)
        out.mkdir(parents=True, exist_ok=True)
        failed = []
        for name in phases:
            started = time.monotonic()
            here = a.toy and PHASES[name][0] != "host"  # which sets where ComfyUI looks for models
            shared = Path(nowhere) / "comfyui"
            succeeded = run(name, a.device, a.toy, out, shared) if here else run_apart(name, a, out, shared)
            print(f"== {name}: {'done' if succeeded else 'FAILED'} in {time.monotonic() - started:.0f} s", flush=True)
            failed += [] if succeeded else [name]
        print(f"\n{printed(load(out))}")
    print(f"failed: {', '.join(failed)}" if failed else "every phase passed")
    return 1 if failed else 0


def run_apart(name: str, a: argparse.Namespace, out: Path, shared: Path) -> bool:
    """A phase in a process of its own, whose memory goes with it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--here", name, "--device", a.device, "--out", str(out)]
    command += ["--shared", str(shared), *(["--toy"] if a.toy else [])]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if PHASES[name][0] == "host":  # ComfyUI's own default
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=a.limit).returncode == 0
    except subprocess.TimeoutExpired:
        with Report(out, name) as report:
            report.remark(f"ended after {a.limit} s")
        return False


def run(name: str, device: str, toy: bool, out: Path, shared: Path) -> bool:
    """A phase in this process. What fails is told in its part of the results. shared: see `host.run`."""
    module, settings = PHASES[name]
    if module == "host":
        settings = {**settings, "base": shared}
    with Report(out, name) as report:
        if settings.get("dynamic"):  # before torch, as ComfyUI does
            importlib.import_module("comfy_aimdo.control").init()
        phase = importlib.import_module(f"benchmarks.gpu.{module}")
        torch = importlib.import_module("torch")
        torch.set_grad_enabled(False)
        phase.run(report, torch.device(device), toy, **settings)
    return not report.failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results are saved")
    parser.add_argument("--phases", type=lambda text: [name.strip() for name in text.split(";")], metavar="A;B")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"seconds of a phase at most ({LIMIT})")
    parser.add_argument("--toy", action="store_true", help="tiny: does the command work?")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write the tables of a run into RESULTS.md")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--shared", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.phases or ()) - set(PHASES):
        parser.error(f"there is no phase {'; '.join(sorted(unknown))}; there are {'; '.join(PHASES)}")
    if arguments.record and not (arguments.record / FILE).is_file():
        parser.error(f"there is no {FILE} in {arguments.record}")
    if arguments.here:
        kit.unpack_if_needed()
        sys.exit(0 if run(arguments.here, arguments.device, arguments.toy, arguments.out, arguments.shared) else 1)
    sys.exit(main(arguments))
