"""Latents and conditioning to latents."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..zimage_core.config import SchedulerConfig
from ..zimage_core.sampling.schedule import sigmas
from . import convert
from .bridge import attention as bridge_attention
from .bridge import borders, sampler
from .names import ALIASES, CATEGORY, TEXT_TO_IMAGE

SAFE_RETRY_TOOLTIP = (
    "If numbers get too large for the precision, the image would be black. On: run all steps once more in a safer "
    "precision and with plain attention, from the same noise; the log says so. Off: stop with an error."
)


class ZImageSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageSampler",
            display_name="Z-Image Sampler",
            category=CATEGORY,
            description=(
                "Samples with Z-Image's own schedule and guidance. Turbo: 8 steps, guidance_scale 0. Base: 28 to 50 "
                "steps, guidance_scale 3 to 5 with a negative prompt. guidance_scale is KSampler's CFG minus 1: 0 is "
                "CFG 1, 4 is CFG 5."
            ),
            search_aliases=[
                *ALIASES,
                TEXT_TO_IMAGE,
                "sampler",
                "ksampler",
                "denoise",
                "euler",
                "turbo",
                "guidance",
                "cfg",
                "negative",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, from Load Z-Image Transformer or a stock loader."),
                io.Conditioning.Input("positive", tooltip="The prompt: what the image should show."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    lazy=True,
                    tooltip="The negative prompt: what the image should not show. Used if guidance_scale is above 0.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Where to start: EmptySD3LatentImage for a new image, Z-Image VAE Encode to change one.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed. The same seed with the same settings gives the same image.",
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip='Number of steps. Turbo: 8 ("9 steps" elsewhere means these 8). Base: 28 to 50.',
                ),
                io.Float.Input(
                    "guidance_scale",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip=(
                        "How strongly to follow the prompt and avoid the negative prompt. Turbo: 0 (off). Base: 3 to "
                        "5. This is KSampler's CFG minus 1."
                    ),
                ),
                io.Float.Input(
                    "cfg_normalization",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    advanced=True,
                    tooltip="Caps the guided prediction at this many times the strength of the unguided one. 0: off.",
                ),
                io.Float.Input(
                    "cfg_truncation",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    advanced=True,
                    tooltip="Ends guidance after this share of the way from noise to image. 1: never.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip=(
                        "1: a new image from pure noise. Lower values keep more of the image in latent_image. The "
                        "number of steps stays the same."
                    ),
                ),
                io.Combo.Input(
                    "attention",
                    options=bridge_attention.choices(),
                    default=bridge_attention.AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "The attention implementation. auto is right for most: what ComfyUI uses, or a faster exact "
                        "one where that pays. Any other is tested before the first step; if it fails or is too "
                        "inaccurate, it is not used, and the log says so."
                    ),
                ),
                io.Boolean.Input("safe_retry", default=True, optional=True, advanced=True, tooltip=SAFE_RETRY_TOOLTIP),
            ],
            outputs=[io.Latent.Output(tooltip="The latents of the image, for Z-Image VAE Decode.")],
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
                "Z-Image Text Encode node (its text may be empty), or set guidance_scale to 0."
            )
        config = sampler.scheduler_config(model)
        latents = sampler.start_latents(model, latent_image)
        latents = convert.checked_latents(latents, sampler.latent_channels(model))
        latents = convert.checked_cells(latents)
        sampler.tell_of_size(model, latents)
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
    tokens = (height // convert.PATCH) * (width // convert.PATCH)
    return sigmas(int(steps / denoise), config, tokens)[-(steps + 1) :]
