"""LoRA on ComfyUI's patchers: our reading and formulas, its memory manager applies them where the weight lies."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.weight_adapter
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...zimage_core.lora import apply as lora_apply
from ...zimage_core.lora import files as lora_files
from ...zimage_core.lora import formulas
from . import files, folders

# component -> what stands before our parameter names in ComfyUI's model (ours and its native Z-Image alike)
PREFIXES = {"transformer": "diffusion_model.", "text_encoder": "qwen3_4b.transformer."}
ATTACHMENT = "zimage_loras"  # the LoRAs that a patcher carries, for the report on how they overlap


# family, names of the parts, the parts, alpha, strength, number among the parts of a fused weight, of how many
Entry = tuple[str, tuple[str, ...], tuple[Tensor, ...], float | None, float, int | None, int]


class ZImageAdapter(comfy.weight_adapter.WeightAdapterBase):
    """All our adapters of one weight behind the call that ComfyUI makes of its own.

    Together, because each changes the weight as it was without the others: two LoRA agree in either order. `weights` is
    plain tuples: ComfyUI takes it apart and rebuilds it with moved tensors. alpha is a number, as asking a tensor for
    one would wait for the device.
    """

    name = "zimage"

    def __init__(self, loaded_keys: set[str], weights: tuple[Entry, ...]):
        self.loaded_keys = loaded_keys
        self.weights: Any = weights
        self.near: dict[torch.device, Any] = {}  # `weights` on the one device where they stay while a model is loaded

    def plus(self, target: lora_files.Target, adapter: formulas.Adapter, strength: float) -> ZImageAdapter:
        names, parts = tuple(adapter.tensors), tuple(adapter.tensors.values())
        entry: Entry = (adapter.family, names, parts, adapter.alpha, strength, target.part, target.parts)
        return ZImageAdapter(set(), (*self.weights, entry))

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        changes: list[lora_apply.Change] = []
        for family, names, tensors, alpha, own_strength, part, parts in self.near.get(weight.device, self.weights):
            adapter = formulas.Adapter(family, dict(zip(names, tensors, strict=True)), alpha)
            changes.append((lora_files.Target("", key, part, parts), adapter, strength * own_strength))
        return lora_apply.apply(weight, changes)

    @functools.cached_property
    def digest(self) -> str:
        """Of all that it adds to a weight."""
        hashed = hashlib.sha256()
        for family, names, tensors, *settings in self.weights:
            forms = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in tensors]
            hashed.update(repr((family, names, forms, settings)).encode())
            for tensor in tensors:
                hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return hashed.hexdigest()

    def size(self) -> int:
        return sum(tensor.nbytes for entry in self.weights for tensor in entry[2])

    def bring(self, device: torch.device) -> None:
        near = tuple((*entry[:2], tuple(part.to(device) for part in entry[2]), *entry[3:]) for entry in self.weights)
        self.near = {near[0][2][0].device: near}  # as weights there call it: "mps" is "mps:0"


def _bring(patcher: ModelPatcher, device: torch.device | None = None, *_load: Any) -> None:
    """After loading: what is added to a weight whenever that is used lies on the device.

    Some weights leave to make room for it: they are sent ahead of their use from pinned memory, factors are not. Where
    there is none to be made, each use sends its factors.
    """
    _leave(patcher)
    if device is None or device.type == "cpu" or getattr(patcher, "is_dynamic", bool)():  # the dynamic one sends ahead
        return
    needed = _unmerged(patcher)
    room = 0 if patcher.model.model_lowvram else mm.get_free_memory(device) - mm.minimum_inference_memory()
    while (size := sum(adapter.size() for adapter in needed)) > room:
        freed = patcher.partially_unload(patcher.offload_device, size - room) if patcher.model.model_lowvram else 0
        if not freed:
            return
        room += freed
        needed = _unmerged(patcher)  # those of the weights that left are more now
    for adapter in needed:
        adapter.bring(device)
    if patcher.model.model_lowvram:  # else ComfyUI would take it for weights that it has loaded twice
        patcher.model.model_loaded_weight_memory += size


def _leave(patcher: ModelPatcher, *_detach: Any) -> None:
    for adapter in _adapters(patcher).values():
        adapter.near = {}


def _unmerged(patcher: ModelPatcher) -> list[ZImageAdapter]:
    return [adapter for key, adapter in _adapters(patcher).items() if key not in patcher.backup]


def _adapters(patcher: ModelPatcher) -> dict[str, ZImageAdapter]:
    """Our adapters by the keys of their weights."""
    found = ((key, patch[1]) for key, patches in patcher.patches.items() for patch in patches)
    return {key: adapter for key, adapter in found if isinstance(adapter, ZImageAdapter)}


def add_lora(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, name: str, strength: float, strength_clip: float
) -> tuple[ModelPatcher, comfy.sd.CLIP | None, str]:
    """(MODEL, CLIP, report) with the file on top; the inputs stay as they are."""
    for label, value in (("strength", strength), ("strength_clip", strength_clip)):
        lora_files.checked_strength(value, f"`{label}`")
    # our encoder's weights may still be in the file, where they stay
    with getattr(clip and clip.cond_stage_model, "names_suffice", nullcontext)():
        return _add_lora(model, clip, name, strength, strength_clip)


def _add_lora(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, name: str, strength: float, strength_clip: float
) -> tuple[ModelPatcher, comfy.sd.CLIP | None, str]:
    patchers = {"transformer": model} if clip is None else {"transformer": model, "text_encoder": clip.patcher}
    weights = {kind: _weights(patcher, PREFIXES[kind]) for kind, patcher in patchers.items()}
    shapes = {kind: {key: tuple(weight.shape) for key, weight in of.items()} for kind, of in weights.items()}
    opened = lora_files.open_lora(folders.lora_path(name), shapes, map_file=files.map_file())
    waiting = _waiting(opened) if clip is None else []
    report = [opened.report(explained=waiting)]
    if waiting:
        report.append(f"{len(waiting)} keys are for the text encoder: connect `clip` to use them")

    model = model.clone()
    _patch(model, opened, "transformer", strength)
    earlier = model.get_attachment(ATTACHMENT) or ()
    for other in earlier:
        report.append(_overlap(opened, other, weights["transformer"]))
    model.set_attachments(ATTACHMENT, (*earlier, opened))
    if clip is not None:
        clip = clip.clone()
        _patch(clip.patcher, opened, "text_encoder", strength_clip)
    return model, clip, "\n".join(report)


def _weights(patcher: ModelPatcher, prefix: str) -> dict[str, Tensor]:
    """Our parameter names -> the weights without any patch."""
    weights: dict[str, Tensor] = dict(patcher.model.named_parameters())
    plain = {key: backup.weight for key, backup in patcher.backup.items()}
    return {key.removeprefix(prefix): plain.get(key, weights[key]) for key in weights if key.startswith(prefix)}


def _patch(patcher: ModelPatcher, opened: lora_files.Lora, component: str, strength: float) -> None:
    if not strength:
        return  # a patch of strength 0 would still cost its time on every load
    patches: dict[str, ZImageAdapter] = {}
    for target, adapter in opened.of(component).items():
        key = PREFIXES[component] + target.name
        if key not in patches:
            patches[key] = _taken(patcher, key)
        patches[key] = patches[key].plus(target, adapter, strength)
    patcher.add_patches(patches)
    for moment, call in ((CallbacksMP.ON_LOAD, _bring), (CallbacksMP.ON_DETACH, _leave)):
        patcher.remove_callbacks_with_key(moment, ATTACHMENT)  # of a LoRA before
        patcher.add_callback_with_key(moment, ATTACHMENT, call)


def check_patches(patcher: ModelPatcher) -> None:
    """Raises ValueError if what a node added to the weights is not finite: the model is not at fault then.

    Looks at every value of every patch; for when a result is bad.
    """
    for key, patches in patcher.patches.items():
        for strength, patch, strength_model, *_ in patches:
            for part in _parts((strength, strength_model, getattr(patch, "weights", patch))):
                if not (part.float().isfinite().all() if isinstance(part, Tensor) else math.isfinite(part)):
                    raise ValueError(
                        f"What a LoRA or another node adds to {key} is not finite (NaN or infinite), in its values or "
                        "its strength. The model is not at fault: remove that LoRA, or set its strength to a number."
                    )


def _parts(patch: Any) -> Iterator[Any]:
    """The tensors and numbers in nested tuples and lists."""
    if isinstance(patch, (tuple, list)):
        for part in patch:
            yield from _parts(part)
    elif isinstance(patch, (Tensor, float, int)) and not getattr(patch, "is_meta", False):
        yield patch


def _taken(patcher: ModelPatcher, key: str) -> ZImageAdapter:
    """What we have put on a weight before, which is taken off the patcher to be put on again with more."""
    patches = patcher.patches.get(key, [])
    ours = [patch[1] for patch in patches if isinstance(patch[1], ZImageAdapter)]
    if ours:
        patcher.patches[key] = [patch for patch in patches if not isinstance(patch[1], ZImageAdapter)]
    return ours[0] if ours else ZImageAdapter(set(), ())


def _waiting(opened: lora_files.Lora) -> list[str]:
    """The keys for the text encoder that found none."""
    return [key for key in opened.left if lora_files.for_text_encoder(key)]


def _overlap(opened: lora_files.Lora, other: lora_files.Lora, weights: dict[str, Tensor]) -> str:
    cosine, ours, theirs = lora_apply.overlap(opened, other, weights)
    norms = f"norm relative to the weights {ours:.2%} here, {theirs:.2%} there"
    return f"with {other.path.name}: cosine {cosine:+.2f}, {norms}"
