"""What a control network adds to a step: ours and ComfyUI's own, on the same weights, alternating in one process.

    python -m benchmarks.control               # 4 main layers; `benchmarks.gpu` has all 30

Both networks are those of ComfyUI nodes. Ours sees the caption as well, which ComfyUI's leaves out, and is therefore
longer by its tokens; with guidance it computes the refiner's hints once for both prompts.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from zimage_core.config import ControlConfig
from zimage_core.model.control import ControlNetwork

from . import models, results, step, timing

STRENGTH = 0.8
CASES = [step.Case(256, 40)]  # larger ones take minutes each on a CPU
COLUMNS = ["image", ">ours: plain", ">steered", ">native: plain", ">steered", ">steered: ours / native"]


def networks(ours: Any) -> tuple[Any, ControlNetwork]:
    """ComfyUI's control network of version 2.1 for a transformer, every second layer, and ours on views of it."""
    models.pack(cpu=ours.x_embedder.weight.device.type == "cpu")
    config, weight = ours.config, ours.x_embedder.weight
    layers = math.ceil(config.n_layers / 2)
    native = importlib.import_module("comfy.ldm.lumina.controlnet").ZImage_Control(
        dim=config.dim,
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
        n_control_layers=layers,
        additional_in_dim=17,
        refiner_control=True,
        device=weight.device,
        dtype=weight.dtype,
        operations=importlib.import_module("comfy.ops").disable_weight_init,
    )
    native.n_control_layers = 15  # by which ComfyUI finds their places; a short transformer has not as many
    generator = torch.Generator(weight.device).manual_seed(1)
    for parameter in native.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            parameter.normal_(generator=generator).div_(math.sqrt(parameter.shape[1]))
    places, refiners = tuple(range(0, config.n_layers, 2)), 2
    numbers = ControlConfig(config.dim, config.n_heads, config.norm_eps, 33, places, refiners, "hints")
    own = ControlNetwork(numbers, device="meta", dtype=weight.dtype)
    state = {
        name.removeprefix("control_").replace("all_x_embedder.2-1", "x_embedder"): value
        for name, value in native.state_dict().items()
    }
    own.load_state_dict(state, strict=True, assign=True)
    return native, own.requires_grad_(False).eval()


def calls(given: step.Inputs, native: Any, nodes: Any, control: tuple[Any, ControlNetwork]) -> dict[str, Callable]:
    """Name -> one step, the velocity of each item."""
    batch, _, height, width = given.latents.shape
    draw = torch.randn(1, 33, height, width, generator=torch.Generator().manual_seed(2))
    encoded, size = draw.to(given.latents), (height * 8, width * 8)
    stock = importlib.import_module("comfy_extras.nodes_model_patch").ZImageControlPatch
    bridge = models.pack(cpu=given.latents.device.type == "cpu").bridge.control
    theirs, mine = stock.__new__(stock), None
    vars(theirs).update(
        model_patch=SimpleNamespace(model=control[0]),
        vae=SimpleNamespace(spacial_compression_encode=lambda: 8),
        strength=STRENGTH,
        encoded_image=encoded,
        encoded_image_size=size,
        temp_data=None,
    )
    settings = bridge.Settings(None, 1.0, 0.0, "crop", True)
    mine = bridge.ZImageControlPatch(SimpleNamespace(model=control[1]), None, encoded, STRENGTH, settings=settings)
    mine.encoded_image, mine.encoded_image_size = encoded, size

    def run(model: Any, patches: dict[str, Any]) -> Callable[[], Tensor]:
        def one() -> Tensor:  # prompts of different lengths don't go into one batch of ComfyUI's
            mine.shared = {}
            found = []
            for index, caption in enumerate(given.cap_feats):
                options = {"patches": patches, "cond_or_uncond": [index]}
                item = given.latents[index : index + 1], 1 - given.t[index : index + 1], caption[None]
                found.append(model(*item, num_tokens=len(caption), transformer_options=options))
            mine.shared = None
            return torch.cat(found)

        return one

    return {
        "ours, plain": run(nodes, {}),
        "ours": run(nodes, {bridge.KIND: [mine]}),
        "native, plain": run(native, {}),
        "native": run(native, {"noise_refiner": [theirs], "double_block": [theirs]}),
    }


def measured(steps: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[float]]:
    for name, run in steps.items():
        assert run().isfinite().all(), name  # and warmed up
    return timing.alternating(steps, repeats, device)


def row(case: step.Case, found: dict[str, list[float]], scale: float = 1.0) -> list[str]:
    cells = [f"{scale * statistics.median(times):.3g}" for times in found.values()]
    return [str(case), *cells, timing.ratio(found, "ours", "native")]


@torch.inference_mode()
def main(a: argparse.Namespace) -> None:
    device, dtype = torch.device("cpu"), torch.float32
    config = models.geometry(a.layers or (2 if a.toy else 4), a.toy)
    ours = models.core(config, device, dtype)
    native, nodes, control = models.native(ours), models.of_nodes(ours), networks(ours)
    rows = []
    for case in step.TOY_CASES if a.toy else CASES:
        given = step.inputs(case, config, device, dtype)
        rows.append(row(case, measured(calls(given, native, nodes, control), a.repeats, device)))
        print("|", " | ".join(rows[-1]), "|", flush=True)
    text = (
        f"{models.blocks(config)}, a control network of 2 refiner blocks and one for every second layer, fp32, medians "
        f"of {a.repeats} in seconds, the range being that of the ratios, repeat by repeat.\n\n"
    )
    text += timing.table(COLUMNS, rows)
    print(text)
    if not a.toy:
        results.write("control, cpu", "control", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=0, help="main layers; 4 unless told")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="tiny and not written down: does the script work?")
    main(parser.parse_args())
