"""What torch.compile costs: the first step after a start, without and with torch's cache on disk, and other shapes.

    python -m benchmarks.compiling
    python -m benchmarks.compiling --device cuda    # all 30 layers

Each start is a process of its own. A step here is a prompt refined and one call of the transformer, which is all that
an image compiles; what compiling takes is the first such step less the shortest of those that follow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch

from . import models, results, timing
from .step import DTYPES, Case, inputs

CASES = [Case(512, 40), Case(512, 400), Case(768, 40), Case(512, 40, guided=True)]
TOY_CASES = [Case(64, 10), Case(64, 40)]
STARTS = ["no cache", "with the cache"]


@torch.inference_mode()
def measure_here(a: argparse.Namespace) -> list[list[float]]:
    """Seconds of each case's steps, in this process."""
    device, dtype = torch.device(a.device), DTYPES[a.dtype]
    model = models.core(models.geometry(a.layers, a.toy), device, dtype)
    model.compiled = True
    found = []
    for case in TOY_CASES if a.toy else CASES:
        given = inputs(case, model.config, device, dtype)

        def step(given=given):
            model(given.latents, given.t, model.refine_captions(given.cap_feats, dtype))

        found.append([timing.seconds(step, device) for _ in range(1 + a.repeats)])
    return found


def measure(cache: str | None) -> list[list[float]]:
    """The same in a process of its own, which keeps what it compiles in this folder; None: where torch keeps it."""
    environment = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})
    command = [sys.executable, "-m", "benchmarks.compiling", *sys.argv[1:], "--here"]
    done = subprocess.run(command, cwd=models.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(a: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for start in STARTS[1:] if a.toy else STARTS:
            found = measure(None if a.toy else folder)
            for case, (first, *others) in zip(TOY_CASES if a.toy else CASES, found, strict=True):
                rows.append(
                    [start, str(case), *(f"{value:.2f}" for value in (first, min(others), first - min(others)))]
                )
                print("|", " | ".join(rows[-1]), "|", flush=True)
    text = f"{models.blocks(models.geometry(a.layers, a.toy))}, {a.dtype}, cases in this order; seconds.\n\n"
    text += timing.table(["start", "image", ">first step", ">following", ">compiling"], rows)
    print(text)
    if not a.toy:
        results.write(f"compiling, {a.device}", "compiling", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, help="main layers; 2 on a CPU, 30 on a GPU unless told")
    parser.add_argument("--repeats", type=int, default=3, help="following steps, at least 1")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--toy", action="store_true", help="tiny, with torch's own cache, not written down")
    parser.add_argument("--here", action="store_true", help="one start, in this process")
    a = parser.parse_args()
    a.layers = a.layers or (1 if a.toy else 30 if a.device == "cuda" else 2)
    if a.here:
        print(json.dumps(measure_here(a)))
    else:
        main(a)
