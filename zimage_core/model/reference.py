"""Reference images beside a prompt, as Z-Image Omni takes them.

The tokens of clean images stand beside those of the image that is made, each between two pieces of the prompt, and with
each may come features that a siglip network saw in it. Tokens of the references and of the pieces before them are
modulated as at t = 1, the others by t; features are not noisy either.

Along the first axis of positions, with L the number of tokens of a piece that begins behind position s (0 at first),

    piece s + 1, s + 2, ...;  image s + L + 1;  features s + L + 2;  next s = s + L + 2

where L counts what pads the piece to a multiple of 32 only in models without a part for features. So ComfyUI has it
(comfy/ldm/lumina/model.py, `embed_all`); diffusers places other pieces than the first elsewhere unless their lengths
are multiples of 32, since it pads their positions twice.

Letters: B batch, C tokens of captions and features, N image tokens, S all of them, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.operations import Tokens
from ..config import TransformerConfig
from .attention import Attention, attention
from .block import Block
from .captions import Beside, Captions, joined
from .patchify import SEQ_MULTIPLE, padded
from .rope import caption_positions

FEATURE_STRIDE = 8  # a row or column of features spans so many positions


@dataclass(frozen=True)
class References:
    """Reference images of a prompt, each [1, ...] for all items of a batch or [B, ...]."""

    latents: Sequence[Tensor]  # scaled, [1 or B, 16, h, w], h and w even, of any size
    before: Sequence[Tensor | None] = ()  # what the prompt says before each, [1 or B, L, cap_feat_dim]; may be fewer
    after: Sequence[Tensor] = ()  # what it says after the image that is made
    features: Sequence[Tensor | None] = ()  # of siglip, [1 or B, rows, columns, siglip_feat_dim]; may be fewer

    def each(self, function: Callable[[Tensor], Tensor]) -> References:
        parts: Any = (getattr(self, part.name) for part in dataclasses.fields(self))
        changed: Any = ([None if x is None else function(x) for x in part] for part in parts)
        return References(*changed)

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError unless a transformer of these numbers can take them."""
        if not self.latents:
            raise ValueError("there are no latents of reference images; without any, a caption is used as it is")
        for latents in self.latents:
            sides = latents.shape[2:]
            odd = len(sides) != 2 or any(side < 1 or side % config.patch_size for side in sides)
            if odd or latents.shape[1] != config.in_channels:
                raise ValueError(
                    f"the latents of a reference image have the shape {list(latents.shape)}, expected [batch, "
                    f"{config.in_channels}, height/8, width/8] of an image whose width and height are divisible by 16"
                )
        for pieces, width, what in (
            ((*self.before, *self.after), config.cap_feat_dim, "a piece of the prompt"),
            (self.features, config.siglip_feat_dim, "the siglip features of a reference image"),
        ):
            for piece in pieces:
                if piece is not None and width is not None and piece.shape[-1] != width:
                    raise ValueError(f"{what}: a width of {piece.shape[-1]}, this model expects {width}")
        for name in ("before", "features"):
            if (count := len(getattr(self, name))) > len(self.latents):
                raise ValueError(f"`{name}` is for {count} reference images, and there are {len(self.latents)}")


def siglip_part(config: TransformerConfig, *, ops: Any, device: Any, dtype: Any) -> tuple[nn.Sequential, nn.ModuleList]:
    """The embedder of features, and the blocks that refine them."""
    embedder = nn.Sequential(
        ops.RMSNorm(config.siglip_feat_dim, eps=config.norm_eps, device=device, dtype=dtype),
        ops.Linear(config.siglip_feat_dim, config.dim, device=device, dtype=dtype),
    )
    make: dict[str, Any] = {"ops": ops, "device": device, "dtype": dtype}
    return embedder, nn.ModuleList(Block(config, modulated=False, **make) for _ in range(config.n_refiner_layers))


def refine(
    model: Any,
    features: Tensor | Sequence[Tensor],
    references: References,
    dtype: torch.dtype,
    *,
    attention: Attention = attention,
) -> Captions | list[Captions]:
    """What `ZImageTransformer.forward` takes for caption features and reference images; in `dtype`.

    model: a ZImageTransformer. features: [B, L, cap_feat_dim], or B of [L_i, cap_feat_dim]; of the caption that stands
    before the image that is made. Raises ValueError where the references don't suit the model.
    """
    references.check(model.config)
    if isinstance(features, Tensor) or len({len(item) for item in features}) == 1:
        together = features if isinstance(features, Tensor) else torch.stack(list(features))
        return _captions(model, together, references, dtype, attention)
    found = []
    for index, item in enumerate(features):
        own = references.each(partial(_item, index))
        found.append(_captions(model, item.unsqueeze(0), own, dtype, attention))
    return found


