"""Latents to image tokens and back, and the padding of token sequences."""

from __future__ import annotations

from torch import Tensor

SEQ_MULTIPLE = 32  # token sequences are padded to a multiple of this; the pads are attended (reference SEQ_MULTI_OF)


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 32."""
    return -(-length // SEQ_MULTIPLE) * SEQ_MULTIPLE


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[B, C, h, w] -> [B, (h/p)(w/p), p*p*C]: tokens row by row, inside a token (row, column, channel)."""
    batch, channels, height, width = latents.shape
    if height % patch or width % patch:
        raise ValueError(
            f"latents of {width}x{height} pixels can't be cut into {patch}x{patch} patches; "
            "width and height of the image must be divisible by 16"
        )
    x = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // patch) * (width // patch), patch * patch * channels)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """The inverse of `patchify`, for latents of height x width pixels: [B, N, p*p*C] -> [B, C, h, w]."""
    x = tokens.unflatten(1, (height // patch, width // patch)).unflatten(3, (patch, patch, -1))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, height, width)
