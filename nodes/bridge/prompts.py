"""The prompt cache in ComfyUI: where it lies, what a conditioning depends on, and in which precision it is kept.

For our own text encoder only: what a node makes of another one, ComfyUI keeps while the node's inputs stay the same.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.supported_models
import comfyui_version
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...zimage_core.prompts.cache import DISK_BYTES, PromptCache, key_of
from . import lora

logger = logging.getLogger(__name__)

VARIABLE = "ZIMAGE_PROMPT_CACHE_MB"
PARAMETERS = 6_154_908_736  # of the published transformer


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


def cache_dtype() -> torch.dtype:
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
    """What our encoder's features of these tokens depend on, or None where other nodes have changed more than a LoRA.

    Token ids stand for prompt, template, limit and tokenizer.
    """
    model, patcher = clip.cond_stage_model, clip.patcher
    # by an attribute of its own in place of the class's
    replaced = any(hasattr(type(thing), name) for thing in (clip, model, patcher) for name in vars(thing))
    if replaced or type(clip) is not comfy.sd.CLIP or clip.use_clip_schedule or clip.apply_hooks_to_conds is not None:
        return None
    patches = _patches(patcher)
    if patches is None or _is_altered(patcher):
        return None
    try:
        return key_of(
            encoder=model.identity,
            host=comfyui_version.__version__,
            patches=patches,
            layer=clip.layer_idx,
            device=patcher.load_device.type,
            cached=str(cache_dtype()),
            tokens=tokens,
        )
    except TypeError as error:  # embeddings among the tokens
        logger.debug("This prompt is not looked up in the cache: %s", error)
        return None


def _patches(patcher: ModelPatcher) -> list[Any] | None:
    """What our LoRA add to each weight; None if there are patches of others."""
    found = []
    for name, patches in sorted(patcher.patches.items()):
        for strength, adapter, *others in patches:
            if type(adapter) is not lora.ZImageAdapter or (strength, *others) != (1.0, 1.0, None, None):
                return None
            found.append((name, adapter.digest))
    return found


def _is_altered(patcher: ModelPatcher) -> bool:
    """Whether something but patches may change what comes out."""
    if patcher.forced_hooks is not None or patcher.current_hooks is not None:
        return True
    tables = [kind for table in (patcher.callbacks, patcher.wrappers) for kind in table.values()]
    called = [name for kind in tables for name, calls in kind.items() if calls and name != lora.ATTACHMENT]
    # ComfyUI sets this one itself for every text encoder, to what they compute in anyway
    objects = [patch for patch in patcher.object_patches.items() if patch != ("manual_cast_dtype", torch.float32)]
    attached = (patcher.injections, patcher.additional_models, patcher.attachments, patcher.weight_wrapper_patches)
    return any((patcher.hook_patches, called, objects, *attached, *patcher.model_options.values()))
