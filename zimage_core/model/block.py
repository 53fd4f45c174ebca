"""A block of the S3-DiT, written once: attention and a gated MLP over any tokens, by any bundle of operations.

Parameter names are those of the single-file checkpoints (fused `qkv`).

Letters: B batch, S tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.modules.module as module_hooks
from torch import Tensor, nn

from ..backends.matmul import LINEAR_KINDS
from ..backends.operations import PLAIN, Modulation, Operations, Tokens
from ..config import BlockConfig
from .attention import Attention

NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")  # of a block


class Block(nn.Module):
    """Attention and gated MLP, each between two RMSNorms; modulated by the time unless it refines the caption."""

    def __init__(self, config: BlockConfig, *, modulated: bool, ops: Any, device: Any, dtype: Any):
        super().__init__()
        self.kinds = (ops.Linear, ops.RMSNorm)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = JointAttention(config, ops, **place)
        self.feed_forward = FeedForward(config, ops, **place)
        self.attention_norm1 = ops.RMSNorm(config.dim, eps=config.norm_eps, **place)
        self.ffn_norm1 = ops.RMSNorm(config.dim, eps=config.norm_eps, **place)
        self.attention_norm2 = ops.RMSNorm(config.dim, eps=config.norm_eps, **place)
        self.ffn_norm2 = ops.RMSNorm(config.dim, eps=config.norm_eps, **place)
        if modulated:
            self.adaLN_modulation = nn.Sequential(ops.Linear(config.adaln_dim, 4 * config.dim, **place))

    def forward(self, x: Tensor, tokens: Tokens, attention: Attention, operations: Operations = PLAIN) -> Tensor:
        """x [B, S, D] to [B, tokens.queries, D], all tokens unless told. Some bundles overwrite x.

        Bundles other than the plain one are for a block that `is_as_built`.
        """
        modulation = operations.modulation(self, x, tokens.time)
        return operations.by_item(partial(self._run, attention, operations), x, tokens, modulation)

    def _run(
        self, attention: Attention, operations: Operations, x: Tensor, tokens: Tokens, modulation: Modulation
    ) -> Tensor:
        m = modulation.of_queries(tokens.queries)
        h = self.attention(operations.norm(self.attention_norm1, x, m.before_attention), tokens, attention, operations)
        x = operations.add_normed(x[:, : tokens.queries], h, self.attention_norm2, m.after_attention, operations.shrink)
        del h  # the MLP is where a step needs most memory
        h = self.feed_forward(operations.norm(self.ffn_norm1, x, m.before_mlp), operations)
        return operations.add_normed(x, h, self.ffn_norm2, m.after_mlp, operations.shrink**2)


class JointAttention(nn.Module):
    def __init__(self, config: BlockConfig, ops: Any, **place: Any):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = ops.Linear(config.dim, 3 * config.dim, bias=False, **place)
        self.out = ops.Linear(config.dim, config.dim, bias=False, **place)
        self.q_norm = ops.RMSNorm(config.head_dim, eps=config.norm_eps, **place)
        self.k_norm = ops.RMSNorm(config.head_dim, eps=config.norm_eps, **place)

    def forward(self, x: Any, tokens: Tokens, attention: Attention, operations: Operations = PLAIN) -> Any:
        q, k, v = operations.heads(operations.linear(self.qkv, x), self, tokens)  # each (B, heads, S, head_dim)
        return operations.linear(self.out, attention(q, k, v, tokens.attended()))  # (B, queries, D)


class FeedForward(nn.Module):
    def __init__(self, config: BlockConfig, ops: Any, **place: Any):
        super().__init__()
        self.w1 = ops.Linear(config.dim, config.ffn_dim, bias=False, **place)
        self.w2 = ops.Linear(config.ffn_dim, config.dim, bias=False, **place)
        self.w3 = ops.Linear(config.dim, config.ffn_dim, bias=False, **place)

    def forward(self, x: Any, operations: Operations = PLAIN) -> Any:
        gated = operations.gated(operations.linear(self.w1, x), operations.linear(self.w3, x))
        return operations.linear(self.w2, gated)


def is_as_built(block: Any) -> bool:
    """Whether nobody has replaced a block, a part of it or a forward, or put hooks there.

    Only then may it run in another way than by its forward: those ways read the weights of norms and call the rest as
    suits them. What somebody has put there is called as it expects. Asked for every block of every step.
    """
    own = isinstance(block, Block) and type(block).forward is Block.forward
    if not own or module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return False
    parts: dict[str, Any] = block._modules  # `block.attention` and the like take three times as long
    attention, mlp = parts["attention"], parts["feed_forward"]
    if type(attention) is not JointAttention or type(mlp) is not FeedForward:
        return False
    heads: dict[str, Any] = attention._modules
    norms = [parts[name] for name in NORMS] + [heads["q_norm"], heads["k_norm"]]
    linears = [heads["qkv"], heads["out"], *mlp._modules.values()]
    linear, norm = block.kinds
    return (
        all(type(part) is norm for part in norms)
        and all(type(part) is linear or type(part) in LINEAR_KINDS for part in linears)
        and not any(map(is_changed, (block, attention, mlp, *norms, *linears)))
    )


def is_changed(module: nn.Module) -> bool:
    own = vars(module)
    if "forward" in own:  # ComfyUI puts a forward back by setting what it had found, the module's own
        own_forward = getattr(own["forward"], "__func__", None) is type(module).forward
        if not own_forward or own["forward"].__self__ is not module:
            return True
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"])
