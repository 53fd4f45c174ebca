"""Which tokens of a sequence this process runs through the blocks: all, unless `parallel` shares them out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..backends.operations import Tokens
from .attention import Attention


class Share:
    """Of so many tokens, all."""

    divided = False

    def __init__(self, total: int):
        self.total = total

    def part(self, x: Tensor) -> Tensor:
        """Of x [B, total, ...] the tokens of this share, [B, own, ...]."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """Of this share's tokens [B, own, ...], together with those of the others: [B, total, ...]."""
        return x

    def tokens(self, tokens: Tokens) -> Tokens:
        """What blocks are told of this share's tokens."""
        return tokens

    def attention(self, attention: Attention) -> Attention:
        """Over all tokens, called with those of this share."""
        return attention


Shares = Callable[[int], Share]  # number of tokens -> the share of this process
