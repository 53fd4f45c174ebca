"""ComfyUI's own Qwen3 over the layers of our text encoder, for what Z-Image itself never asks of it.

Generated text, embeddings among the tokens, weights of tokens, prompts in several chunks: all of it is then ComfyUI's
own code, computed by layers that are shared with ours, so that no weight is held twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ops
import comfy.sd
import comfy.supported_models_base
import folder_paths
import torch
from comfy import sd1_clip
from comfy.text_encoders import llama, z_image
from torch import Tensor, nn

from ...zimage_core.config import TextEncoderConfig
from ...zimage_core.model.text_encoder import LAYER, TextEncoder
from ...zimage_core.model.tokenizer import Tokenizer

NAME = "qwen3_4b"  # ComfyUI's name for this encoder: key of its tokens, prefix of its parameters, so LoRA files fit


class _Qwen3(llama.Qwen3_4B):
    """ComfyUI's class for any sizes."""

    def __init__(self, config: Any, dtype: Any, device: Any, operations: Any):
        nn.Module.__init__(self)
        self.num_layers = config.num_hidden_layers
        self.model = llama.Llama2_(config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype


def network(config: TextEncoderConfig, **place: Any) -> nn.Module:
    """ComfyUI's network with these numbers. place: dtype, device and operations."""
    numbers = llama.Qwen3_4BConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers if config.whole else config.num_hidden_layers - 1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        final_norm=config.whole,
    )
    numbers.head_dim = config.head_dim
    return _Qwen3(numbers, **place)


class NativeEncoder(sd1_clip.SDClipModel):
    """What `comfy.sd.CLIP` finds in a native text encoder under its name, around a network that is there."""

    def __init__(self, inner: nn.Module, config: TextEncoderConfig, pad: int):
        """pad: the id of the token for padding."""
        # what the network lacks at its end, a negative index must not count
        self.cut = 0 if config.whole else -1 - LAYER
        super().__init__(
            layer="hidden",
            layer_idx=LAYER + self.cut,
            textmodel_json_config={},
            dtype=torch.float32,
            special_tokens={"pad": pad},
            layer_norm_hidden_state=False,
            model_class=lambda *_: inner,
            enable_attention_masks=True,
            return_attention_masks=True,
        )


def over(encoder: TextEncoder, pad: int) -> NativeEncoder:
    """The native encoder whose every layer is one of ours."""
    place = {"dtype": torch.float32, "device": "meta", "operations": comfy.ops.manual_cast}
    inner = network(encoder.config, **place)
    for name, layer in encoder.named_modules():
        if next(layer.children(), None) is None:
            inner.set_submodule(name, layer)
    return NativeEncoder(inner, encoder.config, pad)


def words(tokenizer: Tokenizer, width: int) -> Callable[..., sd1_clip.SDTokenizer]:
    """The class, as far as it is called, of ComfyUI's tokenizer of words, around ours.

    width: of the embeddings in files that a prompt may name.
    """

    class Given:
        @staticmethod
        def from_pretrained(*_path: Any, **_settings: Any) -> Any:
            return tokenizer.inner

    def make(embedding_directory: Any = None, tokenizer_data: Any = None) -> sd1_clip.SDTokenizer:
        return sd1_clip.SDTokenizer(
            pad_with_end=False,
            embedding_directory=embedding_directory,
            embedding_size=width,
            embedding_key=NAME,
            tokenizer_class=Given,
            has_start_token=False,
            has_end_token=False,
            pad_to_max_length=False,
            max_length=99999999,
            min_length=1,
            pad_token=tokenizer.pad_id,
            tokenizer_data=tokenizer_data or {},
        )

    return make


def clip(
    config: TextEncoderConfig, tokenizer: Tokenizer, weights: dict[str, Tensor], disable_dynamic: bool, **place: Any
) -> comfy.sd.CLIP:
    """ComfyUI's own CLIP of these weights, by our names. place: dtype, device and operations of its layers."""

    def encoder(**_unused: Any) -> NativeEncoder:
        return NativeEncoder(network(config, **place), config, tokenizer.pad_id)

    model = z_image.ZImageTEModel(device="cpu", dtype=place["dtype"], model_options={f"{NAME}_class": encoder})
    getattr(model, NAME).transformer.load_state_dict(weights, strict=True, assign=True)
    model = model.requires_grad_(False).eval()
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(z_image.ZImageTokenizer, lambda **_: model),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={f"{NAME}_tokenizer_class": words(tokenizer, config.hidden_size)},
        parameters=sum(weight.numel() for weight in weights.values()),
        # no device to compute on: where that is the CPU, ComfyUI would load the encoder at once
        model_options={"dtype": place["dtype"], "initial_device": torch.device("meta")},
        disable_dynamic=disable_dynamic,
    )
