"""The one attention function; a host or a faster kernel is passed in its place."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# (q, k, v, mask) with q, k, v [B, heads, N, D]; mask None or bool [B, 1, 1, N], true = attend; gives [B, N, heads * D]
Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over all tokens, by torch's fused kernel. Shapes: see `Attention`."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, D)
    return out.transpose(1, 2).flatten(2)  # (B, N, heads * D)
