"""Loaders: a snapshot folder or a single file to MODEL, CLIP and VAE."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from . import host, host_clip, host_model, host_vae

CATEGORY = "Z-Image"
ALIASES = ["z-image", "zimage", "load", "checkpoint", "diffusers", "snapshot"]
MODEL_TOOLTIP = (
    "The built-in nano model (for demonstration and tests: simple shapes at 128x128), a Z-Image snapshot folder in "
    "models/zimage or models/diffusers, or a single .safetensors or .gguf file in the folder that its name begins with."
)
# None is the file's own, fitted to the device
WEIGHT_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_TOOLTIP = "Precision of the weights in memory. default: as the file has them, fitted to the device."


class ZImageTransformerLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTransformerLoader",
            display_name="Load Z-Image Transformer",
            category=CATEGORY,
            description="Loads a Z-Image transformer as a MODEL for this and any stock sampler.",
            search_aliases=[*ALIASES, "model", "unet", "dit", "turbo"],
            inputs=[
                io.Combo.Input("model", options=host.model_choices("transformer"), tooltip=MODEL_TOOLTIP),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", tooltip=DTYPE_TOOLTIP),
            ],
            outputs=[io.Model.Output(tooltip="The transformer; LoRA loaders and model patches connect here.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model, weight_dtype):
        return host.fingerprint(model, "transformer", "scheduler", "vae")

    @classmethod
    def execute(cls, model, weight_dtype) -> io.NodeOutput:
        return io.NodeOutput(host_model.load_model(host.model_path(model, "transformer"), WEIGHT_DTYPES[weight_dtype]))


class ZImageTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTextEncoderLoader",
            display_name="Load Z-Image Text Encoder",
            category=CATEGORY,
            description="Loads Z-Image's Qwen3 text encoder and tokenizer as a CLIP.",
            search_aliases=[*ALIASES, "clip", "qwen", "qwen3"],
            inputs=[
                io.Combo.Input("model", options=host.model_choices("text_encoder"), tooltip=MODEL_TOOLTIP),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", tooltip=DTYPE_TOOLTIP),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder, for ZImageTextEncode or any stock text node.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model, weight_dtype):
        return host.fingerprint(model, "text_encoder", "tokenizer")

    @classmethod
    def execute(cls, model, weight_dtype) -> io.NodeOutput:
        return io.NodeOutput(host_clip.load_clip(host.model_path(model, "text_encoder"), WEIGHT_DTYPES[weight_dtype]))


class ZImageVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageVAELoader",
            display_name="Load Z-Image VAE",
            category=CATEGORY,
            description="Loads Z-Image's autoencoder as a VAE.",
            search_aliases=[*ALIASES, "vae", "autoencoder"],
            inputs=[io.Combo.Input("model", options=host.model_choices("vae"), tooltip=MODEL_TOOLTIP)],
            outputs=[io.Vae.Output(tooltip="The autoencoder, for this pack's or the stock VAE nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model):
        return host.fingerprint(model, "vae")

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(host_vae.ZImageVAE(host.model_path(model, "vae")))
