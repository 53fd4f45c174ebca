"""VAE: the autoencoder inside ComfyUI's own VAE class, which brings tiling, batching and the out-of-memory fallback.

Where memory is short, ours runs in bands of rows: the same image, before ComfyUI would have to cut it into tiles. On
a CPU it does so anyway, as that is faster. On other devices ComfyUI is asked for what its own VAE would want, so that
it makes room; bands are for what does not fit then.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from comfy.ldm.modules.diffusionmodules.model import vae_attention
from torch import Tensor

from ...zimage_core.diagnostics import finite
from ...zimage_core.diagnostics.finite import NotFinite
from ...zimage_core.model import vae_bands
from ...zimage_core.model.vae import AutoencoderKL
from ...zimage_core.weights.snapshot import open_component
from . import borders, files, others

LOW_MEMORY = ("auto", "on", "off")

Memory = Callable[[tuple[int, ...], torch.dtype], float]  # of (shape, dtype): bytes for one image, as ComfyUI says


@contextmanager
def cast_weights(layer: Any, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """`Weights` where ComfyUI moves, casts and patches them as they are used."""
    weight, bias, lent = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, lent)


class ZImageAutoencoder(AutoencoderKL):
    """The autoencoder behind the calls that ComfyUI's VAE makes of it."""

    low_memory = "auto"  # one of LOW_MEMORY, for the calls that are made of this object

    # set by the VAE
    comfyui_memory: dict[str, Memory]  # for "decode" by latents, for "encode" by images
    patcher: Callable[[], comfy.model_patcher.ModelPatcher | None] = staticmethod(lambda: None)  # that loads it

    def decode(self, raw_latents: Tensor) -> Tensor:
        downscale = self.config.downscale
        expected = ("batch", self.config.latent_channels, "height/8", "width/8")
        borders.checked("The latent", raw_latents, expected, "It is of another model, or of no image.")
        shape = (len(raw_latents), 3, *(side * downscale for side in raw_latents.shape[-2:]))
        return self._run("decode", raw_latents, shape)

    def encode(self, image: Tensor) -> Tensor:
        borders.checked("The image", image, ("batch", 3, "height", "width"), "The VAE takes red, green and blue.")
        return self._run("encode", image, tuple(image.shape))

    def _run(self, call: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """decode or encode, as a whole or in bands; shape: of the images."""
        rows = None
        if self.runs_in_bands(call, shape, x.dtype, x.device):
            rows = self._rows(shape, x)
        else:
            try:
                return getattr(super(), call)(x)
            except Exception as error:
                if not out_of_memory(error) or not self._may_run_in_bands():
                    raise
            # not in the handler: the exception holds on to the maps
            mm.soft_empty_cache()
            logging.warning(f"Out of memory while the VAE should {call}: it does so in bands, with the same result.")
        in_bands = getattr(vae_bands, call)
        return in_bands(self, x, rows, tick=mm.throw_exception_if_processing_interrupted)

    def _may_run_in_bands(self) -> bool:
        return self.low_memory != "off" and vae_bands.possible(self)

    def runs_in_bands(self, call: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether images [B, 3, H, W] do, at this moment."""
        if not self._may_run_in_bands() or self.low_memory == "on":
            return self._may_run_in_bands()
        if device.type == "cpu":
            short = self._free_memory(device) < shape[0] * self._comfyui_memory(call, shape, dtype)
            return short or vae_bands.faster(self, shape[2], shape[3], device, dtype)
        # ComfyUI has tried to make room for its figure, which is twice of what maps take.
        maps = vae_bands.PLAIN_MAPS if call == "decode" else vae_bands.PLAIN_ENCODING_MAPS
        return self._free_memory(device) < shape[0] * vae_bands.plain_bytes(self, shape[2], shape[3], dtype, maps)

    def memory(self, call: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
        """Bytes that ComfyUI shall have free before one image of [B, 3, H, W] is decoded or encoded."""
        asked = self.low_memory == "on" or device.type == "cpu"  # else it would not even try to make room for a whole
        if asked and self.runs_in_bands(call, (1, *shape[1:]), dtype, device):
            return vae_bands.bands_bytes(self, shape[2], shape[3], dtype.itemsize)
        return self._comfyui_memory(call, shape, dtype)

    def _comfyui_memory(self, call: str, shape: tuple[int, ...], dtype: torch.dtype) -> float:
        downscale = self.config.downscale
        of_one = (1, *shape[1:])
        if call == "decode":
            of_one = (1, self.config.latent_channels, shape[2] // downscale, shape[3] // downscale)
        return self.comfyui_memory[call](of_one, dtype)

    def _free_memory(self, device: torch.device) -> int:
        # a patcher that pages weights counts what it can give back as free
        patcher = None if device.type == "cpu" else self.patcher()
        return (mm if patcher is None else patcher).get_free_memory(device)

    def _rows(self, shape: tuple[int, ...], x: Tensor) -> int | None:
        if x.device.type == "cpu" or self.low_memory == "on":
            return None
        free = self._free_memory(x.device)
        return vae_bands.rows_that_fit(self, shape[2], shape[3], x.element_size(), free)


def out_of_memory(error: Exception) -> bool:
    """Whether a device had too little memory. Not every backend has a type for it."""
    is_oom = getattr(mm, "is_oom", None)  # ComfyUI before 0.30 has the type alone
    known = is_oom(error) if is_oom else isinstance(error, mm.OOM_EXCEPTION)
    return known or isinstance(error, RuntimeError) and "out of memory" in str(error)


class ZImageVAE(comfy.sd.VAE):
    """Latents are raw, as on every LATENT socket: scale and shift belong to the MODEL's latent format."""

    def __init__(self, path: str | Path, disable_dynamic: bool = False):
        component = open_component(path, "vae", map_file=files.map_file())
        config = component.config
        with _without_warning():
            super().__init__(sd={})  # sets the defaults of an image VAE and ends where it finds no weights
        self.latent_channels = config.latent_channels
        self.downscale_ratio = self.upscale_ratio = config.downscale
        self.device = mm.vae_device()
        self.vae_dtype = mm.vae_dtype(self.device, self.working_dtypes)
        self.output_device = mm.intermediate_device()

        weights = component.state_dict(self.vae_dtype)
        module = ZImageAutoencoder(
            config,
            ops=comfy.ops.disable_weight_init,
            attention=vae_attention(),
            weights=cast_weights,
            device="meta",
            dtype=self.vae_dtype,
        )
        mm.archive_model_dtypes(module)
        module.load_state_dict(weights, strict=True, assign=True)
        others.describe_vae(module)
        self.first_stage_model = module.requires_grad_(False).eval()
        module.comfyui_memory = {"decode": self.memory_used_decode, "encode": self.memory_used_encode}
        del self.memory_used_decode, self.memory_used_encode  # for the methods below, which a copy's device matters to

        # ComfyUI rebinds CoreModelPatcher when it starts; it must be looked up at the time of the call.
        kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
        self.patcher = kind(module, load_device=self.device, offload_device=mm.vae_offload_device())
        self.patcher.cached_patcher_init = (load_vae_patcher, (str(path),))
        module.patcher = weakref.ref(self.patcher)
        self.model_size()

    def memory_used_decode(self, shape: tuple[int, ...], dtype: torch.dtype) -> float:
        images = (shape[0], 3, *(side * self.upscale_ratio for side in shape[-2:]))
        return self.first_stage_model.memory("decode", images, dtype, self.device)

    def memory_used_encode(self, shape: tuple[int, ...], dtype: torch.dtype) -> float:
        return self.first_stage_model.memory("encode", tuple(shape), dtype, self.device)


def decode(vae: comfy.sd.VAE, latents: Tensor, low_memory: str = "auto", safe_retry: bool = True) -> Tensor:
    """Raw latents [B, 16, h, w] to images [B, H, W, 3], checked: a damaged weight is named.

    safe_retry: where 16 bits are too few for its values, a VAE runs once more in float32, and the log says so.
    low_memory: in bands of rows "on", "off", or "auto": where that is faster or memory is short. Another VAE than ours
    can't, nor one that other nodes changed to make images tile: ValueError.
    """
    if low_memory == "on" and not isinstance(vae.first_stage_model, ZImageAutoencoder):
        raise ValueError(
            f'low_memory is "on", but this VAE is a {type(vae.first_stage_model).__name__} of another loader, which '
            'can\'t decode in bands. Load it with Load Z-Image VAE (single files, too), or use "auto".'
        )
    if low_memory == "on" and not vae_bands.possible(vae.first_stage_model):
        raise ValueError(
            'low_memory is "on", but another node has changed how this VAE pads, as those for images that tile do: '
            'bands would not join. Use "auto" or "off", or decode with a VAE that was not changed.'
        )

    def compute(vae: comfy.sd.VAE) -> Tensor:
        images = _checked(_for_one_call(vae, low_memory).decode(latents), "decoding (VAE)")
        return borders.checked("What this VAE makes", images, borders.IMAGE, "Decode with Z-Image's (Flux 1's) VAE.")

    return _finite(vae, latents, compute, safe_retry)


def encode(vae: comfy.sd.VAE, pixels: Tensor, safe_retry: bool = True) -> Tensor:
    """Images [B, H, W, 3] to raw latents [B, 16, H/8, W/8], checked as `decode` does."""
    return _finite(vae, pixels, lambda vae: _checked(vae.encode(pixels), "encoding (VAE)"), safe_retry)


def _finite(vae: comfy.sd.VAE, given: Tensor, compute: Callable[[comfy.sd.VAE], Tensor], safe_retry: bool) -> Tensor:
    try:
        return compute(vae)
    except NotFinite as error:
        stage = str(error)
    if not given.isfinite().all():
        what = "latents in `samples`" if "decoding" in stage else "images in `pixels`"
        raise ValueError(f"The {what} hold {finite.WHAT}: what made them is at fault, not the VAE.")
    dtype = getattr(vae, "vae_dtype", torch.float32)
    return finite.again(
        stage,
        finite.named(dtype),
        "float32" if dtype.itemsize < torch.float32.itemsize else None,
        lambda: compute(_exact(vae)),
        allowed=safe_retry,
        vae=vae.first_stage_model,
    )


def _checked(values: Tensor, stage: str) -> Tensor:
    if not values.isfinite().all():
        raise NotFinite(stage)
    return values


def _for_one_call(vae: comfy.sd.VAE, low_memory: str) -> comfy.sd.VAE:
    """The same VAE, whose images are checked before they are clamped, which makes white of infinite.

    It is another object, as is its autoencoder, so that settings are of this call alone; all layers are shared.
    """
    if not isinstance(vae, comfy.sd.VAE):
        return vae
    own = copy.copy(vae)
    own.process_output = lambda images: vae.process_output(_checked(images, "decoding (VAE)"))
    if isinstance(vae.first_stage_model, ZImageAutoencoder):
        own.first_stage_model = copy.copy(vae.first_stage_model)
        own.first_stage_model.low_memory = low_memory
    return own


def _exact(vae: comfy.sd.VAE) -> comfy.sd.VAE:
    """The same VAE in float32: the weights are shared, ComfyUI casts each where it is used."""
    exact = copy.copy(vae)
    exact.patcher, exact.vae_dtype = vae.patcher.clone(), torch.float32
    exact.patcher.set_model_compute_dtype(torch.float32)
    return exact


def load_vae_patcher(path: str, disable_dynamic: bool = False):
    return ZImageVAE(path, disable_dynamic).patcher


@contextmanager
def _without_warning() -> Iterator[None]:
    """Drops ComfyUI's "No VAE weights detected", which is true at that moment and would alarm for nothing."""

    def is_other(record: logging.LogRecord) -> bool:
        return "No VAE weights" not in record.getMessage()

    root = logging.getLogger()  # ComfyUI logs on the root logger
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)
