"""Prompt to conditioning."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge import clip as bridge_clip


class ZImageTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTextEncode",
            display_name="Z-Image Text Encode",
            category="Z-Image",
            description=(
                "Encodes a prompt for Z-Image. Write plain sentences, in English or Chinese; weights like (this:1.2) "
                "are ordinary text. 512 tokens at most; a longer prompt loses its end and the log says where."
            ),
            search_aliases=["z-image", "zimage", "prompt", "positive", "negative", "clip text encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="A Z-Image text encoder: ours, or the stock CLIPLoader's Qwen3-4B."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="What the image shows."),
                io.Boolean.Input(
                    "cache",
                    default=True,
                    optional=True,
                    tooltip=(
                        "Keep encoded prompts, also for later sessions: for a known one the text encoder is not even "
                        "loaded. They are kept in the precision that the transformer computes in by default on this "
                        "device. Off: encode anew, in float32."
                    ),
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the positive or negative input of a sampler.")],
        )

    @classmethod
    def execute(cls, clip, text, cache=True) -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "There is no text encoder in `clip`: the loader before it found none (a checkpoint without one, "
                "perhaps). Connect a ZImageTextEncoderLoader."
            )
        return io.NodeOutput(bridge_clip.encode(clip, text, cache))
