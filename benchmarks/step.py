"""One step of the transformer: ours, diffusers' and ComfyUI's own, on the same weights, alternating in one process.

    python -m benchmarks.step                  # 4 main layers, the sizes of a CPU; `benchmarks.gpu` has those of a GPU

A step of ours is one call of the transformer and, because it runs once for a prompt, an eighth of the caption's part:
that of a run of 8 steps. The floor is the step's matmuls and attention at the measured rate of such products.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zimage_core.backends import matmul
from zimage_core.config import TransformerConfig
from zimage_core.model.patchify import padded

from . import memory, models, results, timing

STEPS = 8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NEGATIVE_TOKENS = 12  # a short negative prompt
IMPLEMENTATIONS = ("core", "diffusers", "native")


@dataclass(frozen=True)
class Case:
    size: int  # pixels, of a square image
    tokens: int  # of the prompt
    guided: bool = False

    @property
    def lengths(self) -> list[int]:
        return [self.tokens, NEGATIVE_TOKENS] if self.guided else [self.tokens]

    def __str__(self) -> str:
        return f"{self.size}², {self.tokens} tokens" + (", guidance" if self.guided else "")


CPU_CASES = [Case(512, 40), Case(512, 400), Case(512, 40, guided=True), Case(1024, 40), Case(1024, 400)]
TOY_CASES = [Case(64, 10), Case(64, 40, guided=True)]


@dataclass(frozen=True)
class Inputs:
    latents: Tensor  # [B, 16, h, w]
    t: Tensor  # [B]
    cap_feats: list[Tensor]  # B of [L_i, cap_feat_dim]


def inputs(case: Case, config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    side = case.size // 8
    latents = torch.randn(1, 16, side, side, generator=generator).repeat(len(case.lengths), 1, 1, 1)
    cap_feats = [torch.randn(length, config.cap_feat_dim, generator=generator) for length in case.lengths]
    t = torch.full((len(case.lengths),), 0.3)
    return Inputs(latents.to(device, dtype), t.to(device), [feats.to(device, dtype) for feats in cap_feats])


def calls(built: dict[str, Any], given: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Implementation -> one step: the velocity towards the image, [B, 16, h, w]."""

    def diffusers() -> Tensor:
        images = [latents.unsqueeze(1) for latents in given.latents]
        return torch.stack(built["diffusers"](images, given.t, given.cap_feats, return_dict=False)[0]).squeeze(2)

    found: dict[str, Callable[[], Tensor]] = {}
    for name, model in built.items():
        if name.startswith("core"):
            found[name] = _step_of_core(model, given)
        elif name == "diffusers":
            found[name] = diffusers
        else:
            found[name] = _step_in_host(model, given)
    return found


def _step_in_host(model: Any, given: Inputs) -> Callable[[], Tensor]:
    def step() -> Tensor:  # prompts of different lengths don't go into one batch of ComfyUI's
        runs = zip(given.latents.split(1), given.t.split(1), given.cap_feats, strict=True)
        calls = ((x, 1 - t, cap[None]) for x, t, cap in runs)
        return -torch.cat([model(*call, num_tokens=call[2].shape[1], transformer_options={}) for call in calls])

    return step


def _step_of_core(model: Any, given: Inputs) -> Callable[[], Tensor]:
    captions = model.refine_captions(given.cap_feats, given.latents.dtype)
    return lambda: model(given.latents, given.t, captions)


@dataclass
class Measured:
    seconds: dict[str, list[float]]
    peak: dict[str, int]  # bytes beside the weights
    off: dict[str, float]  # ||result - core's|| / ||core's||


def measure(built: dict[str, Any], given: Inputs, repeats: int) -> Measured:
    steps, device = calls(built, given), given.latents.device
    found = Measured({}, {}, {})
    expected = None
    for name, step in steps.items():
        with memory.peak(device) as peak:
            result = step()  # which warms it up
        result = result.float()
        expected = result if expected is None else expected
        found.peak[name] = peak[0]
        found.off[name] = ((result - expected).norm() / expected.norm()).item()
    captions = {}
    for name in steps:
        if name.startswith("core"):
            refine = lambda m=built[name]: m.refine_captions(given.cap_feats, given.latents.dtype)  # noqa: E731
            captions[name] = statistics.median(timing.seconds(refine, device) for _ in range(3))
    for name, times in timing.alternating(steps, repeats, device).items():
        found.seconds[name] = [one + captions.get(name, 0.0) / STEPS for one in times]
    return found


# The floor


