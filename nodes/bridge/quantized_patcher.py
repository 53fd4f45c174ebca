"""Patchers of models whose weights stay as they are: LoRA, merges and hooks on top, exactly, and files of what samples.

Such are quantized weights, and on a CPU those of less than 32 bits: it computes in float32, so that a sum that is
rounded to what holds the weight would be less exact than ComfyUI's, and take memory that the mapped weight does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import LowVramPatch, ModelPatcher
from torch import Tensor, nn

from ...zimage_core.weights.quantized import DEQUANTIZED
from . import quantized

FULL = 4  # bytes of what a CPU computes in


def keep_packed(patcher: ModelPatcher) -> None:
    """Makes a patcher, of whichever kind ComfyUI has chosen for its device, one that knows quantized weights."""
    patcher.__class__ = _packed(type(patcher))
    if not patcher.is_clip and mm.is_device_cpu(patcher.load_device):
        for layer in patcher.model.modules():
            weight = layer._parameters.get("weight")
            narrow = type(weight) is nn.Parameter and weight.ndim == 2 and weight.dtype.itemsize < FULL
            if narrow and weight.dtype.is_floating_point and hasattr(layer, "weight_function"):
                layer.is_kept = True
    if patcher.is_clip and not hasattr(ModelPatcher, "model_state_dict_for_saving"):
        # older ComfyUI save an encoder by its state dict alone; what it is patched with, its layers know
        device = patcher.load_device
        patcher.model.register_state_dict_post_hook(
            lambda model, state, prefix, _: state.update(_for_saving(model, prefix, _attached, device))
        )


@functools.cache
def _packed(kind: type[ModelPatcher]) -> type[ModelPatcher]:
    return kind if issubclass(kind, _Packed) else type(f"Packed{kind.__name__}", (_Packed, kind), {})


class _Packed:
    """Before a patcher class of ComfyUI, static or dynamic: patches are added whenever a weight is expanded.

    ComfyUI does so with offloaded ones. Merging would have to quantize the sum again: not exact, not to be taken
    back, and impossible for GGUF. To who asks for it, a quantized weight is what its layer computes with.
    """

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, **settings):
        weight = comfy.model_patcher.get_key_weight(self.model, key)[0]
        if not _is_kept(self.model, key):
            wanted = {"return_weight": True} if return_weight else {}
            return super().patch_weight_to_device(key, device_to, inplace_update, **wanted, **settings)
        if return_weight:
            return _patched(weight, self._patches_of(key), device_to).to(weight.dtype)
        if settings.get("force_cast"):  # the dynamic kind pages no weight as small as this
            self.backup.setdefault(key, _Backup(weight, False))
            comfy.utils.set_attr_param(self.model, key, weight.to(device=device_to))
        return None

    def model_state_dict(self, filter_prefix=None):
        """What can be patched and merged. Of a quantized layer that is its weight, not the tensors that store it."""
        layers = dict(_layers(self.model))
        state = {}
        for key, value in super().model_state_dict(filter_prefix).items():
            path, _, last = key.rpartition(".")
            if key in layers or last == "bias" or f"{path}.weight" not in layers:
                state[key] = layers[key].weight if key in layers else value
        return state

    def clone(self, *arguments, **settings):
        cloned = super().clone(*arguments, **settings)
        cloned.__class__ = _packed(type(cloned))  # a clone that is not to be dynamic is of ComfyUI's own kind
        return cloned

    # Loading

    def load(self, *arguments, **settings):
        with self._marked():
            result = super().load(*arguments, **settings)
        self._attach()
        return result

    def partially_unload(self, *arguments, **settings):
        with self._marked():
            result = super().partially_unload(*arguments, **settings)
        self._attach()
        return result

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for _, layer in _layers(self.model):
                layer.weight_function = []
                layer.is_whole = False
        return super().unpatch_model(device_to, unpatch_weights)

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Within it, layers that are loaded as a whole have ComfyUI's mark, which it needs to move weights.

        Outside they have it not: to others it says that patches are in the weight, to be taken as it is stored.
        """
        layers = [layer for _, layer in _layers(self.model)]
        for layer in layers:
            layer.comfy_patched_weights = getattr(layer, "is_whole", False)
        try:
            yield
        finally:
            for layer in layers:
                layer.is_whole, layer.comfy_patched_weights = layer.comfy_patched_weights, False

    def _attach(self) -> None:
        """Gives each quantized layer its patches, in place of those by which ComfyUI would quantize the sum again."""
        for key, layer in _layers(self.model):
            others = [function for function in layer.weight_function if not isinstance(function, LowVramPatch)]
            layer.weight_function = self._patches_of(key) + others
            layer.weight_lowvram_function = None  # of dynamic loading

    def _patches_of(self, key: str, _layer: nn.Module | None = None) -> list[LowVramPatch]:
        return [LowVramPatch(key, self.patches)] if key in self.patches else []

    # Hooks: patches for a part of the steps

    def patch_hooks(self, hooks):
        super().patch_hooks(hooks)
        self._take_hooks_off()
        if hooked := self.get_combined_hook_patches(hooks):
            originals = self.get_key_patches()
            for key, layer in _layers(self.model):
                if key in hooked:
                    layer.weight_function = [*layer.weight_function, _HookPatch(key, hooked[key], originals)]

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, *arguments, **settings):
        if not _is_kept(self.model, key):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *arguments, **settings)

    def unpatch_hooks(self, *arguments, **settings):
        super().unpatch_hooks(*arguments, **settings)
        self._take_hooks_off()

    def _take_hooks_off(self) -> None:
        for _, layer in _layers(self.model):
            layer.weight_function = [function for function in layer.weight_function if type(function) is not _HookPatch]

    # Saving

    def state_dict_for_saving(self, *arguments, **settings):
        with self._saving(self.model.diffusion_model, "diffusion_model."):
            return super().state_dict_for_saving(*arguments, **settings)

    def model_state_dict_for_saving(self, model=None, prefix=""):
        with self._saving(self.model if model is None else model, prefix):
            return super().model_state_dict_for_saving(model, prefix)

    @contextmanager
    def _saving(self, model: nn.Module, prefix: str) -> Iterator[None]:
        """Within it, the state dict of a network has what is to be saved, and ComfyUI takes it as it is."""

        def patches_of(name: str, _layer: nn.Module) -> list[LowVramPatch]:
            return self._patches_of(prefix + name)

        def complete(network: nn.Module, state: dict[str, Tensor], path: str, _metadata: Any) -> None:
            state.update(_for_saving(network, path, patches_of, self.load_device))

        layers = [layer for _, layer in _layers(model)]
        hook = model.register_state_dict_post_hook(complete)
        for layer in layers:
            layer.comfy_patched_weights = True
        try:
            yield
        finally:
            hook.remove()
            for layer in layers:
                layer.comfy_patched_weights = False