def _item(index: int, x: Tensor) -> Tensor:
    return x if len(x) == 1 else x[index : index + 1]


def _captions(model: Any, features: Tensor, references: References, dtype: torch.dtype, attend: Attention) -> Captions:
    """Captions [B, L, cap_feat_dim] with their references."""
    batch, device, count = len(features), features.device, len(references.latents)
    pieces = [*_filled(references.before, count), features, *references.after]
    captions = [_embedded_caption(model, piece, dtype, device) for piece in pieces]
    has_part = model.siglip_embedder is not None
    places: Sequence[Tensor] = []
    starts, start = [], 0
    for number, (piece, caption) in enumerate(zip(pieces, captions, strict=True)):
        places = [*places, caption_positions(caption.shape[1], device) + _along(start, device)]
        length = 0 if piece is None else piece.shape[1]
        if number <= count:  # what follows the image that is made has no image of its own
            length = length if has_part else caption.shape[1]
            starts.append(start + length)
        start += length + (2 if number <= count else 0)
    lengths = [caption.shape[1] for caption in captions]
    context = [_refined(model, model.context_refiner, captions, places, batch, dtype, attend)]
    if has_part:  # the image that is made has no features, which makes pads
        found = zip(_filled(references.features, count + 1), starts, strict=True)
        embedded, places = zip(*(_embedded_features(model, x, at, dtype, device) for x, at in found), strict=True)
        context.append(_refined(model, model.siglip_refiner, embedded, places, batch, dtype, attend))
    tokens, rotations = (joined(parts) for parts in zip(*context, strict=True))
    latents = [latents.to(device, dtype) for latents in references.latents]
    beside = Beside(latents, starts, slice(sum(lengths[:count]), sum(lengths)))
    return Captions(tokens, [tokens.shape[1]], rotations, beside)


def _filled(given: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
    return [*given, *[None] * (count - len(given))]


def _along(start: float, device: torch.device) -> Tensor:
    """So far along the first axis of positions. Filled on the device: a copy would make the CPU wait for it."""
    return torch.stack([torch.full((), float(step), device=device) for step in (start, 0, 0)])


def _embedded_caption(model: Any, piece: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1 or B, L, D], with pads; nothing but pads where there is no piece."""
    if piece is not None:
        tokens: Tensor = model._embed_caption(piece, dtype)[0]
        return tokens
    return model.cap_pad_token.to(device, dtype).expand(1, SEQ_MULTIPLE, -1)


def _embedded_features(
    model: Any, features: Tensor | None, start: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[1 or B, tokens, D] of features [1 or B, rows, columns, siglip_feat_dim] with pads, and positions [1, tokens, 3].

    start: position behind which their image stands. The numbers of one token are those of several places: both
    published codes put channels first and then read off rows of channels, so this is what the model learned.
    """
    pad = model.siglip_pad_token.to(device, dtype)
    if features is None:
        return pad.expand(1, SEQ_MULTIPLE, -1), torch.zeros(1, SEQ_MULTIPLE, 3, device=device)
    batch, rows, columns, width = features.shape
    count = rows * columns
    pads = padded(count) - count
    tokens = model.siglip_embedder(features.to(dtype).movedim(-1, 1).reshape(batch, count, width))
    tokens = torch.cat((tokens, pad.expand(batch, pads, -1).to(tokens)), dim=1)
    y, x = (torch.linspace(0, side * FEATURE_STRIDE - 1, side, device=device).floor() for side in (rows, columns))
    grid = torch.broadcast_tensors(torch.full((), start + 2.0, device=device), y.view(-1, 1), x)
    places = torch.stack(grid, dim=-1).flatten(0, 1).unsqueeze(0)
    return tokens, nn.functional.pad(places, (0, 0, 0, pads))


def _refined(
    model: Any,
    blocks: Any,
    parts: Sequence[Tensor],
    places: Sequence[Tensor],
    batch: int,
    dtype: torch.dtype,
    attend: Attention,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, C, D] of all parts [1 or B, ...], refined together, and their rotations."""
    tokens = model._widened(torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1))
    rotations = model._rotations(torch.cat(list(places), dim=1))
    for block in blocks:
        tokens = model._run(block, tokens, Tokens(rotations, None, [tokens.shape[1]]), attend, dtype)
    return tokens, rotations
