"""The referee: every benchmark of speed in turn, each in a process of its own; RESULTS.md gets what they found.
At toy size, where imports take longest, all of them share this one.

    python -m benchmarks                     # an hour or more on a CPU; `benchmarks.gpu` is for a GPU
    python -m benchmarks step vae --toy      # only these, tiny, nothing written: do they work?

What a part can do besides is told by `python -m benchmarks.PART --help`.
"""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("step", "control", "compiling", "text", "vae", "starting", "batch", "images")


def succeeds(part: str, settings: list[str], here: bool) -> bool:
    """Runs a part, in this process or one of its own."""
    command = [sys.executable, "-m", f"benchmarks.{part}", *settings]
    print("$", *command[1:], flush=True)
    if not here:
        return subprocess.run(command, cwd=ROOT).returncode == 0
    sys.argv[1:] = settings
    try:
        runpy.run_module(f"benchmarks.{part}", run_name="__main__", alter_sys=True)
        return True
    except Exception:
        traceback.print_exc()
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--toy", action="store_true")
    a = parser.parse_args()
    if unknown := set(a.parts) - set(PARTS):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    settings = ["--toy", "--repeats", "1"] if a.toy else []
    failed = [part for part in a.parts or PARTS if not succeeds(part, settings, here=a.toy)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