class _Backup(NamedTuple):
    """What ComfyUI keeps of a weight that it has put another in the place of."""

    weight: Tensor
    inplace_update: bool


@dataclass
class _HookPatch:
    """Adds the patches of hooks to a weight [out, in], in place."""

    key: str
    patches: list
    originals: dict[str, list]  # weights without patches, for those that are differences to them

    def __call__(self, weight: Tensor) -> Tensor:
        kind = weight.dtype
        return comfy.lora.calculate_weight(self.patches, weight, self.key, kind, original_weights=self.originals)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name of the weight, layer) of those whose weight stays as it is."""
    for name, module in model.named_modules():
        if _is_quantized(getattr(module, "weight", None)) or getattr(module, "is_kept", False):
            yield f"{name}.weight", module


def _is_kept(model: nn.Module, key: str) -> bool:
    path, _, last = key.rpartition(".")
    layer = model.get_submodule(path)
    return last == "weight" and (_is_quantized(layer.weight) or getattr(layer, "is_kept", False))


def _is_quantized(weight: Any) -> bool:
    return isinstance(weight, quantized.QuantizedTensor)


def _patched(weight: Tensor, patches: list[LowVramPatch], device: torch.device | None) -> Tensor:
    """What the layer computes with, float32 [out, in]."""
    exact = weight.to(device=device, dtype=torch.float32)
    exact = exact.dequantize() if _is_quantized(exact) else exact
    for patch in patches:
        exact = patch(exact)
    return exact


def _attached(_name: str, layer: nn.Module) -> list[LowVramPatch]:
    return [function for function in layer.weight_function if isinstance(function, LowVramPatch)]


# Saving


def _for_saving(
    model: nn.Module,
    prefix: str,
    patches_of: Callable[[str, nn.Module], list[LowVramPatch]],
    device: torch.device,
) -> dict[str, Tensor]:
    """Of a network's quantized weights, key -> what is saved in place of what stores it.

    GGUF's are expanded: ComfyUI has no such format. Patched ones are quantized again, as ComfyUI does with its own;
    the rest is left as the file has it.
    """
    saved: dict[str, Tensor] = {}
    for name, layer in _layers(model):
        weight, key, patches = layer.weight, prefix + name, patches_of(name, layer)
        if not _is_quantized(weight):
            like = {key: torch.empty_like(weight, device="meta")} if patches else {}
        elif weight._layout_cls == quantized.GGUF:
            like = {key: torch.empty(weight.shape, dtype=DEQUANTIZED, device="meta")}
        elif patches:
            like = weight.state_dict(key)
        else:
            continue
        source = _Source(key, layer, patches, device)
        saved |= {part: _Part(tensor, source, part) for part, tensor in like.items()}
    return saved


@dataclass
class _Source:
    """Makes what is saved of a weight when the first part of it is written."""

    key: str
    layer: nn.Module
    patches: list[LowVramPatch]
    device: torch.device
    made: dict[str, Tensor] = field(default_factory=dict)

    def take(self, part: str) -> Tensor:
        if part not in self.made:
            made = {self.key: _patched(self.layer.weight, self.patches, self.device)}
            if _is_quantized(self.layer.weight) and self.layer.weight._layout_cls != quantized.GGUF:
                seed = comfy.utils.string_to_seed(self.key)
                made = self.layer.set_weight(made[self.key], seed=seed, return_weight=True).state_dict(self.key)
            self.made = {name: tensor.to("cpu") for name, tensor in made.items()}
        return self.made.pop(part)


class _Part(Tensor):
    """A tensor without values, which it gets when ComfyUI moves it to the CPU to write it."""

    @staticmethod
    def __new__(cls, like: Tensor, source: _Source, key: str):
        return torch.empty_like(like, device="meta").as_subclass(cls)

    def __init__(self, like: Tensor, source: _Source, key: str):
        self.source, self.key = source, key

    def to(self, *_arguments, **_settings) -> Tensor:
        return self.source.take(self.key).to(self.dtype).reshape(self.shape).contiguous()
