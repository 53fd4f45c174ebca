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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.operations import Tokens
from ..config import TransformerConfig
from .attention import Attention, attention
from .block import Block
from .patchify import SEQ_MULTIPLE, padded, unpatchify
from .rope import caption_positions, image_positions

FEATURE_CELL = 8  # a row or column of features spans so many positions


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


@dataclass(frozen=True)
class Referenced:
    """Captions with reference images as every step of a run needs them: embedded, refined, with their places."""

    groups: list[_Group]  # run one after another

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def evaluate(self, model: Any, latents: Tensor, t: Tensor, *settings: Any) -> Tensor:
        """See `ZImageTransformer.forward`, which calls it."""
        counts = [len(group) for group in self.groups]
        items = zip(self.groups, latents.split(counts), t.split(counts), strict=True)
        found = [group.evaluate(model, part, time, *settings) for group, part, time in items]
        return found[0] if len(found) == 1 else torch.cat(found)


def refine(
    model: Any,
    features: Tensor | Sequence[Tensor],
    references: References,
    dtype: torch.dtype,
    *,
    attention: Attention = attention,
) -> Referenced:
    """What `ZImageTransformer.forward` takes for caption features and reference images; in `dtype`.

    model: a ZImageTransformer. features: [B, L, cap_feat_dim], or B of [L_i, cap_feat_dim]; of the caption that stands
    before the image that is made. Raises ValueError where the references don't suit the model.
    """
    references.check(model.config)
    if isinstance(features, Tensor) or len({len(item) for item in features}) == 1:
        together = features if isinstance(features, Tensor) else torch.stack(list(features))
        return Referenced([_group(model, together, references, dtype, attention)])
    groups = []
    for index, item in enumerate(features):
        own = references.each(partial(_item, index))
        groups.append(_group(model, item.unsqueeze(0), own, dtype, attention))
    return Referenced(groups)


def _item(index: int, x: Tensor) -> Tensor:
    return x if len(x) == 1 else x[index : index + 1]


def _group(model: Any, features: Tensor, references: References, dtype: torch.dtype, attend: Attention) -> _Group:
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
            starts.append(start + length + 1)
        start += length + (2 if number <= count else 0)
    lengths = [caption.shape[1] for caption in captions]
    context = [_refined(model, model.context_refiner, captions, places, batch, dtype, attend)]
    if has_part:  # the image that is made has no features, which makes pads
        found = zip(_filled(references.features, count + 1), starts, strict=True)
        tokens, places = zip(*(_embedded_features(model, x, at, dtype, device) for x, at in found), strict=True)
        context.append(_refined(model, model.siglip_refiner, tokens, places, batch, dtype, attend))
    joined, rotations = (torch.cat(parts, dim=1) for parts in zip(*context, strict=True))
    latents = [latents.to(device, dtype) for latents in references.latents]
    return _Group(joined, rotations, sum(lengths[:count]), sum(lengths), latents, starts)


