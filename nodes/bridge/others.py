"""What nodes of other packs look for on our networks: attributes of ComfyUI's own ones, and the order of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.flux.layers import EmbedND
from torch import Tensor

from ...zimage_core.config import TransformerConfig, VAEConfig
from ...zimage_core.model.block import is_changed
from ...zimage_core.model.patchify import SEQ_MULTIPLE, padded
from ...zimage_core.model.rope import rotations

NETWORKS = OURS, NATIVE = ("ComfyUI-ZImage", "ComfyUI")  # whose classes weights are put into, by a loader's input
AXES_LENS = [1536, 512, 512]  # as ComfyUI notes them; nothing computes with them


def native_config(config: TransformerConfig) -> dict[str, Any]:
    """The `unet_config` that ComfyUI itself makes of such a transformer's weights."""
    return {
        "image_model": "lumina2",
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "dim": config.dim,
        "cap_feat_dim": config.cap_feat_dim,
        "n_layers": config.n_layers,
        "n_refiner_layers": config.n_refiner_layers,
        "qk_norm": True,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_heads,
        "axes_dims": list(config.axes_dims),
        "axes_lens": AXES_LENS,
        "rope_theta": config.rope_theta,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True,
        "time_scale": config.t_scale,
        "pad_tokens_multiple": SEQ_MULTIPLE,
    }


class Rotations(EmbedND):
    """Positions [B, N, 3] to [B, 1, N, head_dim/2, 2, 2]: the place where other nodes put their own."""

    def __init__(self, config: TransformerConfig):
        super().__init__(dim=config.head_dim, theta=config.rope_theta, axes_dim=list(config.axes_dims))

    def forward(self, ids: Tensor) -> Tensor:
        return rotations(ids, self.axes_dim, self.theta).movedim(1, 2)

    def is_as_built(self, config: TransformerConfig) -> bool:
        return (self.theta, *self.axes_dim) == (config.rope_theta, *config.axes_dims) and not is_changed(self)


def describe_transformer(network: Any) -> None:
    """Gives our transformer the attributes of the native one, `rope_embedder` among them."""
    config: TransformerConfig = network.config
    network.in_channels = network.out_channels = config.in_channels
    network.patch_size, network.dim, network.n_heads = config.patch_size, config.dim, config.n_heads
    network.axes_dims, network.axes_lens = list(config.axes_dims), AXES_LENS
    network.time_scale, network.pad_tokens_multiple = config.t_scale, SEQ_MULTIPLE
    network.rope_embedder = Rotations(config)
    network.siglip_embedder = network.siglip_refiner = network.siglip_pad_token = None
    network.clip_text_pooled_proj = None
    for block in (*network.noise_refiner, *network.context_refiner, *network.layers):
        block.dim, block.head_dim, block.modulation = config.dim, config.head_dim, hasattr(block, "adaLN_modulation")
        block.attention.head_dim, block.attention.qk_norm, block.attention.n_rep = config.head_dim, True, 1
        block.attention.n_local_heads = block.attention.n_local_kv_heads = config.n_heads
        block.attention.n_kv_heads = config.n_heads


def describe_vae(autoencoder: Any) -> None:
    """Gives our encoder and decoder the attributes by which others walk through the native ones."""
    config: VAEConfig = autoencoder.config
    top, *_ = widths = config.block_out_channels
    for part in (autoencoder.encoder, autoencoder.decoder):
        part.ch, part.temb_ch, part.resolution = top, 0, config.sample_size
        part.num_resolutions, part.num_res_blocks = len(widths), config.layers_per_block
        part.in_channels, part.z_channels = config.in_channels, config.latent_channels
        part.give_pre_end = part.tanh_out = False
        for module in part.modules():
            if hasattr(module, "nin_shortcut"):
                module.in_channels, module.out_channels = module.conv1.in_channels, module.conv1.out_channels
                module.use_conv_shortcut = False
            elif hasattr(module, "proj_out"):
                module.in_channels = module.q.in_channels


Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def captions_first(attend: Attend, latents: Tensor, context: Tensor, patch: int) -> Attend:
    """Attention that another node's function does, which expects captions before the image, as ComfyUI has them.

    latents [B, 16, h, w] and context [B, L, width] of the call. Ours has the image first.
    """
    rows, columns = (-(-side // patch) for side in latents.shape[-2:])
    image, text = padded(rows * columns), padded(context.shape[1])

    def attend_natively(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if k.shape[2] != image + text:  # of a refiner, whose tokens are of one kind
            return attend(q, k, v, mask)
        q, k, v = (torch.cat((x[:, :, image:], x[:, :, :image]), dim=2) for x in (q, k, v))
        out = attend(q, k, v, mask)  # (B, S, heads * head_dim)
        return torch.cat((out[:, text:], out[:, :text]), dim=1)

    return attend_natively
