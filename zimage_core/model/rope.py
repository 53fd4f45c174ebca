"""Three-axis rotary position embedding: (sequence, row, column).

A caption token sits at (1 + k, 0, 0), an image token at (Lp + 1, row, column) with Lp the *padded* caption length.
Image padding sits at (0, 0, 0), caption padding goes on counting: the model was trained so.

Letters: B batch, N tokens, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def caption_positions(length: int, device: torch.device | None = None) -> Tensor:
    """Positions of a padded caption: [1, length, 3] float32."""
    k = torch.arange(1, length + 1, device=device, dtype=torch.float32)
    return torch.stack((k, torch.zeros_like(k), torch.zeros_like(k)), dim=-1).unsqueeze(0)


def image_positions(
    caption_lengths: Sequence[int],
    rows: int,
    columns: int,
    padded_length: int,
    device: torch.device | None = None,
    rope_options: Mapping[str, float] | None = None,
) -> Tensor:
    """Positions of the image tokens behind captions of these padded lengths: [len(caption_lengths), padded_length, 3].

    `rope_options` stretches and shifts the grid (keys scale_x, scale_y, shift_x, shift_y, as ComfyUI names them).
    """
    options = rope_options or {}
    # filled on the device: a copy would make the CPU wait for it
    f = torch.stack([torch.full((), length + 1.0, device=device) for length in caption_lengths])
    y = torch.arange(rows, device=device) * options.get("scale_y", 1.0) + options.get("shift_y", 0.0)
    x = torch.arange(columns, device=device) * options.get("scale_x", 1.0) + options.get("shift_x", 0.0)
    grid = torch.broadcast_tensors(f.view(-1, 1, 1), y.view(-1, 1), x)  # three of (B, rows, columns)
    return F.pad(torch.stack(grid, dim=-1).flatten(1, 2), (0, 0, 0, padded_length - rows * columns))


def rotations(positions: Tensor, axes_dims: Sequence[int], theta: float) -> Tensor:
    """A 2x2 rotation for each pair of head channels: [B, N, 3] -> [B, N, 1, D/2, 2, 2] float32.

    Channel pair j of an axis of width d turns by position * theta^(-2j/d). Angles are computed in float64 and rounded
    once, as the reference does; the 1 is the head axis.
    """
    exact = (positions if _has_float64(positions.device) else positions.cpu()).double()
    angles = []
    for axis, width in enumerate(axes_dims):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=exact.device) / width
        angles.append(exact[..., axis, None] * theta**-exponents)
    angle = torch.cat(angles, dim=-1).float()  # (B, N, D/2)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))  # (B, N, D/2, 2, 2)
    return matrix.unsqueeze(2).to(positions.device)


def _has_float64(device: torch.device) -> bool:
    # the others are asked, but not while this is being compiled, where nothing can be tried
    return device.type in ("cpu", "cuda") or not torch.compiler.is_compiling() and _computes_in_float64(device)


@functools.cache
def _computes_in_float64(device: torch.device) -> bool:
    """Tries what `rotations` does: many devices have no float64 (MPS, some of XPU and DirectML), and none tells."""
    try:
        (torch.ones(2, device=device).double() * 2.0 ** -torch.arange(2, dtype=torch.float64, device=device)).float()
    except (RuntimeError, TypeError):
        return False
    return True


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns neighboring channels (2j, 2j+1) of q or k [B, N, heads, D]; in float32, back in x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))  # (B, N, heads, D/2, 1, 2)
    rotated = rotation[..., 0] * pairs[..., 0] + rotation[..., 1] * pairs[..., 1]  # (B, N, heads, D/2, 2)
    return rotated.flatten(-2).to(x.dtype)
