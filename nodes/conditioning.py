"""Prompt to conditioning."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge import clip as bridge_clip
from .names import ALIASES, CATEGORY, TEXT_TO_IMAGE


class ZImageTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTextEncode",
            display_name="Z-Image Text Encode",
            category=CATEGORY,
            description=(
                "Encodes a prompt for Z-Image. Write plain sentences, in English or Chinese; weights like (this:1.2) "
                "are read as ordinary text. At most 512 tokens: the end of a longer prompt is ignored, and the log "
                "says where."
            ),
            search_aliases=[*ALIASES, TEXT_TO_IMAGE, "prompt", "positive", "negative", "clip text encode", "qwen"],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The text encoder, from Load Z-Image Text Encoder or the stock Load CLIP."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt: what the image should show. In a negative prompt: what it should not show.",
                ),
                io.Boolean.Input(
                    "cache",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Remember encoded prompts on disk, across restarts: a prompt that was used before does not "
                        "even load the text encoder. Off: encode again, in float32."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="The encoded prompt, for the positive or negative input of a sampler.")
            ],
        )

    @classmethod
    def execute(cls, clip, text, cache=True) -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "There is no text encoder in `clip`: the loader before it found none (a checkpoint without one, "
                "perhaps). Connect a Load Z-Image Text Encoder node."
            )
        return io.NodeOutput(bridge_clip.encode(clip, text, cache))
