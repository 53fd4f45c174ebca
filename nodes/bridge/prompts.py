"""The prompt cache in ComfyUI: where it lies, what a conditioning depends on, and in which precision it is kept."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from enum import Enum
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management as mm
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...zimage_core.prompts.cache import DISK_BYTES, PromptCache, key_of, stamps

logger = logging.getLogger(__name__)

VARIABLE = "ZIMAGE_PROMPT_CACHE_MB"
PARAMETERS = 6_154_908_736  # of the published transformer
CLIP_ATTRIBUTES = {
    "patcher",
    "cond_stage_model",
    "tokenizer",
    "layer_idx",
    "tokenizer_options",
    "use_clip_schedule",
    "apply_hooks_to_conds",
}
STARTED = time.time_ns()  # before any model was loaded


def cache() -> PromptCache:
    """The one of this server, in ComfyUI's user directory; other servers may use the same."""
    folder = Path(folder_paths.get_user_directory()) / "zimage" / "prompts"
    return _cache(folder, os.environ.get(VARIABLE, ""))


@functools.cache
def _cache(folder: Path, setting: str) -> PromptCache:
    if setting.strip() and not setting.strip().isdecimal():
        logger.warning(
            "%s is %r, expected a whole number of MB from 0 (which keeps prompts in memory only); %d is used.",
            VARIABLE,
            setting,
            DISK_BYTES // 2**20,
        )
        setting = ""
    return PromptCache(folder, int(setting) * 2**20 if setting.strip() else DISK_BYTES)


def kept_dtype() -> torch.dtype:
    """The precision of features that are kept: that in which ComfyUI computes Z-Image on this device.

    A transformer begins by casting features to what it computes in, so rounding them to that before changes nothing.
    Where that is float16 for our model, ComfyUI's own may compute in float32, for which they are kept.
    """
    device, supported = mm.get_torch_device(), comfy.supported_models.ZImage.supported_inference_dtypes
    storage = mm.unet_dtype(
        device=device, model_params=PARAMETERS, supported_dtypes=supported, weight_dtype=torch.bfloat16
    )
    computing = mm.unet_manual_cast(storage, device, supported) or storage
    return computing if computing.itemsize < torch.float32.itemsize else torch.float32


def key(clip: comfy.sd.CLIP, tokens: Any) -> str | None:
    """What the features of these tokens depend on, or None where something takes part that can't be known for sure.

    Token ids stand for prompt, template, limit and tokenizer.
    """
    if type(clip) is not comfy.sd.CLIP or not vars(clip).keys() <= CLIP_ATTRIBUTES:
        return None
    if clip.use_clip_schedule or clip.apply_hooks_to_conds is not None or _is_altered(clip.patcher):
        return None
    try:
        identity = getattr(clip.cond_stage_model, "identity", None) or _stock_identity(clip)
        return key_of(
            encoder=identity,
            patches=_patches(clip.patcher),
            layer=clip.layer_idx,
            device=clip.patcher.load_device.type,
            kept=str(kept_dtype()),
            tokens=tokens,
        )
    except (TypeError, OSError) as error:
        logger.debug("This prompt is not looked up in the cache: %s", error)
        return None


def _is_altered(patcher: ModelPatcher) -> bool:
    """Whether something but plain patches may change what comes out."""
    hooked = patcher.forced_hooks is not None or patcher.current_hooks is not None or bool(patcher.hook_patches)
    attached = (patcher.injections, patcher.additional_models, patcher.attachments, patcher.weight_wrapper_patches)
    called = [
        found for table in (patcher.callbacks, patcher.wrappers) for kind in table.values() for found in kind.values()
    ]
    options = {name: option for name, option in patcher.model_options.items() if option}
    # ComfyUI sets this one itself for every text encoder, to what they compute in anyway
    objects = {
        name for name, value in patcher.object_patches.items() if (name, value) != ("manual_cast_dtype", torch.float32)
    }
    return hooked or any(attached) or any(called) or bool(options) or bool(objects)


# Patches, by their content


