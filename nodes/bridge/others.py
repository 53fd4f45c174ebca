"""What nodes of other packs look for on our networks: the attributes of ComfyUI's own ones."""

from __future__ import annotations

from typing import Any

from comfy.ldm.flux.layers import EmbedND
from torch import Tensor

from ...zimage_core.config import TransformerConfig, VAEConfig
from ...zimage_core.model.block import is_changed
from ...zimage_core.model.patchify import SEQ_MULTIPLE
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
        **({} if config.siglip_feat_dim is None else {"siglip_feat_dim": config.siglip_feat_dim}),
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
    network.clip_text_pooled_proj = None
    refiners = (*network.noise_refiner, *network.context_refiner, *(network.siglip_refiner or ()))
    for block in (*refiners, *network.layers):
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
