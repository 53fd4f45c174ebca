"""Sampling on ComfyUI: the guider with Z-Image's guidance, and one run of it with preview, progress and noise mask."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...zimage_core.config import SchedulerConfig
from ...zimage_core.diagnostics import finite
from ...zimage_core.diagnostics.finite import NotFinite
from ...zimage_core.sampling.loop import guided_velocity, guides_at
from . import attention as bridge_attention
from . import borders, lora, notices


class ZImageGuider(comfy.samplers.CFGGuider):
    """Guidance as the reference has it, positive + scale * (positive - negative): ComfyUI's CFG is scale + 1."""

    def set_guidance(self, scale: float, cfg_normalization: float, cfg_truncation: float) -> None:
        self.scale = scale
        self.cfg_normalization = cfg_normalization
        self.cfg_truncation = cfg_truncation
        self.set_cfg(1.0 + scale)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed=None):
        """The image that the model foresees in x [B, 16, h, w] at the noise levels `timestep` [B]."""
        model_options = model_options or {}
        positive, negative = self.conds["positive"], self.conds.get("negative")
        cfg = self.cfg
        # only a truncation asks for the noise level, for which ComfyUI would have to wait on a GPU
        sigma = float(timestep[0]) if self.cfg_truncation < 1.0 else 1.0
        if negative is None or not guides_at(sigma, self.scale, self.cfg_truncation):
            cfg, negative = 1.0, None
        elif self.cfg_normalization > 0:
            model_options = {**model_options, "sampler_cfg_function": self._normalized}
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, cfg, model_options=model_options, seed=seed
        )

    def _normalized(self, args: dict[str, Any]) -> Tensor:
        # ComfyUI hands over and takes back sigma * velocity; the formula commutes with that factor.
        return guided_velocity(args["cond"], args["uncond"], self.scale, self.cfg_normalization)

    @property
    def dtype(self) -> torch.dtype:
        """That the model computes in."""
        return self.model_patcher.get_model_object("manual_cast_dtype") or self.model_patcher.model.get_dtype()

    @property
    def attention(self) -> str:
        """Which one runs, in words."""
        return bridge_attention.ran(self.model_options["transformer_options"])

    def safe(self) -> ZImageGuider | None:
        """The same guidance in a dtype with more room and with plain attention; None where this is it.

        The weights are shared, and so are LoRA and patches: ComfyUI casts each weight where it is used.
        """
        guider = copy.copy(self)
        guider.model_options = comfy.model_patcher.create_model_options_clone(self.model_options)
        replaced = bridge_attention.force_plain(guider.model_options["transformer_options"])
        wider = finite.safer(self.dtype, self.model_patcher.load_device)
        if self.dtype == torch.float16 and mm.should_use_bf16(self.model_patcher.load_device):
            wider = torch.bfloat16
        if wider is not None and (self.dtype == torch.float16 or not replaced):
            guider.model_patcher = self.model_patcher.clone()
            guider.model_patcher.set_model_compute_dtype(wider)
        return guider if replaced or guider.dtype != self.dtype else None


def make_guider(
    model,
    positive,
    negative,
    *,
    scale: float,
    cfg_normalization: float,
    cfg_truncation: float,
    attention: str = bridge_attention.AUTO,
) -> ZImageGuider:
    """A guider of a Z-Image MODEL, ours or ComfyUI's own. Raises ValueError where the parts don't fit together."""
    conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    for name, conditioning in conds.items():
        _check_conditioning(model, name, conditioning)
    if cfg_normalization > 0 and "sampler_cfg_function" in model.model_options:
        raise ValueError(
            "cfg_normalization can't be combined with a node that replaces the CFG formula of the model "
            "(RescaleCFG, for example). Remove that node or set cfg_normalization to 0."
        )
    guider = ZImageGuider(model)
    options = comfy.model_patcher.create_model_options_clone(guider.model_options)  # so far the model's own
    bridge_attention.choose(attention, model, options.setdefault("transformer_options", {}))
    guider.model_options = options
    guider.inner_set_conds(conds)
    guider.set_guidance(scale, cfg_normalization, cfg_truncation)
    return guider


def _check_conditioning(model, name: str, conditioning: list) -> None:
    if not conditioning:
        raise ValueError(f"`{name}` holds no prompt. Connect a Z-Image Text Encode node to it.")
    expected = model.model.diffusion_model.cap_embedder[1].in_features  # the native Z-Image names it so, too
    for features, _ in conditioning:
        if features is not None:
            borders.checked(f"The prompt in `{name}`", features, borders.FEATURES, "Encode it anew.")
        if features is not None and features.shape[-1] != expected:
            raise ValueError(
                f"`{name}` was encoded with a width of {features.shape[-1]}, this MODEL expects {expected}. "
                "Load text encoder and transformer from the same Z-Image snapshot."
            )


