"""Loaders: a snapshot folder or a single file to MODEL, CLIP and VAE."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from .bridge import clip, folders, others, vae
from .bridge import model as bridge_model

CATEGORY = "Z-Image"
ALIASES = ["z-image", "zimage", "load", "checkpoint", "diffusers", "snapshot"]
MODEL_TOOLTIP = (
    "The built-in nano model (for demonstration and tests: simple shapes at 128x128), a Z-Image snapshot folder in "
    "models/zimage or models/diffusers, or a single .safetensors or .gguf file in the folder that its name begins with."
)
# None is the file's own, fitted to the device
WEIGHT_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_TOOLTIP = "Precision of the weights in memory. default: as the file has them, fitted to the device."


def _model_input(component: str) -> io.Combo.Input:
    return io.Combo.Input("model", options=folders.model_choices(component), tooltip=MODEL_TOOLTIP)


def _download_inputs() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "download",
            default=False,
            optional=True,
            tooltip="Fetch what is missing from the Hugging Face hub into models/zimage. Off: nothing is downloaded.",
        ),
        io.String.Input(
            "repository",
            default="",
            optional=True,
            tooltip="Another repository of the hub, in place of the model above: Org/Name or Org/Name@revision.",
        ),
    ]


def _cache_input() -> io.Input:
    return io.Boolean.Input(
        "cache_converted",
        display_name="cache converted weights",
        default=False,
        optional=True,
        tooltip=(
            "Weights that have to be converted (to another precision, or from a snapshot folder, whose q, k and v are "
            "apart) are written to user/zimage/weights once, as large as they are in memory, and mapped from there: "
            "the next load takes no time, and less memory where ComfyUI pins weights. Delete the folder at any time."
        ),
    )


def _network_input() -> io.Input:
    return io.Combo.Input(
        "network",
        options=list(others.NETWORKS),
        default=others.OURS,
        optional=True,
        tooltip=(
            "Whose network computes. ComfyUI: its own, for custom nodes that reach inside of it (NegPip, NAG, DyPE and "
            "others). It takes every file as well; GGUF weights are expanded, which takes more memory."
        ),
        extra_dict={"advanced": True},
    )


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
                _model_input("transformer"),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", tooltip=DTYPE_TOOLTIP),
                *_download_inputs(),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Compile what lies between the matmuls (torch.compile): the first step waits some "
                        "seconds, later ones are faster. Once for all sizes, prompts and LoRA. Needs Triton on a GPU, "
                        "a C++ compiler on a CPU."
                    ),
                ),
                _cache_input(),
                _network_input(),
            ],
            outputs=[io.Model.Output(tooltip="The transformer; LoRA loaders and model patches connect here.")],
        )

    @classmethod
    def fingerprint_inputs(
        cls, model, weight_dtype, download=False, repository="", compile=False, cache_converted=False, network=""
    ):
        return folders.fingerprint(model, "transformer", repository)

    @classmethod
    def execute(
        cls,
        model,
        weight_dtype,
        download=False,
        repository="",
        compile=False,
        cache_converted=False,
        network=others.OURS,
    ) -> io.NodeOutput:
        path = folders.model_path(model, "transformer", repository, download)
        dtype = WEIGHT_DTYPES[weight_dtype]
        return io.NodeOutput(bridge_model.load_model(path, dtype, compile, cache_converted, network))


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
                _model_input("text_encoder"),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", tooltip=DTYPE_TOOLTIP),
                *_download_inputs(),
                _cache_input(),
                _network_input(),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder, for ZImageTextEncode or any stock text node.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model, weight_dtype, download=False, repository="", cache_converted=False, network=""):
        return folders.fingerprint(model, "text_encoder", repository)

    @classmethod
    def execute(
        cls, model, weight_dtype, download=False, repository="", cache_converted=False, network=others.OURS
    ) -> io.NodeOutput:
        path = folders.model_path(model, "text_encoder", repository, download)
        return io.NodeOutput(clip.load_clip(path, WEIGHT_DTYPES[weight_dtype], cache_converted, network))


class ZImageVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageVAELoader",
            display_name="Load Z-Image VAE",
            category=CATEGORY,
            description="Loads Z-Image's autoencoder as a VAE.",
            search_aliases=[*ALIASES, "vae", "autoencoder"],
            inputs=[_model_input("vae"), *_download_inputs()],
            outputs=[io.Vae.Output(tooltip="The autoencoder, for this pack's or the stock VAE nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model, download=False, repository=""):
        return folders.fingerprint(model, "vae", repository)

    @classmethod
    def execute(cls, model, download=False, repository="") -> io.NodeOutput:
        return io.NodeOutput(vae.ZImageVAE(folders.model_path(model, "vae", repository, download)))