def _filled(given: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
    return [*given, *[None] * (count - len(given))]


def _along(start: float, device: torch.device) -> Tensor:
    """So far along the first axis of positions. Filled on the device: a copy would make the host wait for it."""
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

    start: position of their image. The numbers of one token are those of several places: both published codes put
    channels first and then read off rows of channels, so this is what the model learned.
    """
    pad = model.siglip_pad_token.to(device, dtype)
    if features is None:
        return pad.expand(1, SEQ_MULTIPLE, -1), torch.zeros(1, SEQ_MULTIPLE, 3, device=device)
    batch, rows, columns, width = features.shape
    count = rows * columns
    pads = padded(count) - count
    tokens = model.siglip_embedder(features.to(dtype).movedim(-1, 1).reshape(batch, count, width))
    tokens = torch.cat((tokens, pad.expand(batch, pads, -1).to(tokens)), dim=1)
    y, x = (torch.linspace(0, side * FEATURE_CELL - 1, side, device=device).floor() for side in (rows, columns))
    grid = torch.broadcast_tensors(torch.full((), start + 1.0, device=device), y.view(-1, 1), x)
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


@dataclass(frozen=True)
class _Group:
    """Captions of one length, with their references."""

    context: Tensor  # [B, C, D]: all pieces of the captions, then features
    rotations: Tensor  # [1, C, 1, head_dim/2, 2, 2]
    noisy: int  # from here on tokens of `context` belong to the image that is made
    caption: int  # from here on they are of features, which are clean
    latents: list[Tensor]  # of the references, [1 or B, 16, h, w]
    starts: list[int]  # positions of the references and of the image that is made, along the first axis
    image_rotations: dict[Any, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.context)

    def evaluate(
        self,
        model: Any,
        latents: Tensor,
        t: Tensor,
        attention: Attention,
        after_block: Callable[[str, int], None] | None,
        patch_tokens: Callable[[str, int, dict[str, Any]], None] | None,
        rope_options: Mapping[str, float] | None,
        captions_first: bool,
    ) -> Tensor:
        """As `ZImageTransformer.forward`. Patches see ComfyUI's order: captions, features, references, image."""
        first = captions_first or patch_tokens is not None
        order = -1 if first else 1
        batch, dtype, (height, width) = len(latents), latents.dtype, latents.shape[-2:]
        noisy, clean = model.t_embedder(t, dtype), model.t_embedder(torch.ones_like(t), dtype)  # (B, 256)
        every = [latents, *self.latents[::-1]][::order]
        images = [model._embed_image(model.x_embedder, x, False).expand(batch, -1, -1) for x in every]
        counts = [x.shape[1] for x in images]
        n = counts[-1 if first else 0]
        img = torch.cat(images, dim=1)  # (B, N, D)
        img_pe = self._image_rotations(model, every, counts, order, rope_options)
        time = _joined([noisy, *[clean] * len(self.latents)][::order], counts)  # (B, N, 256)

        run = partial(model._run, attention=attention, dtype=noisy.dtype)
        state: dict[str, Any] = {"vec": torch.cat((clean, noisy)), "x": latents}
        if patch_tokens is not None:
            state |= {"img_input": img.clone(), "pe": img_pe, "txt": self.context[:, : self.caption].clone()}
        for index, block in enumerate(model.noise_refiner):
            img = run(block, img, Tokens(img_pe, time, [img.shape[1]]))
            if after_block is not None:
                after_block("noise_refiner", index)
            if patch_tokens is not None:
                state["img"] = img
                patch_tokens("noise_refiner", index, state)
                img = state["img"]

        total = self.context.shape[1]
        own = _joined([clean, noisy, clean], [self.noisy, self.caption - self.noisy, total - self.caption])
        x = torch.cat((img, self.context.to(img))[::order], dim=1)  # (B, S, D)
        pe = torch.cat((img_pe, self.rotations)[::order], dim=1)
        time = torch.cat((time, own)[::order], dim=1)
        tokens = Tokens(pe, time, [x.shape[1]])
        begin = x.shape[1] - n if first else 0
        image, text = slice(begin, begin + n), slice(0, begin) if first else slice(n, None)
        n_image = height * width // model.config.patch_size**2
        del img, img_pe, images
        if patch_tokens is not None:
            state |= {"img_input": x[:, image].clone(), "pe": pe[:, image]}
        for index, block in enumerate(model.layers):
            if index == len(model.layers) - 1 and not first:  # of the last only the image's tokens are used
                tokens = dataclasses.replace(tokens, queries=n_image)
            x = run(block, x, tokens)
            if after_block is not None:
                after_block("layers", index)
            if patch_tokens is not None:
                state.update(img=x[:, image], txt=x[:, text])
                patch_tokens("layers", index, state)
        x = model.final_layer(x[:, begin : begin + n_image], noisy)  # (B, h/2 * w/2, 64)
        return unpatchify(x, height, width, model.config.patch_size)

    def _image_rotations(
        self,
        model: Any,
        images: Sequence[Tensor],
        counts: Sequence[int],
        order: int,
        rope_options: Mapping[str, float] | None,
    ) -> Tensor:
        """Of the tokens of all images, kept: every step of a run needs the same."""
        height, width = images[::order][0].shape[-2:]
        key = None
        if not torch.compiler.is_compiling():  # where a key would make constants of sizes
            key = (order, height, width, *sorted((rope_options or {}).items()))
        if key in self.image_rotations:
            return self.image_rotations[key]
        patch, device = model.config.patch_size, images[0].device
        places = [
            image_positions([start - 1], x.shape[-2] // patch, x.shape[-1] // patch, count, device, rope_options)
            for start, x, count in zip(self.starts[::-1][::order], images, counts, strict=True)
        ]
        rotations: Tensor = model._rotations(torch.cat(places, dim=1))
        if key is not None:
            self.image_rotations[key] = rotations
        return rotations


def _joined(times: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Embedded times [B, A], each for so many tokens: [B, S, A]."""
    parts = [time.unsqueeze(1).expand(-1, count, -1) for time, count in zip(times, counts, strict=True)]
    return torch.cat(parts, dim=1)