def scheduler_config(model) -> SchedulerConfig:
    """The schedule of a MODEL: its snapshot's, with the shift that it has now (ModelSamplingAuraFlow may set another).

    Raises ValueError if it is no Z-Image model.
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(model.model, comfy.model_base.Lumina2) or not hasattr(sampling, "shift"):
        raise ValueError(
            f"This MODEL is a {type(model.model).__name__}, not a Z-Image model. "
            "Connect Load Z-Image Transformer, or a stock loader with a Z-Image file."
        )
    own = getattr(model.model, "scheduler_config", None)
    if own is not None and own.use_dynamic_shifting and "model_sampling" not in model.object_patches:
        return own
    values = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": float(sampling.shift),
        "use_dynamic_shifting": False,
    }
    return SchedulerConfig.from_dict(values, "the MODEL's sampling settings")


def start_latents(model, latent: dict[str, Any]) -> Tensor:
    """The samples of a LATENT; an empty one of another model is brought to this model's channels, as ComfyUI does."""
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))


def latent_channels(model) -> int:
    return model.get_model_object("latent_format").latent_channels


def run(
    guider: ZImageGuider,
    latents: Tensor,
    sigmas: Tensor,
    seed: int,
    latent: dict[str, Any],
    safe_retry: bool = True,
) -> Tensor:
    """Euler from sigmas[0] to sigmas[-1]: raw latents [B, 16, h, w] in and out. `latent` may hold batch_index and
    noise_mask. Interruption, previews and progress are ComfyUI's.

    safe_retry: where a step gives numbers that are not finite, all steps are run once more from the same noise, with
    plain attention and in a dtype with more room; the log says so. Without it, or if that fails too, CheckpointError.
    """
    try:
        return _run(guider, latents, sigmas, seed, latent)
    except NotFinite as error:
        stage = str(error)
    _check_finite(guider, latents, latent)
    safe: Any = guider.safe()

    def compute() -> Tensor:
        # to be loaded before ComfyUI asks how much memory a step takes: that follows from the dtype in use
        mm.load_models_gpu([safe.model_patcher])
        return _run(safe, latents, sigmas, seed, latent)

    return finite.again(
        stage,
        _words(guider),
        None if safe is None else _words(safe),
        compute,
        allowed=safe_retry,
        transformer=guider.model_patcher.model.diffusion_model,
    )


def tell_of_size(model: comfy.model_patcher.ModelPatcher, latents: Tensor) -> None:
    """Warns where images would be far larger or smaller than those that the model was trained on."""
    trained, (height, width) = getattr(model.model, "trained_side", None), (8 * side for side in latents.shape[-2:])
    if trained is not None and not (trained / 2) ** 2 <= height * width <= (2 * trained) ** 2:
        notices.warn(
            f"This model was trained on images of {trained}x{trained}; {width}x{height} is far from that and will look "
            f"bad. Set width and height near {trained}."
        )


def _run(guider: ZImageGuider, latents: Tensor, sigmas: Tensor, seed: int, latent: dict[str, Any]) -> Tensor:
    steps = finite.Steps(len(sigmas) - 1)
    show = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1)

    def after_step(step: int, denoised: Tensor, *others: Any) -> None:
        steps.saw(denoised)
        show(step, denoised, *others)

    _check_captions(guider)
    noise = comfy.sample.prepare_noise(latents, seed, latent.get("batch_index"))
    samples = guider.sample(
        noise,
        latents,
        comfy.samplers.ksampler("euler"),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=after_step,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    dtype = mm.intermediate_dtype() if hasattr(mm, "intermediate_dtype") else samples.dtype  # newer ComfyUI
    samples = samples.to(device=mm.intermediate_device(), dtype=dtype)
    if not samples.isfinite().all():
        steps.check()
        raise NotFinite("the end of the run")
    return samples


def _words(guider: ZImageGuider) -> str:
    return f"{finite.named(guider.dtype)} with {guider.attention}"


def _check_captions(guider: ZImageGuider) -> None:
    """Raises NotFinite for text features that the model's dtype can't hold, where looking waits for no GPU."""
    if guider.dtype != torch.float16:
        return
    most = torch.finfo(torch.float16).max
    for conds in guider.original_conds.values():
        for features in (cond.get("cross_attn") for cond in conds):
            if features is not None and features.device.type == "cpu" and not features.abs().amax() <= most:
                raise NotFinite("text features for step 1")


def _check_finite(guider: ZImageGuider, latents: Tensor, latent: dict[str, Any]) -> None:
    """Raises ValueError if what came in is at fault."""
    given = [("latent_image", latents), ("noise_mask of latent_image", latent.get("noise_mask"))]
    given += [(name, cond.get("cross_attn")) for name, conds in guider.original_conds.items() for cond in conds]
    for name, values in given:
        if values is not None and not values.isfinite().all():
            raise ValueError(
                f"`{name}` holds {finite.WHAT}: what is connected to it is at fault, not the sampling. Make it with "
                "the nodes of this pack, which look for the reason."
            )
    lora.check_patches(guider.model_patcher)
