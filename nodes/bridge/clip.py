"""CLIP: the Qwen3 encoder and its tokenizer as ComfyUI's own kind of text encoder."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import numbers
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import folder_paths
import torch
from comfy import sd1_clip
from torch import nn

from ...zimage_core.diagnostics.finite import not_finite
from ...zimage_core.errors import CheckpointError
from ...zimage_core.model.text_encoder import LAYER, TextEncoder
from ...zimage_core.model.tokenizer import PROMPT_TEMPLATE, Tokenizer, without_halves
from ...zimage_core.prompts.cache import Stamp, stamps
from ...zimage_core.weights.component import Component
from ...zimage_core.weights.snapshot import open_component, open_tokenizer, snapshot_folder
from . import files as bridge_files
from . import layers, lora, native_encoder, notices, prompts, quantized, quantized_patcher
from .native_encoder import NAME
from .others import NATIVE, OURS

logger = logging.getLogger(__name__)

LACKING = "The file of this text encoder lacks the last layer or the final norm"
GENERATING = "skip_template"  # what nodes say to the tokenizer that generate text
# the tokenizer that comes with ComfyUI: Qwen's, whose ids are those of Qwen3 for every text
QWEN_TOKENIZER = Path(inspect.getfile(comfy.sd)).with_name("text_encoders") / "qwen25_tokenizer"
PAD = 151643  # <|endoftext|> among these
_reading = threading.RLock()  # ComfyUI may run nodes in several threads


class ZImageTextModel(nn.Module):
    """The calls that `comfy.sd.CLIP` makes of a text model. Computes in float32, whatever the weights are stored in."""

    execution_device: torch.device | None
    layer: int | None

    def __init__(
        self,
        encoder: TextEncoder,
        dtype: torch.dtype,
        identity: dict[str, Any],
        read: Callable[[], None] | None = None,
        pad: int = PAD,
    ):
        """identity: of what its weights are. read: gives values to those weights that have none yet. pad: a token."""
        super().__init__()
        named = nn.Module()
        named.transformer = encoder
        setattr(self, NAME, named)
        self.encoder_config = encoder.config
        self.dtypes = {dtype}
        self.identity = identity
        self._read = read
        self._names_suffice = False
        self.pad = pad
        self._native: tuple[native_encoder.NativeEncoder, ...] = ()  # in a tuple: its layers are ours already
        self.reset_clip_options()

    @property
    def encoder(self) -> TextEncoder:
        """With the values of all its weights."""
        return getattr(self, NAME).transformer

    def fill(self) -> None:
        """Reads what has been left in the file until now."""
        with _reading:
            if self._read is not None:
                self._read()
                self._read = None
                mm.archive_model_dtypes(self)

    # The ways on which ComfyUI's patchers, of whichever kind, come to the weights to load, patch and move them

    def __getattr__(self, name: str) -> Any:
        if name == NAME:
            self.fill()
        return super().__getattr__(name)

    def named_modules(self, *arguments: Any, **settings: Any) -> Iterator[tuple[str, nn.Module]]:
        self._fill_unless_names_suffice()
        return super().named_modules(*arguments, **settings)

    def state_dict(self, *arguments: Any, **settings: Any) -> dict[str, Any]:  # type: ignore[override]
        self._fill_unless_names_suffice()
        return super().state_dict(*arguments, **settings)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        self.fill()  # only values can be moved
        return super()._apply(fn, recurse)

    def _fill_unless_names_suffice(self) -> None:
        with _reading:  # other threads wait until names no longer suffice
            if not self._names_suffice:
                self.fill()

    @contextmanager
    def names_suffice(self) -> Iterator[None]:
        """Within it, modules and state dict are asked for names, shapes and dtypes only."""
        with _reading:
            self._names_suffice = True
            try:
                yield
            finally:
                self._names_suffice = False

    def set_clip_options(self, options: dict[str, Any]) -> None:
        self.execution_device = options.get("execution_device", self.execution_device)
        self.layer = options.get("layer", self.layer)

    def reset_clip_options(self) -> None:
        self.execution_device = None
        self.layer = None

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[torch.Tensor, None, dict[str, torch.Tensor]]:
        """Tokens to features [1, N, hidden_size] float32, unpadded: the transformer pads captions itself.

        Weights and embeddings of other nodes, and several chunks, are ComfyUI's to handle.
        """
        rows, layer = tokens[NAME], self._asked_layer()
        if len(rows) != 1 or not all(self._is_plain(token) for token in rows[0]):
            native = self.native()
            native.set_clip_options({"layer": layer + native.cut, "execution_device": self.execution_device})
            return native.encode_token_weights(rows)
        ids = [[token[0] for token in rows[0]]]
        input_ids = torch.tensor(ids, dtype=torch.long, device=self.execution_device)
        features = self.encoder(input_ids, dtype=torch.float32, layer=layer).float().to(mm.intermediate_device())
        return features, None, {"attention_mask": torch.ones_like(input_ids, device=features.device)}

    def generate(self, tokens: dict[str, list], *arguments: Any, **settings: Any) -> list[int]:
        """Ids of what follows these tokens, as ComfyUI's own encoders make them. ValueError without a last layer."""
        if not self.encoder_config.whole:
            raise ValueError(f"{LACKING}, without which it can't generate text. Choose a whole Qwen3-4B.")
        native = self.native()
        native.set_clip_options({"execution_device": self.execution_device})
        return native.generate(tokens, *arguments, **settings)

    def native(self) -> native_encoder.NativeEncoder:
        """ComfyUI's own encoder over our layers."""
        if not self._native:
            self._native = (native_encoder.over(self.encoder, self.pad),)
        self._native[0].reset_clip_options()
        return self._native[0]

    def _is_plain(self, token: tuple) -> bool:
        return isinstance(token[0], numbers.Integral) and token[0] != self.pad and token[1] == 1.0

    def _asked_layer(self) -> int:
        layer = LAYER if self.layer is None else self.layer  # another one is asked for by CLIPSetLastLayer
        count = self.encoder_config.num_hidden_layers
        if layer == -1 and not self.encoder_config.whole:
            raise ValueError(f"stop_at_clip_layer is -1, but {LACKING[0].lower()}{LACKING[1:]}. Choose -2.")
        if not -count <= layer <= -1:
            raise ValueError(
                f"stop_at_clip_layer is {layer}; this text encoder has the layers -1 (its last; Z-Image's own is "
                f"{LAYER}) to {-count}. Remove the node that sets it."
            )
        return layer

    def load_sd(self, state_dict: dict[str, torch.Tensor]):
        return self.encoder.load_state_dict(state_dict, strict=False, assign=True)

    def memory_estimation_function(self, tokens: dict[str, list], device: torch.device | None = None) -> int:
        """Bytes for one layer in float32: activations of every token (twice, for copies) and its largest weight."""
        config = self.encoder_config
        longest = max((len(row) for row in tokens.get(NAME, [])), default=0)
        activations = longest * (8 * config.hidden_size + 3 * config.intermediate_size) * 2
        return 4 * (activations + config.hidden_size * config.intermediate_size)


