"""One image over the GPUs of this machine: a step of the full transformer by 1, 2, 3, ... of them, and its error.

Where there is one GPU, nothing is measured and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from zimage_core.parallel.team import Team

from .. import models, step, timing
from .report import Report

CASES = [step.Case(1024, 40), step.Case(1024, 40, guided=True), step.Case(2048, 40)]
REPEATS = 10
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 90  # seconds of one team


def run(report: Report, device: torch.device, toy: bool) -> None:
    gpus = 2 if device.type == "cpu" else torch.cuda.device_count()
    report.table("milliseconds", ["image", ">processes", ">median", ">to one", ">differs from one, relative"])
    if gpus == 1:
        report.remark("1 GPU: several were not measured")
        return
    heads = models.geometry(1, toy).n_heads
    sizes = [n for n in range(2, gpus + 1) if heads % n == 0 or n % 2 == 0 and heads % (n // 2) == 0]
    alone: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in [1, *sizes]:
            found = started(size, device, toy, Path(folder))
            alone = alone or found
            for case, numbers in found.items():
                ratio = numbers["median"] / alone[case]["median"]
                off = f"{numbers['off']:.1e}" if size > 1 else ""
                report.row("milliseconds", case, size, f"{1000 * numbers['median']:.1f}", f"{ratio:.2f}", off)


def started(size: int, device: torch.device, toy: bool, folder: Path) -> dict[str, dict[str, float]]:
    """Case -> median seconds and distance to one process, by so many processes of torchrun."""
    own = ["--device", device.type, "--out", str(folder), *(["--toy"] if toy else [])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([*command, "-m", "benchmarks.gpu.team", *own], cwd=ROOT, env=environment, check=True, timeout=LIMIT)
    found: dict[str, dict[str, float]] = json.loads((folder / f"{size}.json").read_text())
    return found


@torch.inference_mode()
def member(device: str, toy: bool, folder: Path) -> None:
    """One process of a team: the same steps as all, of which the first writes down what it found."""
    team = Team.of_environment(cpu=device == "cpu")
    where = torch.device(device) if team is None else team.device
    config = models.geometry(2 if toy else 30, toy)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ours = models.core(config, where, dtype)
    found = {}
    for case in step.TOY_CASES if toy else CASES:
        given = step.inputs(case, config, where, dtype)
        try:
            model = ours if team is None else team.model(ours, case.guided)
        except ValueError:
            continue  # so many can share this case with guidance only, or without
        own = given.cap_feats if team is None else model.refined(list, given.cap_feats)
        call = partial(model, given.latents, given.t, own)
        out = call()  # which warms up, too
        place = folder / f"{case}.pt"
        if team is None:
            torch.save(out.cpu(), place)
        reference = torch.load(place, weights_only=True).double()
        off = ((out.cpu().double() - reference).norm() / reference.norm()).item()
        times = timing.alternating({"step": call}, 1 if toy else REPEATS, where)["step"]
        found[str(case)] = {"median": statistics.median(times), "off": off}
    if team is None or team.leads:
        (folder / f"{1 if team is None else team.size}.json").write_text(json.dumps(found))
    if team is not None:
        team.leave()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    member(arguments.device, arguments.toy, arguments.out)
