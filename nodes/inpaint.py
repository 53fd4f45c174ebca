"""Repainting and extending images: a part cut out for sampling, and put back."""

from __future__ import annotations

from comfy_api.latest import io

from ..zimage_core import images, inpaint
from . import convert
from .bridge import borders
from .bridge import vae as bridge_vae
from .names import ALIASES, CATEGORY

CROP = io.Custom("ZIMAGE_CROP")
INPAINT_ALIASES = [*ALIASES, "inpaint", "outpaint", "repaint", "crop and stitch", "mask", "extend"]


def _side(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=8192,
        step=8,
        optional=True,
        advanced=True,
        tooltip="Pixels to add on this side (outpainting). They are repainted, whatever the mask says.",
    )


class ZImageInpaintPrepare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageInpaintPrepare",
            display_name="Z-Image Inpaint Prepare",
            category=CATEGORY,
            description=(
                "Cuts out what is to be repainted, with its surroundings, at a size that the model is good at. Sample "
                "the latent, decode it and put it back with Z-Image Inpaint Finish."
            ),
            search_aliases=INPAINT_ALIASES,
            inputs=[
                io.Vae.Input("vae", tooltip="Z-Image's VAE, from Load Z-Image VAE or the stock Load VAE."),
                io.Image.Input("image", tooltip="The image to change."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the image is repainted. May be left out to extend an image only.",
                ),
                io.Int.Input(
                    "grow", default=16, min=0, max=1024, tooltip="Pixels by which the mask grows before anything else."
                ),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=1024,
                    tooltip=(
                        "Pixels over which the new image fades in, inwards from the edge of the grown mask. Beyond "
                        "that edge, no pixel changes."
                    ),
                ),
                io.Boolean.Input(
                    "crop", default=True, tooltip="On: sample the surroundings of the mask only. Off: the whole image."
                ),
                io.Float.Input(
                    "context",
                    default=1.5,
                    min=1.0,
                    max=16.0,
                    step=0.1,
                    tooltip="How much of the surroundings the model sees: the box around the mask times this.",
                ),
                io.Float.Input(
                    "megapixels",
                    default=1.0,
                    min=0.0,
                    max=16.0,
                    step=0.01,
                    round=0.001,
                    tooltip=(
                        "Size to which the part is scaled for sampling. Turbo and Base: 1. The nano model: 0.016. 0: "
                        "as it is. Only with crop."
                    ),
                ),
                io.Combo.Input(
                    "fill",
                    options=list(inpaint.FILLS),
                    default="keep",
                    tooltip=(
                        "What the hole holds before sampling; it matters where denoise is below 1. keep: what is "
                        "there. neutral: gray. blurred: colors from around. noise: random pixels."
                    ),
                ),
                _side("left"),
                _side("top"),
                _side("right"),
                _side("bottom"),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent", tooltip="The part to sample, with its mask: for any sampler's latent_image."
                ),
                CROP.Output(display_name="crop", tooltip="The way back: for Z-Image Inpaint Finish."),
                io.Image.Output(
                    display_name="image",
                    tooltip="The part, for the inpaint_image of Z-Image ControlNet, or to look at.",
                ),
                io.Mask.Output(display_name="mask", tooltip="Its mask, for the mask of Z-Image ControlNet."),
            ],
        )

    @classmethod
    def execute(
        cls,
        vae,
        image,
        grow,
        feather,
        crop,
        context,
        megapixels,
        fill,
        mask=None,
        left=0,
        top=0,
        right=0,
        bottom=0,
    ) -> io.NodeOutput:
        borders.checked_vae(vae)
        borders.checked_numbers(context=context, megapixels=megapixels)
        image = borders.checked_image("`image`", image)
        if mask is not None:
            mask = borders.checked_mask(mask, image, "`image`")
        elif not any((left, top, right, bottom)):
            raise ValueError("There is nothing to repaint: connect `mask`, or extend a side.")
        else:
            mask = image.new_zeros(image.shape[:3])
        count = max(len(image), len(mask))
        pixels = image.movedim(-1, 1).expand(count, -1, -1, -1)
        hole = mask.unsqueeze(1).to(pixels).expand(count, -1, -1, -1)
        settings = {"grow": grow, "feather": feather, "extend": (left, top, right, bottom), "crop": crop}
        part, own, back = inpaint.prepare(pixels, hole, **settings, context=context, pixels=megapixels * 1e6)
        latents = bridge_vae.encode(vae, inpaint.filled(part, own, fill).movedim(1, -1))
        # by the latent's own pixels, of which none that holds a pixel to repaint may stay
        latent = {"samples": latents, "noise_mask": images.covered(own, convert.PIXELS // convert.PATCH)}
        return io.NodeOutput(latent, back, part.movedim(1, -1), own.squeeze(1))


class ZImageInpaintFinish(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageInpaintFinish",
            display_name="Z-Image Inpaint Finish",
            category=CATEGORY,
            description="Puts a repainted part back into its image. What was not to be repainted stays bit for bit.",
            search_aliases=INPAINT_ALIASES,
            inputs=[
                io.Image.Input("image", tooltip="The repainted part, decoded."),
                CROP.Input("crop", tooltip="Of Z-Image Inpaint Prepare."),
                io.Boolean.Input(
                    "match_color",
                    default=True,
                    tooltip="Shift the part's colors so that it meets the image around it without a seam.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The whole image.")],
        )

    @classmethod
    def execute(cls, image, crop, match_color) -> io.NodeOutput:
        borders.checked("`image`", image, borders.IMAGE)
        done = inpaint.finish(image.movedim(-1, 1), crop, match_color=match_color)
        return io.NodeOutput(done.movedim(1, -1))
