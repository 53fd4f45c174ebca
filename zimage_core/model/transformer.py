"""S3-DiT, the single-stream diffusion transformer of Z-Image.

Image tokens and caption tokens are refined apart, then run through the same blocks as one sequence. Parameter names
are those of the single-file checkpoints (fused `qkv`); `key_maps.py` translates the diffusers names.

Letters: B batch, L caption tokens, N image tokens (both padded to a multiple of 32), S = N + L, D width (3840).

Details that have caused bugs elsewhere:
  - padding to 32 is attended, it is part of the sequence; only what pads a batch beyond it is masked
  - blocks modulate without a SiLU before the Linear, the final layer with one; gates pass a tanh; there is no shift
  - RoPE rotates neighboring channels, in float32, after the q/k norm
  - the result is the velocity towards the image, the negative of what an Euler step over sigma wants
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import cpu_rows
from ..backends.compiled import CompiledOperations
from ..backends.half import HalfOperations
from ..backends.matmul import Layers
from ..backends.operations import PLAIN, Gain, LeanOperations, Operations, Tokens, finite, read_gain
from ..config import TransformerConfig
from .attention import Attention, attention
from .block import Block, is_as_built, is_changed
from .captions import Captions, by_token, joined
from .control import ActiveControl, Steering
from .patchify import padded, patchify, unpatchify
from .reference import siglip_part
from .rope import caption_positions, image_positions, rotations
from .share import Share, Shares

TIME_FREQUENCIES = 256  # sinusoids of the model time (reference `frequency_embedding_size`)
TIME_HIDDEN = 1024  # hidden width of the time MLP (reference `mid_size`)
MAX_PERIOD = 10000.0
# Image tokens from which captions of different lengths run one after another: a batch of them needs a mask, which the
# fast attention kernels don't take, and matmuls of so many rows gain nothing from more
APART = 1024
FINAL_NORM_EPS = 1e-6  # the LayerNorm of the final layer, without weights

# called after each block of the image's stages, with ("noise_refiner" or "layers", index)
AfterBlock = Callable[[str, int], None]
# the same with what may be read and changed; see `ZImageTransformer.forward`
PatchTokens = Callable[[str, int, dict[str, Any]], None]


class ZImageTransformer(nn.Module):
    """S3-DiT.

    `ops` supplies Linear, RMSNorm and LayerNorm (`torch.nn`'s, or a host's namespace of the same names). A host that
    casts weights on the way, or has kernels, has a `gain` and operations of its own.
    """

    gain: Gain = staticmethod(read_gain)
    lean_operations: type[LeanOperations] = LeanOperations
    half_operations: type[HalfOperations] = HalfOperations
    siglip_embedder: nn.Sequential | None
    siglip_refiner: nn.ModuleList | None
    siglip_pad_token: nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        *,
        ops: Any = Layers,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        self.compiled = False  # may be set: what lies between matmuls goes through torch.compile
        self.sums_fit_half = False  # may be set, see `numerics.largest_sum`: tokens need not be float32 beside float16
        make: dict[str, Any] = {"ops": ops, "device": device, "dtype": dtype}
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        # in the order of the original: training draws its random numbers by it
        refiners, layers = range(config.n_refiner_layers), range(config.n_layers)
        self.x_embedder = ops.Linear(config.patch_dim, config.dim, **place)
        self.noise_refiner = nn.ModuleList(Block(config, modulated=True, **make) for _ in refiners)
        self.context_refiner = nn.ModuleList(Block(config, modulated=False, **make) for _ in refiners)
        self.t_embedder = TimestepEmbedder(config, **make)
        self.cap_embedder = nn.Sequential(
            ops.RMSNorm(config.cap_feat_dim, eps=config.norm_eps, **place),
            ops.Linear(config.cap_feat_dim, config.dim, **place),
        )
        self.layers = nn.ModuleList(Block(config, modulated=True, **make) for _ in layers)
        self.siglip_embedder = self.siglip_refiner = self.siglip_pad_token = None
        if config.siglip_feat_dim is not None:
            self.siglip_embedder, self.siglip_refiner = siglip_part(config, **make)
            self.siglip_pad_token = nn.Parameter(torch.zeros(1, config.dim, **place))
        self.final_layer = FinalLayer(config, **make)
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim, **place))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim, **place))

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        features: Tensor | Sequence[Tensor] | Captions | Sequence[Captions],
        *,
        attention: Attention = attention,
        after_block: AfterBlock | None = None,
        patch_tokens: PatchTokens | None = None,
        rope_options: Mapping[str, float] | None = None,
        captions_first: bool = False,
        controls: Sequence[ActiveControl] = (),
        images: Sequence[int] | None = None,
        shares: Shares = Share,
    ) -> Tensor:
        """One evaluation of the model.

        latents: [B, 16, h, w], h and w even; its dtype is the dtype of the computation.
        t: [B] model time, 0 = pure noise, 1 = image (that is 1 - sigma).
        features: of the text encoder, [B, L, cap_feat_dim], or B of [L_i, cap_feat_dim] where lengths differ; or the
            `Captions` that `refine_captions` or `reference.refine` makes of them, so that a run of several steps does
            it once: of all, or of each.
        patch_tokens: gets a `state` that holds img, txt (tokens now; for "layers" views of the joint sequence, to be
            written in place), img_input (image tokens as they entered the stage), pe (rotations of the image tokens),
            vec (time embedding), x (latents). At "noise_refiner" it may put another tensor at state["img"].
        after_block, patch_tokens: called for each item where a batch is taken apart, as large images with captions of
            different lengths are.
        rope_options: see `rope.image_positions`.
        captions_first: before the image in the joint sequence, for an `attention` that goes by the places of tokens;
            the captions are then to be of one length.
        controls: control networks at work in this step.
        images: which of the step's images each item is, where it is one with several captions; None: each its own.
        shares: which tokens run here, where several processes evaluate the same.

        Returns the velocity towards the image, [B, 16, h, w].
        """
        if len(features) != len(latents):
            raise ValueError(f"{len(latents)} latents but {len(features)} captions")
        if not isinstance(features, (Tensor, Captions)) and not isinstance(features[0], Captions):
            features = self.refine_captions(cast(Any, features), latents.dtype, attention=attention)
        run = partial(
            self._evaluate,
            attention=attention,
            after_block=after_block,
            patch_tokens=patch_tokens,
            rope_options=rope_options,
            captions_first=captions_first,
            controls=controls,
            shares=shares,
        )
        large = latents[0, 0].numel() >= APART * self.config.patch_size**2
        if (large or shares is not Share) and isinstance(features, Captions) and len(features.lengths) > 1:
            features = features.apart()
        if isinstance(features, (Tensor, Captions)):
            return run(latents, t, features, images)
        images = range(len(latents)) if images is None else images
        items = zip(latents.split(1), t.split(1), cast("Sequence[Captions]", features), images, strict=True)
        return torch.cat([run(part, time, caption, [image]) for part, time, caption, image in items])

    def _evaluate(
        self,
        latents: Tensor,
        t: Tensor,
        features: Tensor | Captions,
        images: Sequence[int] | None,
        *,
        attention: Attention,
        after_block: AfterBlock | None,
        patch_tokens: PatchTokens | None,
        rope_options: Mapping[str, float] | None,
        captions_first: bool,
        controls: Sequence[ActiveControl],
        shares: Shares,
    ) -> Tensor:
        config, dtype = self.config, latents.dtype
        height, width = latents.shape[-2:]
        if isinstance(features, Captions):
            captions = features
        else:  # here, so that nobody else holds them any more when they are joined with the image
            captions = self.refine_captions(features, dtype, attention=attention)
        beside = captions.beside
        if controls and beside:
            raise ValueError("reference images and control networks can't be used together; remove one of them")
        if patch_tokens is not None and shares is not Share:
            raise ValueError("tokens that are shared out can't be patched; run without `shares`")
        # patches know clean images where ComfyUI has them, before the one that is made
        last = captions_first or patch_tokens is not None and bool(beside)
        if last and len(captions.lengths) > 1:
            raise ValueError(f"captions have the lengths {captions.lengths}, expected one where they come first")
        order = -1 if last else 1
        images_shown = [latents, *beside.latents[::-1]][::order] if beside else [latents]

        time = self.t_embedder(t, dtype)  # (B, 256)
        embedded = [self._embed_image(self.x_embedder, x, bool(controls)) for x in images_shown]
        counts = [x.shape[1] for x in embedded]
        img = joined([x.expand(len(latents), -1, -1) for x in embedded])  # (B, N, D)
        del embedded
        img_pe = self._image_rotations(captions, images_shown, counts, order, rope_options)  # (1 or B, N, 1, ...)
        n_image, n = height * width // config.patch_size**2, counts[-1 if last else 0]
        times, cap_time, vec = time, time, time
        if beside:
            clean = self.t_embedder(torch.ones_like(t), dtype)
            times = by_token([time, *[clean] * len(beside.latents)][::order], counts)  # (B, N, 256)
            cap_time = by_token([clean, time, clean], beside.spans(captions.tokens.shape[1]))
            vec = torch.cat((clean, time))

        share = shares(img.shape[1])
        run = partial(self._run, attention=share.attention(attention), dtype=time.dtype)
        steering = Steering(controls, lambda embedder, x: self._embed_image(embedder, x.to(latents), True))
        img, tokens = share.part(img), share.tokens(Tokens(img_pe, times, [img.shape[1]]))
        if controls:
            # pads stay in place where the image's tokens move with the caption's length: without, it doesn't matter
            lengths = captions.lengths if n > n_image else [0]
            numbers = range(len(latents)) if images is None else images
            keys = [(image, lengths[i % len(lengths)]) for i, image in enumerate(numbers)]
            steering.refine(img, tokens, keys, share, run)
        state = {"vec": vec, "x": latents}
        if patch_tokens is not None:
            txt = captions.tokens[:, : beside.noisy.stop if beside else None]
            state |= {"img_input": img.clone(), "pe": img_pe, "txt": txt.clone()}
        for index, block in enumerate(self.noise_refiner):
            img = steering.after_refiner(index, run(block, img, tokens))
            if after_block is not None:
                after_block("noise_refiner", index)
            if patch_tokens is not None:
                state["img"] = img
                patch_tokens("noise_refiner", index, state)
                img = state["img"]
        img = share.whole(img)

        cap_pe = captions.rotations.expand(len(img_pe), *captions.rotations.shape[1:])
        x = torch.cat((img, captions.tokens.to(img))[::order], dim=1)  # (B, S, D)
        pe = torch.cat((img_pe, cap_pe)[::order], dim=1)
        if beside:
            times = torch.cat((times, cap_time)[::order], dim=1)  # (B, S, 256)
        before = x.shape[1] - n if last else 0
        image, text = slice(before, before + n), slice(0, before) if last else slice(n, None)
        shown = img.shape[1]
        counts = [shown + length for length in captions.lengths]
        share = shares(x.shape[1])
        run = partial(self._run, attention=share.attention(attention), dtype=time.dtype)
        tokens = every = share.tokens(Tokens(pe, times, counts, _own_mask(counts, x)))
        steering.join(x, captions.tokens, order, share)
        x = share.part(x)
        del img, img_pe, cap_pe, captions, features  # what is joined now need not be kept apart as well
        state = {"vec": vec, "x": latents}
        if patch_tokens is not None:
            state |= {"img_input": x[:, image].clone(), "pe": pe[:, image]}
        for index, block in enumerate(self.layers):
            # of the last only the image's tokens are used
            if index == config.n_layers - 1 and patch_tokens is None and not (last or share.divided):
                tokens = dataclasses.replace(tokens, queries=n_image)
            x = steering.after_layer(index, run(block, x, tokens), every, run)
            if after_block is not None:
                after_block("layers", index)
            if patch_tokens is not None:
                state.update(img=x[:, image], txt=x[:, text])
                patch_tokens("layers", index, state)
        x = share.whole(x)
        x = self.final_layer(x[:, before : before + n_image], time)  # (B, h/2 * w/2, 64)
        return unpatchify(x, height, width, config.patch_size)

    def refine_captions(
        self, features: Tensor | Sequence[Tensor], dtype: torch.dtype, *, attention: Attention = attention
    ) -> Captions:
        """Caption features, as `forward` takes them, through the embedder and the context refiner; in `dtype`."""
        cap, lengths = self._embed_caption(features, dtype)  # (B, L, D)
        cap = self._widened(cap)
        pe = self._rotations(caption_positions(cap.shape[1], cap.device))
        own = _own_mask(lengths, cap)
        for block in self.context_refiner:
            cap = self._run(block, cap, Tokens(pe, None, lengths, own), attention, dtype)
        return Captions(cap, lengths, pe)

    def _widened(self, tokens: Tensor, steered: bool = False) -> Tensor:
        """Tokens in the dtype in which all blocks' results are added to them, and hints where it is steered."""
        fit = self.sums_fit_half and not steered
        return tokens.float() if tokens.dtype == torch.float16 and not fit else tokens

    def _embed_image(self, embedder: nn.Module, latents: Tensor, steered: bool) -> Tensor:
        """Latents as padded tokens [B, N, D]."""
        x = embedder(patchify(latents, self.config.patch_size))  # (B, h/2 * w/2, D)
        pads = padded(x.shape[1]) - x.shape[1]
        if torch.compiler.is_compiling() or pads:  # asked there, it would be compiled once for each answer
            # a root parameter: hosts that move leaf modules leave it behind, so it is moved here
            token = self.x_pad_token.to(x)
            x = torch.cat((x, token.expand(len(x), pads, -1)), dim=1)
        return self._widened(x, steered)

    def _embed_caption(self, features: Tensor | Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
        """Captions [B, L, D] and their padded lengths."""
        if isinstance(features, Tensor):
            lengths = [features.shape[1]]  # how many there are may vary when this is compiled
            total = padded(lengths[0])
            feats = F.pad(features, (0, 0, 0, total - lengths[0]))
        else:
            lengths = [len(feats) for feats in features]
            total = padded(max(lengths))
            feats = torch.stack([F.pad(item, (0, 0, 0, total - len(item))) for item in features])
        cap = self.cap_embedder(feats.to(dtype))  # (B, L, D)
        real = _own(lengths, total, cap.device)  # (1 or B, L)
        cap = torch.where(real.unsqueeze(-1), cap, self.cap_pad_token.to(cap))
        padded_lengths = [padded(length) for length in lengths]
        return cap, padded_lengths if min(padded_lengths) < total else [total]

    def _image_rotations(
        self,
        captions: Captions,
        images: Sequence[Tensor],
        counts: Sequence[int],
        order: int,
        rope_options: Mapping[str, float] | None,
    ) -> Tensor:
        """For so many padded tokens of images, kept with the captions: every step of a run needs the same."""
        height, width = images[::order][0].shape[-2:]
        # while it is being compiled, sizes may stand for any, and a key would make constants of them
        options = sorted((rope_options or {}).items())
        key = None if torch.compiler.is_compiling() else (order, height, width, *options)
        if key in captions.image_rotations:
            return captions.image_rotations[key]
        patch, device = self.config.patch_size, captions.tokens.device
        starts = [captions.lengths] if captions.beside is None else [[at] for at in captions.beside.starts[::-1]]
        found = [
            image_positions(start, x.shape[-2] // patch, x.shape[-1] // patch, count, device, rope_options)
            for start, x, count in zip(starts[::order], images, counts, strict=True)
        ]
        rotations = self._rotations(joined(found))
        if key is not None:
            captions.image_rotations[key] = rotations
        return rotations

    def _run(self, block: nn.Module, x: Tensor, tokens: Tokens, attention: Attention, dtype: torch.dtype) -> Tensor:
        """The block, in the way that suits the device. dtype: of the matmuls, x may be wider."""
        if is_as_built(block):
            return block(x, tokens, attention, self._operations(x, dtype))
        # as others know it: all tokens go in and come out, in one dtype
        return block(finite(x.to(dtype)), dataclasses.replace(tokens, queries=None), attention).to(x.dtype)

    def _operations(self, x: Tensor, dtype: torch.dtype) -> Operations:
        """For blocks that nobody has changed."""
        if dtype != torch.float16 and cpu_rows.suits(x, self.compiled):
            return cpu_rows.RowOperations(self.gain, self.compiled)
        if self.compiled:
            return CompiledOperations(self.gain, dtype == torch.float16)
        if dtype == torch.float16:
            return self.half_operations(self.gain)
        return PLAIN if x.device.type == "cpu" else self.lean_operations(self.gain)

    def refines_as_built(self) -> bool:
        """Whether nobody has changed anything in what makes `Captions` of caption features."""
        embedder = (self.cap_embedder, *self.cap_embedder)
        return not any(map(is_changed, embedder)) and all(map(is_as_built, self.context_refiner))

    def _rotations(self, positions: Tensor) -> Tensor:
        return rotations(positions, self.config.axes_dims, self.config.rope_theta)


class TimestepEmbedder(nn.Module):
    def __init__(self, config: TransformerConfig, *, ops: Any, device: Any, dtype: Any):
        super().__init__()
        self.t_scale = config.t_scale
        self.mlp = nn.Sequential(
            ops.Linear(TIME_FREQUENCIES, TIME_HIDDEN, device=device, dtype=dtype),
            nn.SiLU(),
            ops.Linear(TIME_HIDDEN, config.adaln_dim, device=device, dtype=dtype),
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        count = TIME_FREQUENCIES // 2
        exponents = torch.arange(count, dtype=torch.float32, device=t.device) / count
        angles = (t.float() * self.t_scale).unsqueeze(1) * torch.exp(-math.log(MAX_PERIOD) * exponents)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))  # (B, 256)


class FinalLayer(nn.Module):
    def __init__(self, config: TransformerConfig, *, ops: Any, device: Any, dtype: Any):
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_final = ops.LayerNorm(config.dim, eps=FINAL_NORM_EPS, elementwise_affine=False, **place)
        self.linear = ops.Linear(config.dim, config.patch_dim, **place)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(config.adaln_dim, config.dim, **place))

    def forward(self, x: Tensor, adaln: Tensor) -> Tensor:
        scale = 1 + self.adaLN_modulation(adaln).unsqueeze(1)  # (B, 1, D)
        return self.linear((self.norm_final(x) * scale).to(adaln.dtype))  # (B, N, 64)


def _own_mask(counts: Sequence[int], x: Tensor) -> Tensor | None:
    """True where a token of x [B, S, D] is an item's own, [B, 1, 1, S]; None where all are, as masks cost time."""
    if len(counts) == 1:
        return None
    return _own(counts, x.shape[1], x.device)[:, None, None]


def _own(counts: Sequence[int], total: int, device: torch.device) -> Tensor:
    """True for the first counts[i] of `total` tokens, [B, total]. Made on the device: a copy would wait for it."""
    place = torch.arange(total, device=device)
    return torch.stack([place < count for count in counts])
