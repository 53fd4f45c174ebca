"""Images to latents and back."""

from __future__ import annotations

from comfy_api.latest import io

from . import convert
from .bridge import borders
from .bridge import vae as bridge_vae
from .names import ALIASES, CATEGORY

SAFE_RETRY_TOOLTIP = (
    "If numbers get too large for the VAE's precision, the image would be black. On: run it once more in float32; the "
    "log says so. Off: stop with an error."
)


class ZImageVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageVAEDecode",
            display_name="Z-Image VAE Decode",
            category=CATEGORY,
            description=(
                "Decodes latents to images. On a CPU, and where memory is short, in bands of rows: the same image "
                "without seams, in less memory."
            ),
            search_aliases=[*ALIASES, "vae decode", "latent to image", "decode"],
            inputs=[
                io.Vae.Input(
                    "vae", tooltip="Z-Image's VAE (FLUX's is the same), from Load Z-Image VAE or the stock Load VAE."
                ),
                io.Latent.Input("samples", tooltip="The latents to decode, from a sampler."),
                io.Combo.Input(
                    "low_memory",
                    options=list(bridge_vae.LOW_MEMORY),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Decode in bands of rows: the same image in about a third of the memory. auto: on a CPU, "
                        "where it is faster as well, and where memory is short."
                    ),
                ),
                io.Boolean.Input("safe_retry", default=True, optional=True, advanced=True, tooltip=SAFE_RETRY_TOOLTIP),
            ],
            outputs=[io.Image.Output(tooltip="The images.")],
        )

    @classmethod
    def execute(cls, vae, samples, low_memory="auto", safe_retry=True) -> io.NodeOutput:
        borders.checked_vae(vae)
        latents = convert.checked_latents(samples["samples"], vae.latent_channels)
        return io.NodeOutput(bridge_vae.decode(vae, latents, low_memory, safe_retry))


class ZImageVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageVAEEncode",
            display_name="Z-Image VAE Encode",
            category=CATEGORY,
            description=(
                "Encodes images to latents, for image to image (denoise below 1). Width and height must be divisible "
                "by 16."
            ),
            search_aliases=[*ALIASES, "vae encode", "image to latent", "image to image", "img2img", "encode"],
            inputs=[
                io.Vae.Input(
                    "vae", tooltip="Z-Image's VAE (FLUX's is the same), from Load Z-Image VAE or the stock Load VAE."
                ),
                io.Image.Input("pixels", tooltip="The images to encode. Width and height must be divisible by 16."),
                io.Boolean.Input("safe_retry", default=True, optional=True, advanced=True, tooltip=SAFE_RETRY_TOOLTIP),
            ],
            outputs=[io.Latent.Output(tooltip="The latents, for the latent_image input of a sampler.")],
        )

    @classmethod
    def execute(cls, vae, pixels, safe_retry=True) -> io.NodeOutput:
        borders.checked_vae(vae)
        return io.NodeOutput({"samples": bridge_vae.encode(vae, convert.checked_pixels(pixels), safe_retry)})
