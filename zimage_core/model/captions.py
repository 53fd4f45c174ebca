"""Captions as every step of a run needs them, and what stands beside them.

Letters: B batch, L caption tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Beside:
    """Clean images beside the one that is made."""

    latents: list[Tensor]  # [1 or B, 16, h, w] each
    starts: list[int]  # position behind which each of them, then the one that is made, stands along the first axis
    noisy: slice  # which tokens of the captions belong to the image that is made; what follows are features

    def spans(self, total: int) -> list[int]:
        """How many of so many tokens of the captions are clean, noisy and clean again."""
        return [self.noisy.start, self.noisy.stop - self.noisy.start, total - self.noisy.stop]


@dataclass(frozen=True)
class Captions:
    """Embedded, refined, with their rotations.

    Nothing here depends on the latents or the time, so it is computed once for a prompt.
    """

    tokens: Tensor  # [B, L, D]
    lengths: list[int]  # with the padding that belongs to it, multiples of 32: of each caption, or one if all have L
    rotations: Tensor  # [1, L, 1, head_dim/2, 2, 2]
    beside: Beside | None = None
    image_rotations: dict[Any, Tensor] = field(default_factory=dict)  # of image tokens with them, by image size
    items: list[Captions] = field(default_factory=list)  # see `apart`

    def __len__(self) -> int:
        return len(self.tokens)

    def apart(self) -> list[Captions]:
        """Each caption on its own, without what pads it to the longest of the batch."""
        if not self.items:
            parts = enumerate(self.lengths)
            self.items.extend(Captions(self.tokens[i : i + 1, :n], [n], self.rotations[:, :n]) for i, n in parts)
        return self.items


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tokens [B, S_i, ...] behind each other; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def by_token(times: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Embedded times [B, A], each for so many tokens: [B, S, A]."""
    return joined([time.unsqueeze(1).expand(-1, count, -1) for time, count in zip(times, counts, strict=True)])
