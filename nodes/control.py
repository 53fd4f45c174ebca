"""MODEL steered by an image: Fun-Controlnet-Union files."""

from __future__ import annotations

from comfy_api.latest import io

from ..zimage_core.sampling.control import STRENGTH
from .bridge import borders, folders
from .bridge import control as bridge_control
from .names import ALIASES, CATEGORY


class ZImageControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageControlNet",
            display_name="Z-Image ControlNet",
            category=CATEGORY,
            description=(
                "Steers the transformer by an image (edges, depth, pose, ...), or repaints a part of one, with a "
                "Fun-Controlnet-Union file. Several in a row add up."
            ),
            search_aliases=[
                *ALIASES,
                "controlnet",
                "control net",
                "fun union",
                "canny",
                "depth",
                "pose",
                "inpaint",
                "model patch",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The transformer, from Load Z-Image Transformer, a LoRA node or another of these."
                ),
                io.Vae.Input("vae", tooltip="Z-Image's VAE: it encodes the images that the network reads."),
                io.Combo.Input(
                    "control_net",
                    options=folders.control_choices(),
                    tooltip="The Fun-Controlnet-Union file, in models/model_patches or models/controlnet.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "What the image should follow: a map of edges, depth or a pose. It is scaled and cropped to "
                        "the size of the latents. One for all images of a batch, or one for each."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=STRENGTH,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly it steers. 0: not at all. The files' makers name 0.65 to 1.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where it begins to steer, as a share of the way from noise (0) to the image (1).",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where it stops steering, as a share of the way from noise (0) to the image (1).",
                ),
                io.Image.Input(
                    "inpaint_image",
                    optional=True,
                    tooltip="An image to repaint where the mask is white, with files of version 2. Needs the mask.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="White where the image is repainted. As large as it."),
                io.Combo.Input(
                    "fit",
                    options=list(bridge_control.FITS),
                    default="crop",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "For images of another shape than the latents. crop: fill the size and cut off the rest. pad: "
                        "show all of it, with black around it. Nothing is stretched."
                    ),
                ),
                io.Boolean.Input(
                    "on_negative",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Steer with the negative prompt as well, as trained. Off: guidance makes it stronger.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The transformer, steered. Connect it to a sampler.")],
        )

    @classmethod
    def fingerprint_inputs(cls, control_net=None, **_inputs):
        return None if control_net is None else folders.stamps_of(folders.control_path(control_net))

    @classmethod
    def execute(
        cls,
        model,
        vae,
        control_net,
        strength,
        start,
        end,
        image=None,
        inpaint_image=None,
        mask=None,
        fit="crop",
        on_negative=True,
    ) -> io.NodeOutput:
        borders.checked_numbers(strength=strength, start=start, end=end)
        borders.checked_vae(vae)
        return io.NodeOutput(
            bridge_control.add_control(
                model,
                vae,
                control_net,
                image=image,
                inpaint_image=inpaint_image,
                mask=mask,
                strength=strength,
                start=start,
                end=end,
                fit=fit,
                on_negative=on_negative,
            )
        )