class ZImageTokenizer(sd1_clip.SD1Tokenizer):
    """ComfyUI's own tokenizer around ours, so that embeddings and escaped brackets are read as natively."""

    def __init__(self, tokenizer: Tokenizer, width: int = 2560, embedding_directory: list[str] | None = None):
        """width: of the embeddings in the files that a prompt may name."""
        self.zimage = tokenizer

        make = native_encoder.words(tokenizer, width)
        super().__init__(embedding_directory=embedding_directory, tokenizer=make, name=NAME)

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, llama_template: str | None = None, **more
    ):
        """Ids, or embeddings, with the weight 1.0: prompt weights like (this:1.2) are ordinary text to Z-Image.

        llama_template: another chat template with one {}, as some stock nodes pass it.
        """
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a string, got {type(text).__name__}")
        templated = (llama_template or PROMPT_TEMPLATE).format(without_halves(text))
        tokens = super().tokenize_with_weights(templated, return_word_ids, disable_weights=True, **more)
        if llama_template is None and GENERATING not in more:
            (row,) = tokens[NAME]
            ids = [token[0] if isinstance(token[0], int) else self.zimage.pad_id for token in row]
            tokens[NAME] = [row[: self.zimage.limited(ids)]]
        return tokens


def load_clip(
    path: str | Path,
    weight_dtype: torch.dtype | None = None,
    cache_converted: bool = False,
    network: str = OURS,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """A CLIP of a snapshot's text encoder and tokenizer, or of a single file with ComfyUI's Qwen tokenizer.

    weight_dtype: of the weights in memory, None the file's. No weight is read here: they stay mapped, and those that
    have to be converted are left in the file until the encoder is loaded onto its device. cache_converted: they are
    mapped as well, from a file that is written for it. network: one of `others.NETWORKS`. In ComfyUI's own, GGUF
    weights are expanded, and all weights read.
    """
    component = open_component(path, "text_encoder", map_file=bridge_files.map_file()).whole()
    files = stamps(component.files.paths)
    config, tokenizer = component.config, _tokenizer(path)
    dtype = weight_dtype or component.dtype()
    if dtype.itemsize == 1:  # fp8 without scales: an Embedding can't look rows up in it
        dtype = torch.bfloat16
    native = network == NATIVE
    packed = weight_dtype is None and quantized.keeps(component) and not (native and quantized.is_gguf(component))
    if cache_converted and not packed:
        component = bridge_files.cache_converted(component, dict.fromkeys(component.shapes, dtype))
    manual: Any = comfy.ops.manual_cast
    operations = manual if native else layers.for_device(mm.text_encoder_device(), manual)
    build_device = torch.device("meta")
    if packed:
        operations, build_device = quantized.operations(component, torch.float32, mm.text_encoder_device(), exact=True)
    if native:
        weights = quantized.state_dict(component, dtype, torch.float32) if packed else component.state_dict(dtype)
        place = {"dtype": dtype, "device": build_device, "operations": operations}
        clip = native_encoder.clip(config, tokenizer, weights, disable_dynamic, **place)
    else:
        encoder = TextEncoder(config, ops=operations, device=build_device, dtype=dtype).requires_grad_(False)
        left = _map_weights(encoder, component, dtype, packed)
        identity = {"config": repr(config), "weights": str(dtype), "quantized": packed, "files": files}
        read = functools.partial(_read_weights, encoder, component, dtype, left, files) if left else None
        model = ZImageTextModel(encoder.eval(), dtype, identity, read, tokenizer.pad_id)
        clip = _clip_of(model, tokenizer, dtype, component, disable_dynamic)
    if packed:
        quantized_patcher.keep_packed(clip.patcher)
    if disable_dynamic and not native:  # this one is taken apart, its model put into a patcher of ComfyUI's own kind
        model.fill()
    clip.patcher.cached_patcher_init = (load_clip_patcher, (str(path), weight_dtype, cache_converted, network))
    return clip


def _clip_of(
    model: ZImageTextModel, tokenizer: Tokenizer, dtype: torch.dtype, component: Component, disable_dynamic: bool
) -> comfy.sd.CLIP:
    """ComfyUI's CLIP around it, for which no weight is read."""

    def make_tokenizer(embedding_directory: Any = None, **_unused: Any) -> ZImageTokenizer:
        return ZImageTokenizer(tokenizer, component.config.hidden_size, embedding_directory)

    with model.names_suffice():
        clip = comfy.sd.CLIP(
            comfy.supported_models_base.ClipTarget(make_tokenizer, lambda **_: model),
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            parameters=sum(math.prod(shape) for shape in component.shapes.values()),
            # no device to compute on: where that is the CPU, ComfyUI would load the encoder at once
            model_options={"dtype": dtype, "initial_device": torch.device("meta")},
            disable_dynamic=disable_dynamic,
        )
        clip.patcher.model_size()  # which ComfyUI keeps, with the clones of this patcher as well
    return clip


def _map_weights(encoder: TextEncoder, component: Component, dtype: torch.dtype, packed: bool) -> list[str]:
    """Gives the layers all weights that can stay as the file has them; the others get a shape and a dtype.

    Returns the names of the latter. Checks every key, and the shape of what is not quantized.
    """
    left = []
    for name, shape in component.shapes.items():
        path, _, last = name.rpartition(".")
        layer = encoder.get_submodule(path)
        # ComfyUI's layers for quantized weights hold others in the dtype that they compute in
        held = getattr(layer, "factory_kwargs", {}).get("dtype", dtype)
        tensors = quantized.quantized_tensors(component, name, shape, torch.float32) if packed else {}
        if not tensors and not component.packed(name):
            mapped = component.tensor(name, shape)
            tensors = {name: mapped} if mapped.dtype == held else {}
        if tensors:
            _load(layer, path, tensors)
        else:
            setattr(layer, last, nn.Parameter(torch.empty(shape, dtype=held, device="meta"), requires_grad=False))
            left.append(name)
    return left


def _read_weights(
    encoder: TextEncoder, component: Component, dtype: torch.dtype, names: list[str], files: list[Stamp]
) -> None:
    if stamps(component.files.paths) != files:
        raise CheckpointError("the file has changed since it was opened; queue the prompt again", component.source)
    for name in names:
        path = name.rpartition(".")[0]
        tensor = component.tensor(name, component.shapes[name], dtype=dtype)
        _load(encoder.get_submodule(path), path, {name: tensor})


def _load(layer: nn.Module, path: str, tensors: dict[str, torch.Tensor]) -> None:
    own = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}
    layer.load_state_dict(own, strict=True, assign=True)


