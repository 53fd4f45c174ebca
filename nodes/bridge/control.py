"""Control networks in ComfyUI: patches of a MODEL, loaded with it by the memory manager, encoded before it samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import torch
from torch import Tensor

from ...zimage_core import images
from ...zimage_core.model.control import ActiveControl, ControlNetwork, control_latents
from ...zimage_core.sampling import control as asked
from ...zimage_core.weights.snapshot import open_component
from . import borders, files, folders, layers, quantized, quantized_patcher
from . import vae as bridge_vae

KIND = "zimage_control"  # of patch, among those of a MODEL
FITS = ("crop", "pad")
DOWNSCALE = 8  # pixels along one side of a latent's pixel
Calls = comfy.patcher_extension.WrappersMP


@dataclass(frozen=True)
class Settings:
    """What a patch keeps while other nodes give it other images."""

    latent_format: Any  # of the MODEL
    first: float  # noise levels between which it steers
    last: float
    fit: str  # one of FITS
    on_negative: bool


class ZImageControlPatch:
    """One control network on a MODEL.

    Ultimate SD Upscale knows it by its name, and makes it anew from `image` for each tile, by the arguments that
    ComfyUI's class of this name has.
    """

    settings: Settings
    shared: dict[Any, Any] | None = None  # what the evaluations of a step share, while they may

    def __init__(
        self,
        model_patch: comfy.model_patcher.ModelPatcher,
        vae: Any,
        image: Tensor | None,
        strength: float,
        inpaint_image: Tensor | None = None,
        mask: Tensor | None = None,
        settings: Settings | None = None,
    ):
        """image, inpaint_image [B, H, W, 3], mask [B, H, W], 1 where to repaint. settings: None leaves those it has."""
        self.model_patch = model_patch
        self.vae = vae
        self.image = image
        self.strength = strength
        self.inpaint_image = inpaint_image
        self.mask = mask
        self._encoded: Tensor | None = None
        self.encoded_image_size: tuple[int, int] | None = None  # height, width in pixels
        if settings is not None:
            self.settings = settings

    @property
    def encoded_image(self) -> Tensor:
        """What the network reads, [B, channels, h, w]; of the images' own size where no other was asked for."""
        if self._encoded is None:
            given = self.image if self.image is not None else self.inpaint_image
            assert given is not None
            height, width = (max(2 * DOWNSCALE, side // (2 * DOWNSCALE) * 2 * DOWNSCALE) for side in given.shape[1:3])
            self.encode(height, width)
        assert self._encoded is not None
        return self._encoded

    @encoded_image.setter
    def encoded_image(self, encoded: Tensor) -> None:
        self._encoded = encoded

    def encode(self, height: int, width: int) -> None:
        """For images of so many pixels; nothing where it is encoded so."""
        if self.encoded_image_size == (height, width) and self._encoded is not None:
            return
        config = self.model_patch.model.config
        pads = self.settings.fit == "pad"

        def latents(pixels: Tensor) -> Tensor:
            raw = bridge_vae.encode(self.vae, pixels.movedim(1, -1))
            return self.settings.latent_format.process_in(raw)

        def fitted(x: Tensor, fill: float) -> Tensor:
            return images.fitted(x, height, width, fill=fill if pads else None)

        image = keep = masked = None
        if self.image is not None:
            image = latents(fitted(self.image[..., :3].movedim(-1, 1), 0.0))
        if self.mask is not None and self.inpaint_image is not None:
            own = fitted(self.inpaint_image[..., :3].movedim(-1, 1), 0.5)
            gray, keep = images.hole(own, fitted(self.mask.unsqueeze(1), 1.0).to(own), DOWNSCALE)
            masked = latents(gray)
        batch = max(len(part) for part in (image, masked) if part is not None)
        image, keep, masked = (None if x is None else x.expand(batch, *x.shape[1:]) for x in (image, keep, masked))
        self._encoded = control_latents(image, keep, masked, config)
        self.encoded_image_size = (height, width)

    def active(self, x: Tensor, strengths: list[float], sigma: Any) -> ActiveControl | None:
        """At work on latents [B, 16, h, w] of as many prompts as there are strengths, each for as many images."""
        if not any(strengths) or not self._acts(sigma):
            return None
        size = (x.shape[-2] * DOWNSCALE, x.shape[-1] * DOWNSCALE)
        if self.encoded_image_size != size:  # of a tile, say
            loaded = mm.loaded_models(only_currently_used=True)
            self.encode(*size)
            mm.load_models_gpu(loaded)
        if len(x) % len(self.encoded_image):
            raise ValueError(
                f"The control image is a batch of {len(self.encoded_image)}, for {len(x) // len(strengths)} images. "
                "Give one, or one for each."
            )
        strength: float | Tensor = strengths[0]
        if len(set(strengths)) > 1:  # filled on the device: a copy would wait for it
            each = len(x) // len(strengths)
            strength = torch.cat([torch.full((each, 1, 1), value, device=x.device) for value in strengths])
        refined = {} if self.shared is None else self.shared
        return ActiveControl(self.model_patch.model, self.encoded_image.to(x), strength, refined)

    def _acts(self, sigma: Any) -> bool:
        if (self.settings.first, self.settings.last) == (1.0, 0.0) or sigma is None:
            return True  # without looking, as that would wait for the device
        return self.settings.last + asked.SAME < float(sigma.max()) <= self.settings.first + asked.SAME

    def models(self) -> list[comfy.model_patcher.ModelPatcher]:
        """Those that ComfyUI is to load with the MODEL."""
        return [self.model_patch]

    def to(self, device_or_dtype: Any) -> ZImageControlPatch:
        if isinstance(device_or_dtype, torch.device) and self._encoded is not None:
            self._encoded = self._encoded.to(device_or_dtype)
        return self


def at_work(options: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """What our network is called with for the patches of a MODEL, at latents [B, 16, h, w]."""
    patches = _patches(options)
    if not patches:
        return {}
    prompts = options.get("cond_or_uncond") or [0]  # 1 is the negative one
    controls = []
    for patch in patches:
        wanted = [patch.strength if kind == 0 or patch.settings.on_negative else 0.0 for kind in prompts]
        control = patch.active(x, wanted, options.get("sigmas"))
        controls += [] if control is None else [control]
    each = len(x) // len(prompts)
    whole = len(x) == each * len(prompts) and all(patch.shared is not None for patch in patches)
    return {"controls": controls, "images": [*range(each)] * len(prompts) if whole else None}


def _patches(options: dict[str, Any]) -> list[ZImageControlPatch]:
    found: list[ZImageControlPatch] = options.get("patches", {}).get(KIND, [])
    return found


def _encode_first(
    executor: Any, model: Any, noise_shape: Any, *args: Any, model_options: Any = None, **more: Any
) -> Any:
    """Before ComfyUI loads what samples, so that the VAE need not share the device with it."""
    for patch in _patches((model_options or model.model_options).get("transformer_options", {})):
        patch.encode(noise_shape[-2] * DOWNSCALE, noise_shape[-1] * DOWNSCALE)
    return executor(model, noise_shape, *args, model_options=model_options, **more)


def _share_steps(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Any, model_options: Any) -> Any:
    """Whether the evaluations of this step see the same latents: then the refiner's hints are computed once."""
    options = model_options.get("transformer_options", {})
    alone = "model_function_wrapper" not in model_options and "multigpu_clones" not in model_options
    for kind in (Calls.APPLY_MODEL, Calls.DIFFUSION_MODEL):
        alone = alone and not comfy.patcher_extension.get_all_wrappers(kind, options)
    prompts = [prompt for cond in conds if cond is not None for prompt in cond]
    alone = alone and not any(prompt.get(part) is not None for prompt in prompts for part in ("area", "hooks"))
    patches = _patches(options)
    for patch in patches:
        patch.shared = {} if alone else None
    try:
        return executor(model, conds, x, timestep, model_options)
    finally:
        for patch in patches:
            patch.shared = None


def add_control(
    model: comfy.model_patcher.ModelPatcher,
    vae: Any,
    file: str,
    *,
    image: Tensor | None,
    inpaint_image: Tensor | None,
    mask: Tensor | None,
    strength: float,
    start: float,
    end: float,
    fit: str,
    on_negative: bool,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL that the file steers too. Raises ValueError that names the input."""
    transformer = model.get_model_object("diffusion_model")
    if not hasattr(transformer, "run_captions"):
        raise ValueError(
            f"This MODEL's network is a {type(transformer).__name__}; control needs the one of Load Z-Image "
            'Transformer, with its `network` at "ComfyUI-ZImage". For others there is ComfyUI\'s ZImageFunControlnet.'
        )
    asked.check(strength, start, end)
    _check_images(image, inpaint_image, mask)
    network = load_network(folders.control_path(file), model.model.model_config.supported_inference_dtypes)
    asked.check_inputs(network.model.config, image is not None, mask is not None)
    network.model.check(transformer.config)
    first, last = (float(model.get_model_object("model_sampling").percent_to_sigma(share)) for share in (start, end))
    settings = Settings(model.get_model_object("latent_format"), first, last, fit, on_negative)
    steered = model.clone()
    if not strength:
        return steered
    patch = ZImageControlPatch(network, vae, image, strength, inpaint_image, mask, settings)
    steered.set_model_patch(patch, KIND)
    for kind, wrapper in ((Calls.PREPARE_SAMPLING, _encode_first), (Calls.CALC_COND_BATCH, _share_steps)):
        steered.remove_wrappers_with_key(kind, KIND)
        steered.add_wrapper_with_key(kind, KIND, wrapper)
    return steered


def _check_images(image: Tensor | None, inpaint_image: Tensor | None, mask: Tensor | None) -> None:
    for name, given in (("`image`", image), ("`inpaint_image`", inpaint_image)):
        if given is not None:
            borders.checked_image(name, given)
    if (mask is None) != (inpaint_image is None):
        name, other = ("`mask`", "`inpaint_image`") if inpaint_image is None else ("`inpaint_image`", "`mask`")
        raise ValueError(f"{name} is connected and {other} is not. Connect both, or neither.")
    if mask is not None and inpaint_image is not None:
        borders.checked_mask(mask, inpaint_image, "`inpaint_image`")


# The file that was used last, held so that another strength doesn't load it again
_last: dict[Any, comfy.model_patcher.ModelPatcher] = {}


def load_network(path: Path, dtypes: Sequence[torch.dtype]) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher of a control network, whose tensors stay mapped. dtypes: in which its MODEL may compute."""
    key = (folders.stamps_of(path), *dtypes)
    if key not in _last:
        network = _load(path, dtypes)
        _last.clear()
        _last[key] = network
    return _last[key]


def _load(path: Path, dtypes: Sequence[torch.dtype]) -> comfy.model_patcher.ModelPatcher:
    component = open_component(path, "control", map_file=files.map_file())
    device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    packed = quantized.keeps(component)
    if packed:
        compute = mm.unet_manual_cast(None, device, list(dtypes)) or torch.float32
        operations, built_on = quantized.operations(component, compute, device)
        weights = quantized.state_dict(component, None, compute)
    else:
        operations, built_on = layers.for_device(device, comfy.ops.manual_cast), torch.device("meta")
        weights = component.state_dict()
    network = ControlNetwork(component.config, ops=operations, device=built_on)
    network.load_state_dict(weights, strict=True, assign=True)
    network.requires_grad_(False).eval().to(offload_device)
    # ComfyUI rebinds CoreModelPatcher when it starts; it must be looked up at the time of the call.
    patcher = comfy.model_patcher.CoreModelPatcher(network, load_device=device, offload_device=offload_device)
    if packed or mm.is_device_cpu(device):
        quantized_patcher.keep_packed(patcher)
    return patcher
