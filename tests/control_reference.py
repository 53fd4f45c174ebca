"""Z-Image steered by a control network, for one item, one line per equation; slow and plain on purpose.

Written from the published code of the networks (aigc-apps/VideoX-Fun, z_image_transformer2d_control.py), over tensors
by their published names: no module of ours takes part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


class Numbers(NamedTuple):
    """Those of a transformer's config.json, as far as weights don't tell them."""

    heads: int
    axes: tuple[int, ...]
    places: tuple[int, ...]  # of the control network's layers
    refined: str  # "blocks" (1.0), "hints" (2.1) or "layers" (2.0)
    eps: float = 1e-5
    theta: float = 256.0
    time_scale: float = 1000.0


class Outcome(NamedTuple):
    velocity: Tensor  # [16, h, w], towards the image
    control: Tensor  # state of the control network after its last layer


def steered(
    w: Weights,
    c: Weights | None,
    n: Numbers,
    latents: Tensor,
    t: float,
    caption: Tensor,
    control: Tensor | None = None,
    strength: float = 1.0,
    *,
    caption_in_control: bool = True,
    hints_in_refiner: bool = True,
) -> Outcome:
    """w, c: transformer, control network. latents [16, h, w], caption [L, F], control [C, h, w].

    caption_in_control, hints_in_refiner: what ComfyUI and diffusers leave out.
    """
    height, width = latents.shape[-2:]
    count = height * width // 4
    pads = -count % 32
    length = len(caption) + -len(caption) % 32
    time = _linear(w, "t_embedder.mlp.2", F.silu(_linear(w, "t_embedder.mlp.0", _sinusoids(t * n.time_scale))))

    image_at = [(length + 1.0, float(y), float(x)) for y in range(height // 2) for x in range(width // 2)]
    image_turns = _turns(image_at + [(0.0, 0.0, 0.0)] * pads, n)
    caption_turns = _turns([(1.0 + k, 0.0, 0.0) for k in range(length)], n)

    x = _padded(_linear(w, "all_x_embedder.2-1", _tokens(latents)), w["x_pad_token"], pads)
    state = refiner_hints = None
    if c is not None:
        e = _padded(_linear(c, "control_all_x_embedder.2-1", _tokens(control)), w["x_pad_token"], pads)
        state, refiner_hints = _refined(c, n, e, x, time, image_turns)
    for j in range(_count(w, "noise_refiner")):
        x = _block(w, f"noise_refiner.{j}", n, x, time, image_turns)
        if refiner_hints and hints_in_refiner:
            x = x + strength * refiner_hints[j]

    normed = _rms(caption, w["cap_embedder.0.weight"], n)
    cap = _padded(_linear(w, "cap_embedder.1", normed), w["cap_pad_token"], length - len(caption))
    for j in range(_count(w, "context_refiner")):
        cap = _block(w, f"context_refiner.{j}", n, cap, None, caption_turns)

    u = torch.cat((x, cap))
    turns = torch.cat((image_turns, caption_turns))
    hints: dict[int, Tensor] = {}
    if c is not None and caption_in_control:
        state, found = _stack(c, "control_layers", n, torch.cat((state, cap)), u, time, turns)
        hints = dict(zip(n.places, found, strict=True))
    elif c is not None:
        state, found = _stack(c, "control_layers", n, state, x, time, image_turns)
        hints = {at: F.pad(hint, (0, 0, 0, length)) for at, hint in zip(n.places, found, strict=True)}
    for i in range(_count(w, "layers")):
        u = _block(w, f"layers.{i}", n, u, time, turns)
        if i in hints:
            u = u + strength * hints[i]

    scale = 1 + _linear(w, "all_final_layer.2-1.adaLN_modulation.1", F.silu(time))
    out = _linear(w, "all_final_layer.2-1.linear", F.layer_norm(u, u.shape[-1:], eps=1e-6) * scale)[:count]
    velocity = out.view(height // 2, width // 2, 2, 2, -1).permute(4, 0, 2, 1, 3).reshape(-1, height, width)
    return Outcome(velocity, state)


def _refined(
    c: Weights, n: Numbers, e: Tensor, x: Tensor, time: Tensor, turns: Tensor
) -> tuple[Tensor, list[Tensor] | None]:
    if n.refined == "blocks":
        for j in range(_count(c, "control_noise_refiner")):
            e = _block(c, f"control_noise_refiner.{j}", n, e, time, turns)
        return e, None
    stack = "control_layers" if n.refined == "layers" else "control_noise_refiner"
    return _stack(c, stack, n, e, x, time, turns)


def _stack(
    c: Weights, name: str, n: Numbers, state: Tensor, x: Tensor, time: Tensor, turns: Tensor
) -> tuple[Tensor, list[Tensor]]:
    hints = []
    state = _linear(c, f"{name}.0.before_proj", state) + x
    for k in range(_count(c, name)):
        state = _block(c, f"{name}.{k}", n, state, time, turns)
        hints.append(_linear(c, f"{name}.{k}.after_proj", state))
    return state, hints


def _block(w: Weights, name: str, n: Numbers, x: Tensor, time: Tensor | None, turns: Tensor) -> Tensor:
    def norm(which: str, value: Tensor) -> Tensor:
        return _rms(value, w[f"{name}.{which}.weight"], n)

    one = torch.ones(1)
    scale_a = gate_a = scale_m = gate_m = one
    if time is not None:
        scale_a, gate_a, scale_m, gate_m = _linear(w, f"{name}.adaLN_modulation.0", time).chunk(4)
        scale_a, gate_a, scale_m, gate_m = 1 + scale_a, gate_a.tanh(), 1 + scale_m, gate_m.tanh()
    h = norm("attention_norm1", x) * scale_a
    q, k, v = (F.linear(h, w[f"{name}.attention.to_{part}.weight"]).unflatten(-1, (n.heads, -1)) for part in "qkv")
    q = _turned(_rms(q, w[f"{name}.attention.norm_q.weight"], n), turns)
    k = _turned(_rms(k, w[f"{name}.attention.norm_k.weight"], n), turns)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    x = x + gate_a * norm("attention_norm2", F.linear(mixed, w[f"{name}.attention.to_out.0.weight"]))
    h = norm("ffn_norm1", x) * scale_m
    gated = F.silu(F.linear(h, w[f"{name}.feed_forward.w1.weight"])) * F.linear(h, w[f"{name}.feed_forward.w3.weight"])
    return x + gate_m * norm("ffn_norm2", F.linear(gated, w[f"{name}.feed_forward.w2.weight"]))


def _tokens(latents: Tensor) -> Tensor:
    channels, height, width = latents.shape
    cut = latents.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 2, 4, 0)
    return cut.reshape(height * width // 4, 4 * channels)


def _padded(x: Tensor, token: Tensor, pads: int) -> Tensor:
    return torch.cat((x, token.expand(pads, -1)))


def _sinusoids(t: float) -> Tensor:
    angles = t * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    return torch.cat((angles.cos(), angles.sin()))


def _turns(places: list[tuple[float, float, float]], n: Numbers) -> Tensor:
    parts = []
    for axis, size in enumerate(n.axes):
        speeds = n.theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.tensor([place[axis] for place in places], dtype=torch.float64)[:, None] * speeds
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, dim=1).to(torch.complex64)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def _rms(x: Tensor, weight: Tensor, n: Numbers) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + n.eps).sqrt() * weight


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _count(w: Weights, name: str) -> int:
    return len({key.split(".")[1] for key in w if key.startswith(f"{name}.")})
