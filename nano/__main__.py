"""Makes the nano model from nothing: tokenizer, autoencoder, text encoder, latents, transformer, snapshot, scores.

    python -m nano            # about an hour and a half on two CPU cores; on a GPU when there is one
    python -m nano --scale 4  # four times as long in every training

Each part is kept in the runs folder and skipped when it is there; a training that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from . import evaluate, make_tokenizer

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
MINUTES = {"vae": 13.0, "text": 3.0, "transformer": 75.0}  # on two cores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nano", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "nano" / "runs", help="where the parts are kept")
    parser.add_argument("--out", type=Path, default=evaluate.SNAPSHOT, help="the snapshot folder to write")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the training times")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runs, seed = arguments.runs.resolve(), str(arguments.seed)
    runs.mkdir(parents=True, exist_ok=True)
    minutes = {name: str(value * arguments.scale) for name, value in MINUTES.items()}
    # one process and thread per core, see optim.Ranks; a GPU takes one process
    ranks = 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)

    if not (runs / "tokenizer" / "tokenizer_config.json").exists():  # the file written last
        logger.info("tokenizer: %d tokens", make_tokenizer.make(runs / "tokenizer"))
    if not (runs / "vae.pt").exists():
        _run("train_vae", "--minutes", minutes["vae"], "--out", str(runs / "vae.pt"), "--seed", seed, ranks=ranks)
    if not (runs / "text.pt").exists():
        tokenizer = str(runs / "tokenizer")
        _run("train_text", "--minutes", minutes["text"], "--tokenizer", tokenizer, "--out", str(runs / "text.pt"))
    parts = [["--part", str(part), "--parts", str(ranks)] for part in range(ranks)]
    common = ["--vae", str(runs / "vae.pt"), "--out", str(runs / "latents"), "--seed", seed]
    _run_together([_command("latents", *common, *part) for part in parts])
    if not (runs / "model.sizes.pt").exists():
        _run("train", "--minutes", minutes["transformer"], "--runs", str(runs), "--seed", seed, ranks=ranks)
    _run("export", "--runs", str(runs), "--model", "model.sizes.pt", "--out", str(arguments.out.resolve()))
    written = arguments.out.resolve() == evaluate.SNAPSHOT.resolve()
    _run("evaluate", "--snapshot", str(arguments.out.resolve()), *([] if written else ["--dry"]))


def _command(module: str, *arguments: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", f"nano.{module}", *arguments]


def _run(module: str, *arguments: str, ranks: int = 1) -> None:
    _run_together([_command(module, *arguments, ranks=ranks)])


def _run_together(commands: list[list[str]]) -> None:
    """Runs commands at the same time and waits for all; raises if one failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(1 if len(commands) > 1 else torch.get_num_threads())}
    started = [subprocess.Popen(command, cwd=ROOT, env=environment) for command in commands]
    codes = [process.wait() for process in started]
    for command, code in zip(commands, codes, strict=True):
        if code:
            raise RuntimeError(
                f"{' '.join(command)} failed with exit code {code}; its output is above. Run again to go on"
            )


if __name__ == "__main__":
    main()
