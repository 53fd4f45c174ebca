"""How long a shell waits for the nano image: from the start of Python to the saved file, ours and diffusers'.

    python -m benchmarks.starting

Nearly all of it is importing, so that is measured alone as well, beside torch's own. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import models, results, timing

PROMPT, STEPS = "two red stars on a blue background", 8
NANO = models.ROOT / "nano" / "snapshot"
DIFFUSERS = f"""
import sys, torch
from diffusers import ZImagePipeline
pipe = ZImagePipeline.from_pretrained({str(NANO)!r}).to(sys.argv[2])
generator = torch.Generator().manual_seed(1)
settings = dict(width=128, height=128, num_inference_steps={STEPS}, guidance_scale=0.0, generator=generator)
pipe({PROMPT!r}, **settings).images[0].save(sys.argv[1])
"""


def commands(folder: Path, device: str) -> dict[str, dict[str, list[str]]]:
    """Row of the table -> implementation -> what Python is to run."""
    ours = ["-m", "zimage_core", "generate", PROMPT, "-s", str(STEPS), "--seed", "1", "-o", str(folder / "ours.png")]
    ours += ["--cpu"] if device == "cpu" else []
    return {
        "import": {
            "ours": ["-c", "import zimage_core.pipeline"],
            "diffusers": ["-c", "from diffusers import ZImagePipeline"],
            "torch alone": ["-c", "import torch"],
        },
        "nano image": {"ours": ours, "diffusers": ["-c", DIFFUSERS, str(folder / "theirs.png"), device]},
    }


def run(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=models.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:100]} failed:\n{done.stderr[-3000:]}")


def main(a: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = commands(Path(folder), a.device)
        for row in list(chosen)[1:] if a.toy else chosen:
            calls = {name: lambda command=command: run(command) for name, command in chosen[row].items()}
            if not a.toy:
                for call in calls.values():
                    call()
            times = timing.alternating(calls, a.repeats, torch.device("cpu"))
            cells = [f"{statistics.median(times[name]):.2f}" if name in times else "" for name in COLUMNS]
            rows.append([row, *cells, timing.ratio(times, "ours", "diffusers")])
            print("|", " | ".join(rows[-1]), "|", flush=True)
        ours, theirs = (np.asarray(Image.open(Path(folder) / f"{name}.png"), int) for name in ("ours", "theirs"))
        if (off := abs(ours - theirs).max()) > 2:
            raise AssertionError(f"the two nano images differ by {off} of 255")
    text = f"Seconds from the start of Python to its end, medians of {a.repeats}; the image has {STEPS} steps.\n\n"
    text += timing.table(["", *(f">{name}" for name in COLUMNS), ">ours / diffusers (range)"], rows)
    print(text)
    if not a.toy:
        results.write(f"starting, {a.device}", "starting", text)


COLUMNS = ["ours", "diffusers", "torch alone"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="the image only, not written down: does the script work?")
    main(parser.parse_args())
