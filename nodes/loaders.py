"""Loaders: a snapshot folder or a single file to MODEL, CLIP and VAE."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from .bridge import clip, folders, others, vae
from .bridge import model as bridge_model
from .names import ALIASES, CATEGORY

LOADER_ALIASES = [*ALIASES, "load", "checkpoint", "diffusers", "snapshot", "safetensors"]
MODEL_TOOLTIP = (
    "The model to load: the built-in nano model (a small demonstration: simple shapes at 128x128), a Z-Image snapshot "
    "folder, or a single file."
)
# None is the file's own, fitted to the device
WEIGHT_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_TOOLTIP = (
    "Precision of the weights in memory. default: as in the file, adapted to your device. Any other choice expands "
    "quantized weights."
)


def _model_input(component: str) -> io.Combo.Input:
    return io.Combo.Input("model", options=folders.model_choices(component), tooltip=MODEL_TOOLTIP)


def _dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "weight_dtype", options=list(WEIGHT_DTYPES), default="default", advanced=True, tooltip=DTYPE_TOOLTIP
    )


class _Told(str):
    """A sentence that is printed once: ComfyUI prints what `validate_inputs` returns for each input that it takes."""

    told = False

    def __str__(self) -> str:
        text, self.told = "as above" if self.told else str.__str__(self), True
        return text


def _problem(model: str | None, component: str, download: bool | None, repository: str | None) -> str | bool:
    """For ComfyUI, which asks before anything runs: what is missing, or True. An input that is linked is None."""
    problem = folders.problem(model, component, repository, download)
    return True if problem is None else _Told(problem)


def _download_inputs() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "download",
            default=False,
            optional=True,
            tooltip="Download missing files from Hugging Face into models/zimage. Off: nothing is downloaded.",
        ),
        io.String.Input(
            "repository",
            default="",
            optional=True,
            advanced=True,
            tooltip=(
                "Another Hugging Face repository to load instead of the model chosen above: Org/Name or "
                "Org/Name@revision. Leave it empty to use the model above."
            ),
        ),
    ]


def _cache_input() -> io.Input:
    return io.Boolean.Input(
        "cache_converted",
        display_name="cache converted weights",
        default=False,
        optional=True,
        advanced=True,
        tooltip=(
            "Save weights that had to be converted (to another precision, or from a snapshot folder) in "
            "user/zimage/weights, so that the next load is almost instant. They take as much disk space as memory. "
            "The folder can be deleted at any time."
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
            description="Loads the Z-Image transformer as a MODEL, for Z-Image Sampler or any stock sampler.",
            search_aliases=[*LOADER_ALIASES, "model", "unet", "diffusion model", "dit", "turbo", "base", "gguf"],
            inputs=[
                _model_input("transformer"),
                _dtype_input(),
                *_download_inputs(),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Speed up the transformer with torch.compile: the first image takes longer, later ones less. "
                        "Worth it on a GPU from 1024x1024 on; a CPU gets no faster. Needs Triton on a GPU, a C++ "
                        "compiler on a CPU."
                    ),
                ),
                _cache_input(),
                _network_input(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The transformer, for Z-Image Sampler or any stock sampler, LoRA loader or model patch."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model=None, download=False, repository=""):
        return _problem(model, "transformer", download, repository)

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
            description="Loads Z-Image's text encoder (Qwen3-4B) and its tokenizer as a CLIP.",
            search_aliases=[*LOADER_ALIASES, "clip", "qwen", "qwen3", "gguf"],
            inputs=[
                _model_input("text_encoder"),
                _dtype_input(),
                *_download_inputs(),
                _cache_input(),
                _network_input(),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder, for Z-Image Text Encode or any stock text node.")],
        )

    @classmethod
    def validate_inputs(cls, model=None, download=False, repository=""):
        return _problem(model, "text_encoder", download, repository)

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
            description="Loads Z-Image's VAE (the same as FLUX's).",
            search_aliases=[*LOADER_ALIASES, "vae", "autoencoder", "ae"],
            inputs=[_model_input("vae"), *_download_inputs()],
            outputs=[
                io.Vae.Output(tooltip="The VAE, for Z-Image VAE Decode, Z-Image VAE Encode or the stock VAE nodes.")
            ],
        )

    @classmethod
    def validate_inputs(cls, model=None, download=False, repository=""):
        return _problem(model, "vae", download, repository)

    @classmethod
    def fingerprint_inputs(cls, model, download=False, repository=""):
        return folders.fingerprint(model, "vae", repository)

    @classmethod
    def execute(cls, model, download=False, repository="") -> io.NodeOutput:
        return io.NodeOutput(vae.ZImageVAE(folders.model_path(model, "vae", repository, download)))
