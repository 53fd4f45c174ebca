"""Control networks of the Fun-Controlnet-Union kind, which steer a transformer by an image.

They read embedded control latents beside the transformer's own tokens and give hints, which are added to these. As its
makers run it (aigc-apps/VideoX-Fun, z_image_transformer2d_control.py), with e the embedded control latents, x the image
tokens before the noise refiner, u those of image and caption before the first layer, s the strength, P and A the
projections before the first and after each block:

    refiner  c0 = P e + x;            c[j+1] = B[j](c[j]);  noise refiner j puts out s A[j] c[j+1] more
    layers   q0 = P [c2, caption] + u; q[k+1] = B[k](q[k]);  layer places[k] puts out s A[k] q[k+1] more

In the refiner of 1.0, e runs through two blocks without projections and gives no hints. The refiner of 2.0 is the 15
blocks of the layers, of whose hints the first two count. ComfyUI leaves the caption out of q, diffusers leaves the
hints out of the noise refiner.

Letters: B batch, N image tokens, S image and caption tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.matmul import Layers
from ..backends.operations import Tokens
from ..config import ControlConfig, TransformerConfig
from .block import Block
from .share import Share

Run = Callable[[nn.Module, Tensor, Tokens], Tensor]  # a block over tokens, in the transformer's way
Embed = Callable[[nn.Module, Tensor], Tensor]  # latents by an embedder, padded as the transformer pads: [B, N, D]


class ControlBlock(Block):
    """A block whose result, projected, is a hint."""

    def __init__(self, config: ControlConfig, *, first: bool, ops: Any, device: Any, dtype: Any):
        super().__init__(config, modulated=True, ops=ops, device=device, dtype=dtype)
        if first:
            self.before_proj = ops.Linear(config.dim, config.dim, device=device, dtype=dtype)
        self.after_proj = ops.Linear(config.dim, config.dim, device=device, dtype=dtype)


class ControlNetwork(nn.Module):
    """The weights of one file; `Steering` runs them."""

    def __init__(
        self,
        config: ControlConfig,
        *,
        ops: Any = Layers,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        make: dict[str, Any] = {"ops": ops, "device": device, "dtype": dtype}
        self.x_embedder = ops.Linear(config.patch_dim, config.dim, device=device, dtype=dtype)
        refiners = range(0 if config.refined == "layers" else config.n_refiner_layers)
        if config.refined == "hints":
            self.noise_refiner = nn.ModuleList(ControlBlock(config, first=not index, **make) for index in refiners)
        else:
            self.noise_refiner = nn.ModuleList(Block(config, modulated=True, **make) for _ in refiners)
        self.layers = nn.ModuleList(ControlBlock(config, first=not index, **make) for index in range(config.n_layers))

    def check(self, transformer: TransformerConfig) -> None:
        """Raises ValueError, naming the number, unless it was made for a transformer of these numbers."""
        own = self.config
        for what, found, expected in (
            ("the width", own.dim, transformer.dim),
            ("the number of heads", own.n_heads, transformer.n_heads),
            ("the number of refiner blocks", own.n_refiner_layers, transformer.n_refiner_layers),
        ):
            if found != expected:
                raise ValueError(
                    f"{what} of this control network is {found}, of the transformer {expected}; "
                    "use a control network that was made for this model"
                )
        if own.places[-1] >= transformer.n_layers:
            raise ValueError(
                f"this control network steers layer {own.places[-1]}, and the transformer has {transformer.n_layers} "
                "layers; use a control network that was made for this model"
            )


@dataclass(frozen=True)
class Refined:
    """What a control network makes of one image in one step whatever the prompt, [1, N, D] each."""

    tokens: Tensor
    hints: list[Tensor]


@dataclass(frozen=True)
class ActiveControl:
    """A control network at work in one step.

    `refined` is shared by the evaluations of a step, those with and without the prompt, and fills itself.
    """

    network: ControlNetwork
    latents: Tensor  # [1 or images, in_channels, h, w]: see `control_latents`
    strength: float | Tensor  # of all items, or [B, 1, 1] of each
    refined: dict[Any, Refined] = field(default_factory=dict)


def control_latents(image: Tensor | None, keep: Tensor | None, masked: Tensor | None, config: ControlConfig) -> Tensor:
    """What a control network reads: [B, in_channels, h, w], of scaled latents [B, 16, h, w].

    image: of the control image, None is zeros, as in training where it was missing.
    keep: [B, 1, h, w], 1 where the image below stays and 0 where it is repainted; None is 0 everywhere.
    masked: of the image with gray where it is repainted, None is zeros. With keep 0, that is what training saw most of
    where there was nothing to repaint (scripts/z_image_fun/train_control.py of VideoX-Fun).
    """
    like = image if image is not None else masked
    if like is None:
        raise ValueError("a control network needs a control image, or an image to repaint and its mask")
    image = torch.zeros_like(like) if image is None else image
    if not config.inpaints:
        return image
    keep = torch.zeros_like(like[:, :1]) if keep is None else keep
    masked = torch.zeros_like(like) if masked is None else masked
    return torch.cat((image, keep.to(like), masked), dim=1)


class Steering:
    """The hints of all controls in one evaluation of a transformer. Methods are called in the order they stand in."""

    def __init__(self, controls: Sequence[ActiveControl], embed: Embed):
        self.controls = controls
        self.embed = embed
        self.refined: list[Refined] = []  # of each control, for all items
        self.states: list[Tensor] = []  # tokens of each control's layers, [B, S, D]

    def refine(self, img: Tensor, tokens: Tokens, keys: Sequence[Any], share: Share, run: Run) -> None:
        """img: tokens [B, N, D] before the noise refiner. keys: (image, ...) of items; equal ones get equal hints."""
        for control in self.controls:
            missing = [i for i, key in enumerate(keys) if key not in control.refined and key not in keys[:i]]
            if missing:
                latents = _picked(control.latents, [keys[i][0] % len(control.latents) for i in missing])
                time = None if tokens.time is None else _picked(tokens.time, missing)
                rotations = _picked(tokens.rotations, [i % len(tokens.rotations) for i in missing])
                control_tokens = share.part(self.embed(control.network.x_embedder, latents))
                own = Tokens(rotations, time, tokens.counts)
                found = _refined(control.network, control_tokens, _picked(img, missing), own, share, run)
                control.refined.update(zip([keys[i] for i in missing], found, strict=True))
            parts = [control.refined[key] for key in keys]
            hints = zip(*(part.hints for part in parts), strict=True)
            self.refined.append(Refined(_joined([part.tokens for part in parts]), [_joined(hint) for hint in hints]))

    def after_refiner(self, index: int, img: Tensor) -> Tensor:
        """Tokens that this block of the noise refiner puts out, with the hints."""
        for control, refined in zip(self.controls, self.refined, strict=True):
            if refined.hints:
                img = _added(img, refined.hints[index], control.strength)
        return img

    def join(self, x: Tensor, captions: Tensor, order: int, share: Share) -> None:
        """x: tokens [B, S, D] before the first layer. order: -1 where captions [B, L, D] precede the image, else 1."""
        for control, refined in zip(self.controls, self.refined, strict=True):
            first: Any = control.network.layers[0]
            joined = torch.cat((refined.tokens, captions.to(refined.tokens))[::order], dim=1)
            self.states.append(first.before_proj(share.part(joined)) + share.part(x))
        self.refined = []

    def after_layer(self, index: int, x: Tensor, tokens: Tokens, run: Run) -> Tensor:
        """Tokens that this layer puts out, perhaps only the first ones, with the hints."""
        for number, control in enumerate(self.controls):
            places = control.network.config.places
            if index in places:
                block: Any = control.network.layers[places.index(index)]
                state = self.states[number] = run(block, self.states[number], tokens)
                x = _added(x, block.after_proj(state[:, : x.shape[1]]), control.strength)
        return x


def _refined(network: ControlNetwork, c: Tensor, img: Tensor, tokens: Tokens, share: Share, run: Run) -> list[Refined]:
    """c: embedded control latents [B, N, D]; img: the image's tokens there. For each item."""
    refined = network.config.refined
    hints: list[Tensor] = []
    if refined == "blocks":
        for block in network.noise_refiner:
            c = run(block, c, tokens)
    else:
        blocks: Any = network.layers if refined == "layers" else network.noise_refiner
        c = blocks[0].before_proj(c) + img
        for block in blocks:
            c = run(block, c, tokens)
            if len(hints) < network.config.n_refiner_layers:
                hints.append(block.after_proj(c))
    c = share.whole(c)
    return [Refined(c[i : i + 1], [hint[i : i + 1] for hint in hints]) for i in range(len(c))]


def _added(x: Tensor, hint: Tensor, strength: float | Tensor) -> Tensor:
    if isinstance(strength, Tensor):
        return torch.addcmul(x, hint, strength.to(x))
    return torch.add(x, hint, alpha=strength)


def _picked(x: Tensor, items: Sequence[int]) -> Tensor:
    """These items of x [B, ...], without a list of numbers that would be copied to the device."""
    return _joined([x[item : item + 1] for item in items])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
