"""Images to latents and back."""

from __future__ import annotations

from comfy_api.latest import io

from . import convert
from .bridge import vae as bridge_vae

SAFE_RETRY_TOOLTIP = (
    "Numbers too large for the autoencoder's precision would end as a black image. On: it runs once more in float32; "
    "the log says so. Off: an error."
)


class ZImageVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageVAEDecode",
            display_name="Z-Image VAE Decode",
            category="Z-Image",
            description=(
                "Decodes latents to images. On a CPU, and where memory is short, in bands of rows: the same image, "
                "without seams."
            ),
            search_aliases=["z-image", "zimage", "latent to image", "decode"],
            inputs=[
                io.Vae.Input("vae", tooltip="Z-Image's autoencoder (FLUX's is the same)."),
                io.Latent.Input("samples", tooltip="The latents that a sampler gave."),
                io.Combo.Input(
                    "low_memory",
                    options=list(bridge_vae.LOW_MEMORY),
                    default="auto",
                    optional=True,
                    tooltip=(
                        "Decode in bands of rows: the same image in about a third of the memory. "
                        "auto: on a CPU, where that is faster as well, and where memory is short."
                    ),
                ),
                io.Boolean.Input("safe_retry", default=True, optional=True, tooltip=SAFE_RETRY_TOOLTIP),
            ],
            outputs=[io.Image.Output(tooltip="The images.")],
        )

    @classmethod
    def execute(cls, vae, samples, low_memory="auto", safe_retry=True) -> io.NodeOutput:
        _check_vae(vae)
        latents = convert.checked_latents(samples["samples"], vae.latent_channels)
        return io.NodeOutput(bridge_vae.decode(vae, latents, low_memory, safe_retry))


class ZImageVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageVAEEncode",
            display_name="Z-Image VAE Encode",
            category="Z-Image",
            description="Encodes images to latents, to change them with a denoise below 1. Sizes divisible by 16.",
            search_aliases=["z-image", "zimage", "image to latent", "img2img", "encode"],
            inputs=[
                io.Vae.Input("vae", tooltip="Z-Image's autoencoder (FLUX's is the same)."),
                io.Image.Input("pixels", tooltip="Images whose width and height are divisible by 16."),
                io.Boolean.Input("safe_retry", default=True, optional=True, tooltip=SAFE_RETRY_TOOLTIP),
            ],
            outputs=[io.Latent.Output(tooltip="Their latents, for the latent_image input of a sampler.")],
        )

    @classmethod
    def execute(cls, vae, pixels, safe_retry=True) -> io.NodeOutput:
        _check_vae(vae)
        return io.NodeOutput({"samples": bridge_vae.encode(vae, convert.checked_pixels(pixels), safe_retry)})


def _check_vae(vae) -> None:
    if vae is None:
        raise ValueError(
            "There is no autoencoder in `vae`: the loader before it found none (a checkpoint without one, perhaps). "
            "Connect a ZImageVAELoader."
        )
