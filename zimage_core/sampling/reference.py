"""Reference images of `ZImagePipeline.generate`: how the prompt speaks of them, and what the networks see of them.

The pieces of the prompt and the size of the images are those of diffusers' ZImageOmniPipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import images
from ..errors import CheckpointError
from ..model.reference import References, refine
from ..model.tokenizer import PROMPT_TEMPLATE
from ..model.transformer import ZImageTransformer
from ..weights.snapshot import snapshot_folder

# What stands before the first image, between two, around the prompt, and after the image that is made
FIRST = "<|im_start|>user\n<|vision_start|>"
BETWEEN = "<|vision_end|><|vision_start|>"
TEMPLATE = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
LAST = "<|vision_end|><|im_end|>"
MOST_PIXELS = 2**20  # of an image that the VAE sees; a larger one is scaled down
MULTIPLE = 16  # of its sides
FOLDER = "siglip"  # in a snapshot


class Sight:
    """The siglip2 encoder of a snapshot, read when it is first needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._network: Any = None

    @classmethod
    def of(cls, path: Path) -> Sight | None:
        """That of the snapshot which a path leads to, None where it has none."""
        snapshot = snapshot_folder(path)
        folder = None if snapshot is None else snapshot / FOLDER
        return cls(folder) if folder is not None and folder.is_dir() else None

    def features(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """[1, rows, columns, width] of an image [1, 3, H, W] in 0..1, for each patch of it, on its device.

        Scaled without crop to as many patches as the encoder takes at most, as transformers' Siglip2ImageProcessor.
        """
        network = self._read(image.device, dtype)
        patch, most = network.config.patch_size, network.config.num_patches
        rows, columns = grid(image.shape[-2], image.shape[-1], patch, most)
        size = (rows * patch, columns * patch)
        pixels = F.interpolate(image.float(), size, mode="bilinear", antialias=True).clamp(0, 1) * 2 - 1
        patches = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # (1, 3, rows, p, columns, p)
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(1, rows * columns, -1)
        found = network(
            pixel_values=patches.to(dtype),
            pixel_attention_mask=torch.ones(1, rows * columns, dtype=torch.long, device=image.device),
            spatial_shapes=torch.tensor([[rows, columns]]),
        )
        return found.last_hidden_state.unflatten(1, (rows, columns))

    def _read(self, device: torch.device, dtype: torch.dtype) -> Any:
        if self._network is None:
            from transformers import Siglip2VisionModel  # here, as it takes a second that others do without

            try:
                network = Siglip2VisionModel.from_pretrained(str(self.folder), local_files_only=True)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"this siglip2 encoder can't be read ({error})", self.folder) from error
            self._network = network.requires_grad_(False).eval()
        return self._network.to(device=device, dtype=dtype)


def grid(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches for an image, `most` at most, its shape kept as well as whole patches can."""
    low, high = 1e-6, 100.0

    def at(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch)) for side in (height, width))
        return rows, columns

    while high - low >= 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(at(middle)) <= most else (low, middle)
    return at(low)


def template(given: Sequence[Tensor]) -> str:
    """Around a prompt with these reference images."""
    return TEMPLATE if given else PROMPT_TEMPLATE


def seen(
    given: Sequence[Tensor],
    sight: Sight | None,
    transformer: ZImageTransformer,
    dtype: torch.dtype,
    encode: Callable[[Tensor], Tensor],
    encode_prompts: Callable[..., list[Tensor]],
) -> References | None:
    """What the transformer is told of reference images [1, 3, H, W] in 0..1; None where there are none.

    encode: an image to its scaled latents. encode_prompts: texts, in a `template`, to features [L, width] each.
    Raises ValueError that says what is missing.
    """
    if not given:
        return None
    for number, image in enumerate(given, 1):
        images.check(f"reference image {number}", image, 3, 1)
    if sight is None or transformer.config.siglip_feat_dim is None:
        missing = f"the folder {FOLDER}/ in its snapshot" if sight is None else "a transformer with a siglip part"
        raise ValueError(
            f"reference images need Z-Image Omni or Edit, and {missing} is missing; load such a snapshot, or leave the "
            "reference images out"
        )
    pieces = encode_prompts([FIRST, *[BETWEEN] * (len(given) - 1), LAST], template="{}")
    *before, after = (piece.unsqueeze(0) for piece in pieces)
    within = [_within(image.to(after.device)) for image in given]
    features = [sight.features(image, dtype) for image in within]
    return References([encode(_cut(image)) for image in within], before, [after], features)


def refining(
    transformer: ZImageTransformer, seen: References | None, dtype: torch.dtype
) -> Callable[[Sequence[Tensor]], Any]:
    """What makes of caption features what the transformer takes."""
    if seen is None:
        return partial(transformer.refine_captions, dtype=dtype)
    return partial(refine, transformer, references=seen, dtype=dtype)


def _within(image: Tensor) -> Tensor:
    """Scaled down to MOST_PIXELS where it has more."""
    height, width = image.shape[-2:]
    scale = math.sqrt(MOST_PIXELS / (height * width))
    if scale >= 1:
        return image
    return images.fitted(image, max(1, int(height * scale)), max(1, int(width * scale)))


def _cut(image: Tensor) -> Tensor:
    """Its middle, of sides that latents can be cut into patches of."""
    height, width = (max(MULTIPLE, side // MULTIPLE * MULTIPLE) for side in image.shape[-2:])
    return images.fitted(image, height, width)