def _patches(patcher: ModelPatcher) -> list[str]:
    """The hash of all LoRA and other patches, and ComfyUI's version, whose formulas apply them; empty if none does.

    Raises TypeError for one that can't be known by its content.
    """
    if not patcher.patches:
        return []
    if patcher.patches_uuid not in _hashes:
        if len(_hashes) > 100:
            _hashes.clear()
        _hashes[patcher.patches_uuid] = _hash(patcher)
    found = _hashes[patcher.patches_uuid]
    return [found, _host_version()] if found else []


_hashes: dict[Any, str] = {}  # a patcher's patches_uuid, which changes with its patches -> their hash


def _hash(patcher: ModelPatcher) -> str:
    hashed, count = hashlib.sha256(), 0
    for name in sorted(patcher.patches):
        for strength, value, strength_model, offset, function in patcher.patches[name]:
            if function is not None:
                raise TypeError(f"the patch of {name} has a function of its own")
            if strength == 0 and strength_model == 1 and isinstance(value, WeightAdapterBase):
                continue  # adds nothing
            _feed(hashed, (name, strength, value, strength_model, offset))
            count += 1
    return hashed.hexdigest() if count else ""


def _feed(hashed: Any, value: Any) -> None:
    """Adds a value to a hash, such that different values make different bytes."""
    if value is None or isinstance(value, bool | int | float | str):
        said = repr(value)
    elif isinstance(value, list | tuple):
        said = f"{len(value)} values"
    elif isinstance(value, dict):
        said = f"{len(value)} items"
    elif type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta:
        said = f"{value.dtype} {list(value.shape)}"
    elif isinstance(value, WeightAdapterBase) and _is_known(value):
        said = f"adapter {value.name}"
    else:
        raise TypeError(f"a patch has a {type(value).__name__}, whose effect is not known")
    hashed.update(f"{type(value).__name__} {len(said)} {said} ".encode())
    if isinstance(value, list | tuple):
        for item in value:
            _feed(hashed, item)
    elif isinstance(value, dict):
        for name in sorted(value, key=repr):
            _feed(hashed, name)
            _feed(hashed, value[name])
    elif isinstance(value, Tensor):
        hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, WeightAdapterBase):
        _feed(hashed, value.weights)


def _is_known(adapter: WeightAdapterBase) -> bool:
    """Whether it is of a class of ComfyUI or ours, and `weights` is all there is to it."""
    module = type(adapter).__module__
    return module.startswith(("comfy.weight_adapter.", f"{__package__}.")) and vars(adapter).keys() <= {
        "loaded_keys",
        "weights",
    }


@functools.cache
def _host_version() -> str:
    return (Path(comfy.sd.__file__).parents[1] / "comfyui_version.py").read_text(encoding="utf-8")


# Text encoders of ComfyUI's own loaders


def _stock_identity(clip: comfy.sd.CLIP) -> dict[str, Any]:
    """What ComfyUI's own loader has read. Raises TypeError where that can't be known."""
    init = getattr(clip.patcher, "cached_patcher_init", None)
    model = clip.cond_stage_model
    if init is None or init[0].__module__ != "comfy.sd" or not type(model).__module__.startswith("comfy."):
        raise TypeError(f"the text encoder is a {type(model).__name__} of an unknown loader")
    texts: list[str] = []
    arguments = _plain(init[1:], texts)
    files = [text for text in texts if os.path.isfile(text)]
    for file in files:
        state = os.stat(file)
        # other than our own loader, ComfyUI's says nothing of the files as they were when it read them
        if max(state.st_mtime_ns, state.st_ctime_ns) >= STARTED:
            raise TypeError(f"{file} has changed since ComfyUI started")
    return {
        "host": _host_version(),
        "loader": init[0].__name__,
        "arguments": arguments,
        "files": stamps(files),
        "model": type(model).__name__,
        "dtypes": sorted(map(str, getattr(model, "dtypes", ()))),
        "attention": comfy.ldm.modules.attention.optimized_attention.__name__,
    }


def _plain(value: Any, texts: list[str]) -> Any:
    """A loader's argument as JSON has it; strings are also added to `texts`."""
    if isinstance(value, str):
        texts.append(value)
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item, texts) for item in value]
    if isinstance(value, dict):
        return [[_plain(name, texts), _plain(value[name], texts)] for name in sorted(value, key=repr)]
    raise TypeError(f"the text encoder was loaded with a {type(value).__name__}")
