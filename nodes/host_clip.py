"""CLIP: the Qwen3 encoder and its tokenizer as ComfyUI's own kind of text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders
import torch
from torch import nn

from ..zimage_core.checkpoint import not_finite, open_component, open_tokenizer, snapshot_folder
from ..zimage_core.text_encoder import TextEncoder
from ..zimage_core.tokenizer import Tokenizer
from . import host_packed

NAME = "qwen3_4b"  # the host's name for this encoder: key of its tokens, prefix of its parameters, so LoRA files fit
# the tokenizer that comes with the host: Qwen's, whose ids are those of Qwen3 for every text
QWEN_TOKENIZER = Path(next(iter(comfy.text_encoders.__path__))) / "qwen25_tokenizer"
LAYER = -2  # the hidden state that Z-Image is trained on


class HostTextModel(nn.Module):
    """The calls that `comfy.sd.CLIP` makes of a text model. Computes in float32, whatever the weights are stored in."""

    def __init__(self, encoder: TextEncoder, dtype: torch.dtype):
        super().__init__()
        named = nn.Module()
        named.transformer = encoder
        setattr(self, NAME, named)
        self.encoder_config = encoder.config
        self.dtypes = {dtype}
        self.reset_clip_options()

    @property
    def encoder(self) -> TextEncoder:
        return getattr(self, NAME).transformer

    def set_clip_options(self, options: dict[str, Any]) -> None:
        self.execution_device = options.get("execution_device", self.execution_device)
        self.layer = options.get("layer", self.layer)

    def reset_clip_options(self) -> None:
        self.execution_device: torch.device | None = None
        self.layer: int | None = None

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[torch.Tensor, None, dict[str, torch.Tensor]]:
        """Token ids to features [1, N, hidden_size] float32, unpadded: the transformer pads captions itself."""
        ids = [[token[0] for token in row] for row in tokens[NAME]]
        input_ids = torch.tensor(ids, dtype=torch.long, device=self.execution_device)
        features = self._hidden_state(input_ids).float().to(mm.intermediate_device())
        return features, None, {"attention_mask": torch.ones_like(input_ids, device=features.device)}

    def _hidden_state(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.layer in (None, LAYER):
            return self.encoder(input_ids, dtype=torch.float32)
        # Another layer was asked for (CLIPSetLastLayer). Ours ends where LAYER does, so hidden state -1 doesn't exist.
        count = self.encoder_config.num_hidden_layers
        if not -count <= self.layer < LAYER:
            raise ValueError(
                f"stop_at_clip_layer is {self.layer}; this text encoder has the layers {LAYER} (Z-Image's own) "
                f"to {-count}. Remove the node that sets it."
            )
        embeds = self.encoder.model.embed_tokens(input_ids).float()
        hidden = self.encoder.model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True).hidden_states
        return hidden[self.layer - LAYER - 1]

    def load_sd(self, state_dict: dict[str, torch.Tensor]):
        return self.encoder.load_state_dict(state_dict, strict=False, assign=True)

    def memory_estimation_function(self, tokens: dict[str, list], device: torch.device | None = None) -> int:
        """Bytes for one layer in float32: activations of every token (twice, for copies) and its largest weight."""
        config = self.encoder_config
        longest = max((len(row) for row in tokens.get(NAME, [])), default=0)
        activations = longest * (8 * config.hidden_size + 3 * config.intermediate_size) * 2
        return 4 * (activations + config.hidden_size * config.intermediate_size)


class HostTokenizer:
    """The calls that `comfy.sd.CLIP` makes of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, llama_template: str | None = None, **_):
        """Ids with the weight 1.0: prompt weights like (this:1.2) are ordinary text to Z-Image.

        llama_template: another chat template with one {}, as some stock nodes pass it.
        """
        if llama_template is None:
            ids = self.tokenizer(text)
        else:
            ids = self.tokenizer.inner(llama_template.format(text))["input_ids"]
        rows = [(token, 1.0, place + 1) if return_word_ids else (token, 1.0) for place, token in enumerate(ids)]
        return {NAME: [rows]}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def decode(self, token_ids, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.inner.decode(token_ids, skip_special_tokens=skip_special_tokens)


def load_clip(
    path: str | Path, weight_dtype: torch.dtype | None = None, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """A CLIP of a snapshot's text encoder and tokenizer, or of a single file with the host's Qwen tokenizer.

    weight_dtype: of the weights in memory, None the file's.
    """
    component = open_component(path, "text_encoder")
    config, tokenizer = component.config, HostTokenizer(_tokenizer(path))
    dtype = weight_dtype or component.dtype()
    if dtype.itemsize == 1:  # fp8 without scales: an Embedding can't look rows up in it
        dtype = torch.bfloat16
    quantised = weight_dtype is None and host_packed.keeps(component)
    if quantised:
        operations, build_device = host_packed.operations(
            component, torch.float32, mm.text_encoder_device(), exact=True
        )
        weights = host_packed.state_dict(component, dtype, torch.float32)
        encoder = TextEncoder(config, ops=operations, device=build_device, dtype=dtype)
    else:
        weights = component.state_dict(dtype)
        encoder = TextEncoder(config, ops=comfy.ops.manual_cast, device="meta", dtype=dtype)
    encoder.requires_grad_(False).load_state_dict(weights, strict=True, assign=True)
    model = HostTextModel(encoder.requires_grad_(False).eval(), dtype)

    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(lambda **_: tokenizer, lambda **_: model),
        parameters=sum(tensor.numel() for tensor in weights.values()),
        model_options={"dtype": dtype, "initial_device": torch.device("cpu")},
        disable_dynamic=disable_dynamic,
    )
    if quantised:
        plain = clip.patcher
        clip.patcher = host_packed.PackedPatcher(plain.model, plain.load_device, plain.offload_device)
    clip.patcher.cached_patcher_init = (load_clip_patcher, (str(path), weight_dtype))
    return clip


def encode(clip: comfy.sd.CLIP, text: str) -> list[Any]:
    """CONDITIONING of a prompt, checked: a damaged weight is named."""
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if any(isinstance(cond, torch.Tensor) and not cond.isfinite().all() for cond, _ in conditioning):
        raise not_finite(text_encoder=clip.cond_stage_model)
    return conditioning


def _tokenizer(path: str | Path) -> Tokenizer:
    return open_tokenizer(path) if snapshot_folder(path) else Tokenizer(QWEN_TOKENIZER)


def load_clip_patcher(path: str, weight_dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    return load_clip(path, weight_dtype, disable_dynamic).patcher
