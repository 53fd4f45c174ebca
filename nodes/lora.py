"""LoRA: a file onto MODEL and CLIP, with a report of what was matched."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge import folders
from .bridge import lora as bridge_lora
from .names import ALIASES, CATEGORY


class ZImageLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageLoraLoader",
            display_name="Load Z-Image LoRA",
            category=CATEGORY,
            description=(
                "Applies a LoRA (or LoKr, LoHa, OFT, DoRA, ...) in any usual format, and reports what was matched."
            ),
            search_aliases=[*ALIASES, "lora", "lycoris", "lokr", "loha", "dora", "style"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, from a loader or another LoRA node."),
                io.Combo.Input(
                    "lora", options=folders.lora_choices(), tooltip="The LoRA: a .safetensors file in models/loras."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the transformer. 0: not at all. Negative: the opposite.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder. Only needed for a LoRA that was trained on the text encoder, too.",
                ),
                io.Float.Input(
                    "strength_clip",
                    optional=True,
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the text encoder. Only matters if it has weights for it.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer with the LoRA."),
                io.Clip.Output(tooltip="The text encoder with the LoRA, if a text encoder is connected."),
                io.String.Output(
                    display_name="report",
                    tooltip=(
                        "What was matched: keys, parts, rank, alpha, base model, trigger words, overlap with earlier "
                        "LoRA. Connect it to Preview as Text."
                    ),
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
