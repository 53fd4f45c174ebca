"""The Qwen3 decoder, used as a text encoder: its second-to-last hidden state describes the caption.

Built without what that state never sees: the last layer, the final norm and the language-model head; a host that also
generates text has the first two (`TextEncoderConfig.whole`), and takes the table of the embeddings for the third.
Parameter names are the published ones (`model.layers.0.self_attn.q_proj.weight`).

Letters: B batch, L tokens, D width (2560).

Details that have caused bugs elsewhere:
  - queries are wider than the model: 32 heads of 128 are 4096; keys and values have 8 heads, each for 4 of the queries
  - each head of q and k is normed before it is rotated
  - RoPE turns channel j with channel j + head_dim/2, not neighbors as the transformer's does
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.matmul import Layers
from ..config import TextEncoderConfig

LAYER = -2  # the hidden state that Z-Image is trained on; -1 would be what the last layer makes


class TextEncoder(nn.Module):
    """Qwen3 up to `hidden_states[-2]`, or all of it.

    `ops` supplies Linear, Embedding and RMSNorm (`torch.nn`'s, or a host's namespace of the same names).
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        *,
        ops: Any = Layers,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        self.last = -1 if config.whole else LAYER
        self.model = Decoder(config, config.num_hidden_layers + 1 + self.last, ops, device=device, dtype=dtype)

    def forward(self, input_ids: Tensor, dtype: torch.dtype | None = None, layer: int = LAYER) -> Tensor:
        """Token ids [B, L], padded on the right, to features [B, L, D].

        Attention is causal, so padding on the right changes nothing to its left and needs no mask; the caller drops
        the rows of the padding.

        dtype: of the computation, where it differs from the weights'.
        layer: which of the hidden states, counted from the end: the more negative the earlier, down to
            -num_hidden_layers, which the first layer makes. The last that is built is -2, or -1 of a whole one, which
            comes without the final norm. Others raise ValueError.
        """
        count = self.config.num_hidden_layers
        if not -count <= layer <= self.last:
            raise ValueError(f"layer is {layer}, expected {-count} to {self.last}")
        return self.model(input_ids, dtype, count + 1 + layer)


class Decoder(nn.Module):
    """Embeddings and `depth` layers; `norm` is for who generates text."""

    def __init__(self, config: TextEncoderConfig, depth: int, ops: Any, **place: Any):
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = ops.Embedding(config.vocab_size, config.hidden_size, **place)
        self.layers = nn.ModuleList(DecoderLayer(config, ops, **place) for _ in range(depth))
        if config.whole:
            self.norm = ops.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **place)

    def forward(self, input_ids: Tensor, dtype: torch.dtype | None, depth: int) -> Tensor:
        """Token ids [B, L] to what the first `depth` layers make of them, [B, L, D]."""
        x = self.embed_tokens(input_ids)
        if dtype is not None:
            x = x.to(dtype)
        rotation = rotations(x.shape[1], self.head_dim, self.rope_theta, x.device)
        for layer in list(self.layers)[:depth]:
            x = layer(x, rotation)
        return x


class DecoderLayer(nn.Module):
    """Attention and gated MLP, an RMSNorm before each."""

    def __init__(self, config: TextEncoderConfig, ops: Any, **place: Any):
        super().__init__()
        self.self_attn = CausalAttention(config, ops, **place)
        self.mlp = GatedMLP(config, ops, **place)
        self.input_layernorm = ops.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **place)
        self.post_attention_layernorm = ops.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **place)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalAttention(nn.Module):
    def __init__(self, config: TextEncoderConfig, ops: Any, **place: Any):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = ops.Linear(config.hidden_size, queries, bias=False, **place)
        self.k_proj = ops.Linear(config.hidden_size, keys, bias=False, **place)
        self.v_proj = ops.Linear(config.hidden_size, keys, bias=False, **place)
        self.o_proj = ops.Linear(queries, config.hidden_size, bias=False, **place)
        self.q_norm = ops.RMSNorm(config.head_dim, eps=config.rms_norm_eps, **place)
        self.k_norm = ops.RMSNorm(config.head_dim, eps=config.rms_norm_eps, **place)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)  # (B, L, heads, head_dim)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, heads, L, head_dim)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, config: TextEncoderConfig, ops: Any, **place: Any):
        super().__init__()
        self.gate_proj = ops.Linear(config.hidden_size, config.intermediate_size, bias=False, **place)
        self.up_proj = ops.Linear(config.hidden_size, config.intermediate_size, bias=False, **place)
        self.down_proj = ops.Linear(config.intermediate_size, config.hidden_size, bias=False, **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotations(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions 0 to length - 1, each [length, 1, head_dim/2] float32; the 1 is the head axis.

    Channel pair j turns by position * theta^(-2j/head_dim), in float32 throughout, as the model was trained.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponents).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channels (j, j + head_dim/2) of q or k [B, L, heads, head_dim]; in float32, back in x's dtype."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
