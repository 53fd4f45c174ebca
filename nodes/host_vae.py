"""VAE: the autoencoder inside ComfyUI's own VAE class, which brings tiling, batching and the out-of-memory fallback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
from torch import Tensor

from ..zimage_core.checkpoint import not_finite, open_component
from ..zimage_core.vae import AutoencoderKL


class ZImageVAE(comfy.sd.VAE):
    """Latents are raw, as on every LATENT socket: scale and shift belong to the MODEL's latent format."""

    def __init__(self, path: str | Path, disable_dynamic: bool = False):
        component = open_component(path, "vae")
        config = component.config
        with _without_warning():
            super().__init__(sd={})  # sets the defaults of a picture VAE and ends where it finds no weights
        self.latent_channels = config.latent_channels
        self.downscale_ratio = self.upscale_ratio = config.downscale
        self.device = mm.vae_device()
        self.vae_dtype = mm.vae_dtype(self.device, self.working_dtypes)
        self.output_device = mm.intermediate_device()

        weights = component.state_dict(self.vae_dtype)
        module = AutoencoderKL(config, ops=comfy.ops.disable_weight_init, device="meta", dtype=self.vae_dtype)
        mm.archive_model_dtypes(module)
        module.load_state_dict(weights, strict=True, assign=True)
        self.first_stage_model = module.requires_grad_(False).eval()

        # The host rebinds CoreModelPatcher when it starts; it must be looked up at the time of the call.
        kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
        self.patcher = kind(module, load_device=self.device, offload_device=mm.vae_offload_device())
        self.patcher.cached_patcher_init = (load_vae_patcher, (str(path),))
        self.model_size()


def decode(vae: comfy.sd.VAE, latents: Tensor) -> Tensor:
    """Raw latents [B, 16, h, w] to pictures [B, H, W, 3], checked: a damaged weight is named."""
    pictures = vae.decode(latents)
    if not pictures.isfinite().all():
        raise not_finite(vae=vae.first_stage_model)
    return pictures


def load_vae_patcher(path: str, disable_dynamic: bool = False):
    return ZImageVAE(path, disable_dynamic).patcher


@contextmanager
def _without_warning() -> Iterator[None]:
    """Drops the host's "No VAE weights detected", which is true at that moment and would alarm for nothing."""

    def is_other(record: logging.LogRecord) -> bool:
        return "No VAE weights" not in record.getMessage()

    root = logging.getLogger()  # the host logs on the root logger
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)
