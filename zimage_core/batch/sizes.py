"""How many images are sampled together: what was asked for, what is fastest, and what fits in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

MOST = 8  # more images of the size that Z-Image is made for leave no faster
# Four steps of nano on a slow core took 119, 69, 59, 34 and 36 ms an image for 1, 2, 4, 8 and 16 images of 64x64 (16
# tokens), 123, 82, 65, 61 and 54 of 128x128 (64 tokens), and 219, 206, 188, 191 and 190 of 256x256 (256 tokens): beyond
# about 1024 tokens a batch gains nothing.
CPU_TOKENS = 1024
KEPT_FREE = 0.1  # share of the memory that is free beside a batch of one, for what varies


class Sizes:
    """The size of the next batch, by the tokens of one image (twice those where guidance is on)."""

    def __init__(self, asked: int | None, device: torch.device):
        self.most = asked
        self._device = device
        self._limits: dict[int, int] = {}  # tokens -> what has been found out
        self._peaks: dict[int, dict[int, int]] = {}  # tokens -> images -> bytes at most

    def next(self, tokens: int) -> int:
        """Images for the next batch."""
        if tokens in self._limits:
            return self._limits[tokens]
        if self.most is not None:
            return self.most
        if self._device.type == "cuda":
            return 1 if 1 not in self._peaks.get(tokens, {}) else 2
        if self._device.type == "cpu":
            return max(1, min(MOST, CPU_TOKENS // tokens))
        return 1  # what another device has free can't be asked

    def lower(self, tokens: int, count: int) -> None:
        """So many at most from now on, of images of this size or larger."""
        for known in {tokens, *(other for other in self._limits if other > tokens)}:
            self._limits[known] = max(1, min(count, self._limits.get(known, count)))

    @contextlib.contextmanager
    def measuring(self, tokens: int, count: int) -> Iterator[None]:
        """Around a batch: on a GPU the first of one image and the first of two tell how many fit."""
        peaks = self._peaks.setdefault(tokens, {})
        if self._device.type != "cuda" or self.most is not None or tokens in self._limits or count in peaks:
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        held = torch.cuda.memory_allocated(self._device)
        yield
        peaks[count] = torch.cuda.max_memory_allocated(self._device) - held
        if 1 in peaks and 2 in peaks:
            free = torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device)
            self._limits[tokens] = fitting(free - torch.cuda.memory_allocated(self._device), peaks[1], peaks[2])


def fitting(free: int, one: int, two: int) -> int:
    """How many images fit into so many bytes, where one takes `one` and two take `two`; `MOST` at most."""
    slope = max(two - one, 1)
    return max(1, min(MOST, 1 + int((free * (1 - KEPT_FREE) - one) // slope)))
