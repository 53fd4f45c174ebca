"""Which attention a run will ask for, and tensors of those sizes to try a kernel on."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import comfy.model_management as mm
import torch
from torch import Tensor

from ...zimage_core.model.patchify import padded


class Size(NamedTuple):
    """Of the tensors of a trial."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def sizes_of(guider: Any, noise: Tensor, joint: bool = False) -> list[Size]:
    """Of all attention that a run will ask for; joint: of its main blocks' alone."""
    model = guider.inner_model
    config = getattr(model.diffusion_model, "config", model.diffusion_model)  # ComfyUI's own has it on itself
    prompts: Counter[tuple[int, int]] = Counter()  # (image tokens, caption tokens)
    for cond in (cond for conds in guider.conds.values() for cond in conds):
        if "c_crossattn" not in cond["model_conds"]:
            continue
        area = list(noise.shape[-2:])
        if "area" in cond:
            sides = len(cond["area"]) // 2
            given = zip(cond["area"][:sides][-2:], cond["area"][-2:], area, strict=True)
            area = [min(length, total - offset) for length, offset, total in given]
        image = math.prod(-(-length // 2) for length in area)
        prompts[image, cond["model_conds"]["c_crossattn"].cond.shape[1]] += 1
    found: Counter[tuple[int, int]] = Counter()
    for (image, caption), count in prompts.items():
        everything = padded(image) + padded(caption)
        lengths = {(everything, everything)}
        if not joint:  # ... the last block's, and the refiners'
            lengths |= {(image, everything), (padded(image), padded(image)), (padded(caption), padded(caption))}
        found.update(dict.fromkeys(lengths, count * len(noise)))  # ComfyUI batches what has the same length
    head_dim, dtype = config.dim // config.n_heads, model.get_dtype_inference()
    return [
        Size(batch, config.n_heads, queries, keys, head_dim, dtype, noise.device)
        for (queries, keys), batch in found.items()
    ]


def key_of(size: Size) -> Any:
    return size.queries, size.keys, size.head_dim, size.dtype, size.device


def words_of(size: Size) -> str:
    return f"{size.queries} queries to {size.keys} keys in {size.dtype}"


def example_of(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v laid out as the transformer's; from head to head attention gets less even, as in trained ones."""
    source = size.device if mm.is_device_cuda(size.device) else torch.device("cpu")  # others may have no generator
    shape = (size.batch, size.keys, 3, size.heads, size.head_dim)
    generator = torch.Generator(source).manual_seed(0)
    qkv = torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(size.device, size.dtype)
    q, k, v = qkv.unbind(2)
    q = q[:, : size.queries] * torch.linspace(1, 4, size.heads, device=size.device, dtype=size.dtype)[:, None]
    return q.transpose(1, 2), k.contiguous().transpose(1, 2), v.transpose(1, 2)
