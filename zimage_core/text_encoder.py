"""The Qwen3 decoder, used as a text encoder: its second-to-last hidden state describes the caption.

Built without what that state never sees: the last layer, the final norm and the language-model head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding

from .config import TextEncoderConfig
from .products import Layers


class TextEncoder(nn.Module):
    """Qwen3 up to `hidden_states[-2]`.

    `ops` supplies Linear, Embedding and RMSNorm (`torch.nn`'s, or a host's namespace of the same names). Parameter
    names are the published ones (`model.layers.0.self_attn.q_proj.weight`), of the layers that are run.
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
        qwen = _qwen_config(config)
        with torch.device("meta"):
            self.model = Qwen3Model(qwen)
        self.model.set_submodule("norm", nn.Identity())  # hidden_states[-2] is taken before the norm
        _replace_leaves(self.model, ops, device, dtype)
        self.model.rotary_emb = Qwen3RotaryEmbedding(qwen)  # its buffer is in no checkpoint, so it is made for real

    def forward(self, input_ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Token ids [B, L], padded on the right, to features [B, L, hidden_size].

        Attention is causal, so padding on the right changes nothing to its left and needs no mask; the caller drops
        the rows of the padding. `dtype` is the dtype of the computation where it differs from the weights'.
        """
        embeds = self.model.embed_tokens(input_ids)  # (B, L, hidden_size)
        if dtype is not None:
            embeds = embeds.to(dtype)
        return self.model(inputs_embeds=embeds, use_cache=False).last_hidden_state


def _qwen_config(config: TextEncoderConfig) -> Qwen3Config:
    qwen = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers - 1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act="silu",
        attention_bias=False,
        use_cache=False,
        pad_token_id=None,
        **_rope_argument(config.rope_theta),
    )
    qwen._attn_implementation = "sdpa"
    return qwen


def _rope_argument(theta: float) -> dict[str, Any]:
    # transformers 5 keeps the base of the rotary embedding in a dictionary, 4 in a field of its own
    if "rope_theta" in vars(Qwen3Config()):
        return {"rope_theta": theta}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _replace_leaves(model: nn.Module, ops: Any, device: Any, dtype: Any) -> None:
    place = {"device": device, "dtype": dtype}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                new = ops.Linear(child.in_features, child.out_features, bias=child.bias is not None, **place)
            elif type(child) is nn.Embedding:
                new = ops.Embedding(child.num_embeddings, child.embedding_dim, **place)
            elif type(child) is Qwen3RMSNorm:
                new = ops.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, **place)
            else:
                continue
            setattr(parent, name, new)