def operations(config: TransformerConfig, case: Case) -> float:
    """Multiplications and additions of a step's matmuls and attention, the caption's part by an eighth."""
    image = padded((case.size // 16) ** 2)
    weights = 4 * config.dim**2 + 3 * config.dim * config.ffn_dim  # of one block

    def block(tokens: int) -> float:
        return 2 * tokens * weights + 4 * tokens**2 * config.dim

    total = 0.0
    for length in case.lengths:
        caption = padded(length)
        joint, refined = config.n_layers * block(image + caption), config.n_refiner_layers * block(image)
        total += joint + refined + config.n_refiner_layers * block(caption) / STEPS
    return total


def matmul_rate(config: TransformerConfig, device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Operations per second of a product as in the feed-forward, for this many tokens: the best way known here."""
    x = torch.randn(tokens, config.dim, device=device, dtype=dtype)
    weight = torch.randn(config.ffn_dim, config.dim, device=device, dtype=dtype)
    ways = {"torch": lambda: torch.nn.functional.linear(x, weight), "ours": lambda: matmul.linear(x, weight)}
    count = 1 if device.type == "cpu" else 20  # one alone would not fill a GPU's queue

    def products_in_a_row(way: Callable[[], Tensor]) -> float:
        return timing.seconds(lambda: [way() for _ in range(count)], device) / count

    best = min(products_in_a_row(way) for _ in range(5) for way in ways.values())
    return 2 * tokens * config.dim * config.ffn_dim / best


# The run


@torch.inference_mode()
def main(a: argparse.Namespace) -> None:
    device = torch.device("cpu")
    layers = a.layers or (1 if a.toy else 4)
    config = models.geometry(layers, a.toy)
    cases = TOY_CASES if a.toy else CPU_CASES
    dtypes = a.dtype or (["fp32"] if a.toy else list(DTYPES))
    wanted = [(case, name) for name in dtypes for case in cases]
    wanted = [(case, name) for case, name in wanted if not a.only or any(word in str(case) for word in a.only)]
    wanted = [(case, name) for case, name in wanted if not any(word in str(case) for word in a.without)]
    for name in dict.fromkeys(name for _, name in wanted):
        ours = models.core(config, device, DTYPES[name])
        built = {"core": ours, "diffusers": models.diffusers(ours), "native": models.native(ours)}
        if a.compiled:
            built["core compiled"] = copy.copy(ours)  # the same parameters
            built["core compiled"].compiled = True
        rows = []
        for case in (case for case, dtype in wanted if dtype == name):
            found = measure(built, inputs(case, config, device, DTYPES[name]), a.repeats)
            rows.append(_row(name, case, found, config, device))
            print("|", " | ".join(rows[-1]), "|", flush=True)
        text = (
            f"{models.blocks(config)}, {name}, medians of {a.repeats} in seconds, the range "
            "being that of the ratios, repeat by repeat. Memory is what a step needs beside the weights.\n\n"
        )
        text += timing.table(COLUMNS, rows)
        print(text)
        if not a.toy:
            results.write(a.section or f"step, cpu, {name}", "step", text)


COLUMNS = ["image", ">core", ">diffusers", ">native", ">core / faster peer", ">compiled / core"]
COLUMNS += [">floor", ">floor / core", ">MB: core", ">diffusers", ">native"]


def _row(dtype: str, case: Case, found: Measured, config: TransformerConfig, device: torch.device) -> list[str]:
    tolerance = 1e-4 if dtype == "fp32" else 0.1
    if (worst := max(found.off.values())) > tolerance:
        raise AssertionError(f"{case}, {dtype}: the implementations differ by {worst:.2g}")
    medians = {name: statistics.median(times) for name, times in found.seconds.items()}
    eager = {name: times for name, times in found.seconds.items() if name in IMPLEMENTATIONS}
    floor = operations(config, case) / matmul_rate(config, device, DTYPES[dtype], padded((case.size // 16) ** 2))
    cells = [str(case), *(f"{medians[name]:.3g}" for name in IMPLEMENTATIONS)]
    cells.append(timing.ratio(eager, "core", timing.faster(eager, "core")))
    compiled = "core compiled" in medians
    cells.append(timing.ratio(found.seconds, "core compiled", "core") if compiled else "")
    cells += [f"{floor:.3g}", f"{floor / medians['core']:.2f}"]
    return cells + [f"{found.peak[name] / 1e6:,.0f}" for name in IMPLEMENTATIONS]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=0, help="main layers; 4 unless told")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="repeatable; both unless told")
    parser.add_argument("--only", action="append", help='cases whose name has this in it, such as "512"; repeatable')
    parser.add_argument("--without", action="append", default=[], help="no cases with this in their name; repeatable")
    parser.add_argument("--compiled", action="store_true", help="compiled, too")
    parser.add_argument("--section", help="of RESULTS.md to write to; that of the dtype unless told")
    parser.add_argument("--toy", action="store_true", help="tiny and not written down: does the script work?")
    main(parser.parse_args())