def encode(clip: comfy.sd.CLIP, text: str, cached: bool = True) -> list[Any]:
    """CONDITIONING of a prompt, checked: a damaged weight is named.

    cached: for a prompt that is known, our encoder is neither read nor loaded. Its features are then kept, and given
    out, in the precision that Z-Image computes in here (`prompts.cache_dtype`), the first time as well; without, they
    are float32's.
    """
    tokens = clip.tokenize(text)
    if isinstance(clip.tokenizer, ZImageTokenizer) and (unknown := clip.tokenizer.zimage.unknown(text)):
        shown = ", ".join(unknown[:8])
        notices.warn(f"This small model doesn't know: {shown}. It draws simple shapes only; its note lists its words.")
    key = prompts.key(clip, tokens) if cached and isinstance(clip.cond_stage_model, ZImageTextModel) else None
    known = None if key is None else prompts.cache().get(key)
    if known is not None:
        logger.debug("Prompt known, text encoder not used: %.60r", text)
        return _conditioning(known)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if any(isinstance(cond, torch.Tensor) and not cond.isfinite().all() for cond, _ in conditioning):
        lora.check_patches(clip.patcher)
        # as ComfyUI computes every text encoder, so there is no safer way
        raise not_finite("the text encoder", "float32 with plain attention", text_encoder=clip.cond_stage_model)
    if key is None:
        return conditioning
    features = conditioning[0][0].to(prompts.cache_dtype())
    if not features.isfinite().all():  # beyond the range of float16
        return conditioning
    prompts.cache().put(key, features)
    return _conditioning(features)


def _conditioning(features: torch.Tensor) -> list[Any]:
    """As `clip.encode_from_tokens_scheduled` gives it. float32, since other nodes add and concatenate them."""
    cond = features.float().to(mm.intermediate_device())
    mask = torch.ones(cond.shape[:2], dtype=torch.long, device=cond.device)
    return [[cond, {"pooled_output": None, "attention_mask": mask}]]


def _tokenizer(path: str | Path) -> Tokenizer:
    return open_tokenizer(path) if snapshot_folder(path) else Tokenizer(QWEN_TOKENIZER)


def load_clip_patcher(
    path: str,
    weight_dtype: torch.dtype | None = None,
    cache_converted: bool = False,
    network: str = OURS,
    disable_dynamic: bool = False,
):
    return load_clip(path, weight_dtype, cache_converted, network, disable_dynamic).patcher
