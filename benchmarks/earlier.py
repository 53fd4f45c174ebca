"""One step of the core beside that of an earlier commit: same weights, same process, in turn; are the bits the same?

    python -m benchmarks.earlier 2d76a85                     # into RESULTS.md
    python -m benchmarks.earlier 2d76a85 --toy --threads 1   # tiny and not written down: does the script work?

On a busy machine processor time tells more than the clock, so that is measured; with one thread they are the same.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import models, results, step, timing

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(a: argparse.Namespace) -> str:
    torch.set_num_threads(a.threads)
    case, dtype = step.Case(64 if a.toy else a.size, 10 if a.toy else 40), DTYPES[a.dtype]
    config = models.geometry(1, a.toy)
    now = models.core(config, torch.device("cpu"), dtype)
    given = step.inputs(case, config, torch.device("cpu"), dtype)
    with _transformer_of(a.commit) as earlier:
        before = earlier(now)
        seconds: dict[str, list[float]] = {"before": [], "now": []}
        out = {}
        with torch.inference_mode():
            for repeat in range(1 + a.repeats):  # the first warms up
                for name, model in {"before": before, "now": now}.items():
                    started = time.process_time()
                    out[name] = model(given.latents, given.t, given.cap_feats)
                    if repeat:
                        seconds[name].append(time.process_time() - started)
    medians = [f"{statistics.median(times):.3g}" for times in seconds.values()]
    same = "yes" if torch.equal(out["before"], out["now"]) else "no"
    row = [str(case), a.dtype, *medians, timing.ratio(seconds, "now", "before"), same]
    note = f"{models.blocks(config)}; seconds of processor time with {a.threads} threads, medians of {a.repeats}."
    columns = ["image", "dtype", f">{a.commit}", ">now", ">now / before", "same bits"]
    return f"{note}\n\n{timing.table(columns, [row])}"


@contextmanager
def _transformer_of(commit: str) -> Iterator[Any]:
    """A function that makes that commit's transformer with a model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", place, commit], cwd=ROOT, check=True)
        try:
            _as_package("earlier_core", place / "zimage_core")

            def make(now: Any) -> Any:
                config = _of("config").TransformerConfig
                numbers = {name: getattr(now.config, name) for name in now.config.__dataclass_fields__}
                missing = {"axes_lens": (1536, 512, 512)} if "axes_lens" in config.__dataclass_fields__ else {}
                with torch.device("meta"):
                    model = _of("model.transformer", "transformer").ZImageTransformer(config(**missing, **numbers))
                model.load_state_dict(now.state_dict(), strict=True, assign=True)
                return model.requires_grad_(False).eval()

            yield make
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


def _as_package(name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def _of(*names: str) -> Any:
    """Its first module of these names: files have moved."""
    name = next(n for n in names if importlib.util.find_spec(f"earlier_core.{n.split('.')[0]}") is not None)
    return importlib.import_module(f"earlier_core.{name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--size", type=int, default=384, help="pixels of a side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="tiny and not written down: does the script work?")
    arguments = parser.parse_args()
    table = main(arguments)
    print(table)
    if not arguments.toy:
        results.write(f"earlier, {arguments.dtype}", "earlier", table)
