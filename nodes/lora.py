"""LoRA: a file onto MODEL and CLIP, with a report of what was matched."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge import folders
from .bridge import lora as bridge_lora

CATEGORY = "Z-Image"


class ZImageLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageLoraLoader",
            display_name="Load Z-Image LoRA",
            category=CATEGORY,
            description="Adds a LoRA (or LoKr, LoHa, OFT, DoRA, ...) of any format, and reports what was matched.",
            search_aliases=["z-image", "zimage", "lora", "lycoris", "lokr", "loha", "dora", "style"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, from a loader or another LoRA."),
                io.Combo.Input(
                    "lora", options=folders.lora_choices(), tooltip="A .safetensors file in ComfyUI's models/loras."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How much of the LoRA is added to the transformer. 0 is nothing, negative is its opposite.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoder, for LoRA that were trained on it as well."
                ),
                io.Float.Input(
                    "strength_clip",
                    optional=True,
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How much is added to the text encoder. Matters only where the LoRA has a part for it.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer with the LoRA."),
                io.Clip.Output(tooltip="The text encoder with the LoRA, if one is connected."),
                io.String.Output(
                    display_name="report",
                    tooltip="Keys matched, parts, rank, alpha, base model, trigger words, overlap with earlier LoRA.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora=None, strength=1.0, strength_clip=None, model=None, clip=None):
        return (folders.lora_fingerprint(lora), strength, strength_clip)

    @classmethod
    def execute(cls, model, lora, strength, clip=None, strength_clip=None) -> io.NodeOutput:
        second = strength if strength_clip is None else strength_clip
        return io.NodeOutput(*bridge_lora.add_lora(model, clip, lora, strength, second))
