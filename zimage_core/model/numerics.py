"""Whether the tokens of a transformer fit into float16, which ends at 65504, by its weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import TransformerConfig

SUM_FITS = 60_000.0  # leaves float16's roundings a tenth
LATENTS_WITHIN = 16.0  # noise stays within 6, and latents of images as well


def largest_sum(read: Callable[[str], Tensor], config: TransformerConfig) -> float:
    """What no token's absolute value exceeds after any block, by the weights; `read` gives one by its name.

    A normed row of D numbers holds none above sqrt(D), and gates are at most 1: so a branch adds at most its norm's
    gain times sqrt(D). Only the embedders and the gains are read, 20 MB of the published model.
    """

    def added(stage: str, count: int) -> Tensor:
        names = (f"{stage}.{i}.{norm}.weight" for i in range(count) for norm in ("attention_norm2", "ffn_norm2"))
        return math.sqrt(config.dim) * sum((read(name).float().abs() for name in names), torch.zeros(config.dim))

    def embedded(layer: str, length: Tensor | float) -> Tensor:
        weight = read(f"{layer}.weight").float() * (length if isinstance(length, Tensor) else 1.0)
        rows = torch.linalg.vector_norm(weight, dim=1)  # of a vector of length 1, no product is larger
        return rows * (1.0 if isinstance(length, Tensor) else length) + read(f"{layer}.bias").float().abs()

    image = embedded("x_embedder", LATENTS_WITHIN * math.sqrt(config.patch_dim))
    image = torch.maximum(image, read("x_pad_token").float().abs().flatten())
    refined = [image + added("noise_refiner", config.n_refiner_layers)]
    context = [("cap", "context_refiner", config.cap_feat_dim)]
    context += [] if config.siglip_feat_dim is None else [("siglip", "siglip_refiner", config.siglip_feat_dim)]
    for name, refiner, width in context:
        tokens = embedded(f"{name}_embedder.1", read(f"{name}_embedder.0.weight").float() * math.sqrt(width))
        tokens = torch.maximum(tokens, read(f"{name}_pad_token").float().abs().flatten())
        refined.append(tokens + added(refiner, config.n_refiner_layers))
    return float((torch.stack(refined).amax(0) + added("layers", config.n_layers)).max())
