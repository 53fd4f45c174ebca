"""Reference images that ComfyUI's nodes attach to a prompt (TextEncodeZImageOmni, ReferenceLatent)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...zimage_core.config import TransformerConfig
from ...zimage_core.model.reference import References
from . import borders


def of(config: TransformerConfig, batch: int, conds: Mapping[str, Any]) -> References | None:
    """What a prompt's conds say of reference images, for so many items; None where there are none.

    As natively, what comes without latents of an image, and features for a model without a part for them, don't count.
    Raises ValueError that says what to do.
    """
    latents = conds.get("ref_latents") or ()
    if not len(latents):
        return None
    wanted = ("batch", config.in_channels, "height/8", "width/8")
    for number, latent in enumerate(latents, 1):
        borders.checked(
            f"The latent of reference image {number}", latent, wanted, "Encode the image with Z-Image's VAE."
        )
    pieces = [borders.checked("A piece of the prompt", x, borders.FEATURES) for x in conds.get("ref_contexts") or ()]
    features = list(conds.get("siglip_feats") or ()) if config.siglip_feat_dim is not None else []
    for found in features:
        shape = ("batch", "rows", "columns", config.siglip_feat_dim or 0)
        borders.checked(
            "The CLIP vision output", found, shape, "Connect the siglip2 encoder that belongs to the model."
        )
    count = len(latents)
    return References(
        [_fitted(_even(x, config.patch_size), batch) for x in latents],
        [_fitted(x, batch) for x in pieces[:count]],
        [_fitted(x, batch) for x in pieces[count:]],
        [_fitted(x, batch) for x in features[:count]],
    )


def check_vision(conds: Mapping[str, Any]) -> None:
    """Raises ValueError for a CLIP vision output that can't be laid out in rows and columns of 16 pixels."""
    outputs = conds.get("clip_vision_outputs")
    if outputs is None:
        outputs = [entry.get("clip_vision_output") for entry in conds.get("unclip_conditioning", ())]
    for output in outputs:
        if output is None:
            continue
        count = output.last_hidden_state.shape[1]
        _, height, width = output.image_sizes[0]
        if count != (height // 16) * (width // 16):
            raise ValueError(
                f"The CLIP vision output has {count} tokens for an image of {width}x{height}, expected one for each "
                "16x16 pixels. Connect the siglip2 encoder that belongs to the model, or none."
            )


def _even(latent: Tensor, patch: int) -> Tensor:
    """With its last row and column repeated where they are odd, as TextEncodeZImageOmni's own resizing makes them."""
    height, width = latent.shape[-2:]
    return F.pad(latent, (0, -width % patch, 0, -height % patch), mode="replicate")


def _fitted(x: Tensor, batch: int) -> Tensor:
    """For so many items, as ComfyUI repeats and cuts a batch."""
    if len(x) in (1, batch):
        return x
    return x[[index % len(x) for index in range(batch)]]
