"""The text encoder: ours, transformers' as diffusers calls it, and ComfyUI's, on the same random bfloat16 weights.

    python -m benchmarks.text    # 6 of the 36 layers at their real width; `benchmarks.gpu` has all of them on a GPU

diffusers pads every prompt to 512 tokens and computes in bfloat16; ComfyUI computes in float32. Ours does what it is
asked for: both are measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.config import TextEncoderConfig
from zimage_core.model.text_encoder import TextEncoder

from . import memory, models, results, timing

PUBLISHED = json.loads((models.ROOT / "tests" / "published_configs.json").read_text())["text_encoder"]
TOY = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TOY |= {"num_key_value_heads": 2, "head_dim": 16}
LENGTH = 512  # to which diffusers pads
PROMPTS = (40, 400)


def core(layers: int, toy: bool, device: torch.device) -> TextEncoder:
    """Ours, with random weights; one layer less than `layers`, as the last one is never used."""
    config = {**PUBLISHED, "num_hidden_layers": layers, **(TOY if toy else {})}
    model = TextEncoder(TextEncoderConfig.from_dict(config, "here"), device=device, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(generator=generator).div_(math.sqrt(parameter.shape[1]))
    return model.requires_grad_(False).eval()


def complete(ours: TextEncoder, prefix: str) -> dict[str, Tensor]:
    """These weights, and those of the last layer and norm, which others have: the first layer's again, and ones."""
    weights = {name.removeprefix("model."): value for name, value in ours.state_dict().items()}
    last, first = ours.config.num_hidden_layers - 1, "layers.0."
    weights |= {
        f"layers.{last}.{name.removeprefix(first)}": value for name, value in weights.items() if name.startswith(first)
    }
    weights["norm.weight"] = torch.ones_like(weights["layers.0.input_layernorm.weight"])
    return {prefix + name: value for name, value in weights.items()}


def transformers(ours: TextEncoder) -> nn.Module:
    package, config = importlib.import_module("transformers"), ours.config
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    )
    numbers = {name: getattr(config, name) for name in [*names.split(), "rms_norm_eps"]}
    qwen = package.Qwen3Config(
        **numbers,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    with ours.model.embed_tokens.weight.device:  # a GPU draws what is replaced at once in no time
        model = package.Qwen3Model(qwen).to(torch.bfloat16)
    model.load_state_dict(complete(ours, ""), strict=True, assign=True)
    return model.requires_grad_(False).eval()


def native(ours: TextEncoder) -> nn.Module:
    models.pack(cpu=next(ours.parameters()).device.type == "cpu")
    llama, config = importlib.import_module("comfy.text_encoders.llama"), ours.config
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    numbers = {name: getattr(config, name) for name in names.split()}
    operations = importlib.import_module("comfy.ops").manual_cast
    model = llama.Qwen3_4B(numbers, dtype=torch.bfloat16, device="meta", operations=operations)
    model.load_state_dict(complete(ours, "model."), strict=True, assign=True)
    return model.requires_grad_(False).eval()


def others(ours: TextEncoder, toy: bool) -> dict[str, nn.Module]:
    found = {"diffusers": transformers(ours)}
    return found if toy else {**found, "native": native(ours)}  # ComfyUI's has one width


def calls(ours: TextEncoder, others: dict[str, nn.Module], ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Implementation -> features of a prompt [1, L, hidden_size]."""
    length = ids.shape[1]
    padded = torch.nn.functional.pad(ids, (0, LENGTH - length))
    mask = (torch.arange(LENGTH, device=ids.device) < length).long()[None]
    theirs = others["diffusers"]
    found: dict[str, Any] = {
        "core, bf16": lambda: ours(ids),
        "diffusers, bf16": lambda: theirs(
            input_ids=padded, attention_mask=mask, output_hidden_states=True
        ).hidden_states[-2][:, :length],
        "core, fp32": lambda: ours(ids, dtype=torch.float32),
    }
    if "native" in others:
        native = others["native"]
        settings = {"intermediate_output": -2, "final_layer_norm_intermediate": False, "dtype": torch.float32}
        found["native, fp32"] = lambda: native(ids, **settings)[1]
    return found


@torch.inference_mode()
def main(a: argparse.Namespace) -> None:
    device = torch.device("cpu")
    layers = a.layers or (3 if a.toy else 6)
    ours = core(layers, a.toy, device)
    rows, built = [], others(ours, a.toy)
    for length in PROMPTS:
        ids = torch.randint(0, ours.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
        found, peaks, exact = calls(ours, built, ids.to(device)), {}, None
        for name, call in reversed(found.items()):  # those in float32 first
            kept: list[Tensor] = []
            with memory.peak(device) as peak:
                kept.append(call())
            result = kept.pop().float()
            exact = result if exact is None else exact
            off = ((result - exact).norm() / exact.norm()).item()
            if not off <= (1e-4 if "fp32" in name else 0.1):
                raise AssertionError(f"{length} tokens: {name} differs by {off:.2g}")
            peaks[name] = peak[0]
        times = timing.alternating(found, a.repeats, device)
        for name in found:
            peer = next((other for other in found if other != name and other[-4:] == name[-4:]), None)
            to = timing.ratio(times, name, peer) if name.startswith("core") and peer else ""
            seconds = f"{statistics.median(times[name]):.3g}"
            rows.append([f"{length} tokens", name, seconds, to, f"{peaks[name] / 1e6:,.0f}"])
            print("|", " | ".join(rows[-1]), "|", flush=True)
    text = f"{layers} layers, of which ours runs {layers - 1}; medians of {a.repeats} in seconds.\n\n"
    text += timing.table(
        ["prompt", "implementation", ">seconds", ">core / peer (range)", ">MB beside the weights"], rows
    )
    print(text)
    if not a.toy:
        results.write("text encoder, cpu", "text", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="tiny and not written down: does the script work?")
    main(parser.parse_args())
