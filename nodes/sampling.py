"""Latents and conditioning to latents."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..zimage_core.config import SchedulerConfig
from ..zimage_core.sampling.schedule import sigmas
from . import convert
from .bridge import attention as bridge_attention
from .bridge import borders, sampler

SAFE_RETRY_TOOLTIP = (
    "Numbers too large for the precision would end as a black image. On: all steps are run once more, from the same "
    "noise, in a precision with more room and with plain attention; the log says so. Off: an error."
)


class ZImageSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageSampler",
            display_name="Z-Image Sampler",
            category="Z-Image",
            description=(
                "Samples with Z-Image's own schedule and guidance. Turbo: 8 steps, guidance 0. Base: 30 to 50 steps, "
                "guidance 3 to 5 with a negative prompt. Guidance 0 here is CFG 1 in KSampler, 4 is CFG 5."
            ),
            search_aliases=["z-image", "zimage", "ksampler", "denoise", "euler", "turbo", "guidance", "cfg"],
            inputs=[
                io.Model.Input("model", tooltip="A Z-Image transformer, ours or one from a stock loader."),
                io.Conditioning.Input("positive", tooltip="What the image shall show."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    lazy=True,
                    tooltip="What to lead away from. Used (and encoded) only where guidance_scale is above 0.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Where to start: EmptySD3LatentImage for a new image, ZImageVAEEncode to change one.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Number that the random noise follows from: the same number gives the same image.",
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip='Model evaluations. Turbo: 8 ("9 steps" elsewhere means these 8). Base: 30 to 50.',
                ),
                io.Float.Input(
                    "guidance_scale",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How far to follow the prompt away from the negative. 0 is off, as Turbo wants it.",
                ),
                io.Float.Input(
                    "cfg_normalization",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Limits the strength of the guided step to this many times that of the unguided. 0 is off.",
                ),
                io.Float.Input(
                    "cfg_truncation",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Guidance ends once this share of the way from noise to image is done. 1 is to the end.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="1 starts from pure noise; less keeps more of latent_image. The number of steps stays.",
                ),
                io.Combo.Input(
                    "attention",
                    options=bridge_attention.choices(),
                    default=bridge_attention.AUTO,
                    optional=True,
                    tooltip=(
                        "Which kernel computes attention. auto: ComfyUI's own, or on an NVIDIA GPU a faster exact one, "
                        "tried where a run is long enough. Others are checked before the first step; what fails, or "
                        "errs by more than its kind explains, is not used, and the log says so."
                    ),
                ),
                io.Boolean.Input("safe_retry", default=True, optional=True, tooltip=SAFE_RETRY_TOOLTIP),
            ],
            outputs=[io.Latent.Output(tooltip="The image's latents, for ZImageVAEDecode.")],
        )

    @classmethod
    def check_lazy_status(cls, guidance_scale, **inputs):
        # An input that isn't connected isn't among the inputs; one that isn't evaluated yet is None.
        return ["negative"] if guidance_scale > 0 and inputs.get("negative", "") is None else []

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent_image,
        seed,
        steps,
        guidance_scale,
        cfg_normalization,
        cfg_truncation,
        denoise,
        negative=None,
        attention=bridge_attention.AUTO,
        safe_retry=True,
    ) -> io.NodeOutput:
        borders.checked_numbers(
            guidance_scale=guidance_scale,
            cfg_normalization=cfg_normalization,
            cfg_truncation=cfg_truncation,
            denoise=denoise,
        )
        if guidance_scale > 0 and negative is None:
            raise ValueError(
                f"guidance_scale is {guidance_scale}, but nothing is connected to `negative`. Connect a "
                "ZImageTextEncode (its text may be empty), or set guidance_scale to 0."
            )
        config = sampler.scheduler_config(model)
        latents = sampler.start_latents(model, latent_image)
        latents = convert.checked_latents(latents, sampler.latent_channels(model))
        latents = convert.checked_cells(latents)
        guider = sampler.make_guider(
            model,
            positive,
            negative if guidance_scale > 0 else None,
            scale=guidance_scale,
            cfg_normalization=cfg_normalization,
            cfg_truncation=cfg_truncation,
            attention=attention,
        )
        levels = noise_levels(steps, denoise, config, latents)
        samples = sampler.run(guider, latents, levels, seed, latent_image, safe_retry)
        return io.NodeOutput(convert.latent_with(latent_image, samples))


def noise_levels(steps: int, denoise: float, config: SchedulerConfig, latents: Tensor) -> Tensor:
    """The last `steps` steps of a schedule of steps / denoise, as KSampler has it: [steps + 1]."""
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise}, expected more than 0 and at most 1 (1 starts from pure noise).")
    height, width = latents.shape[-2:]
    tokens = (height // convert.CELLS) * (width // convert.CELLS)
    return sigmas(int(steps / denoise), config, tokens)[-(steps + 1) :]
