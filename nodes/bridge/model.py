"""MODEL: the S3-DiT as ComfyUI's own kind of model, so that its memory manager, samplers, LoRA and patches apply.

The class derives from ComfyUI's native Z-Image model and keeps its parameter names; only the network is ours.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models
import torch
from comfy.ldm.modules.attention import optimized_attention_masked
from torch import Tensor

from ...zimage_core.backends.operations import Gain
from ...zimage_core.config import SchedulerConfig, TransformerConfig
from ...zimage_core.model import reference
from ...zimage_core.model.captions import Captions
from ...zimage_core.model.transformer import ZImageTransformer
from ...zimage_core.sampling.loop import model_time, velocity
from ...zimage_core.weights.component import Component
from ...zimage_core.weights.snapshot import ModelSource, open_model
from . import (
    attention,
    borders,
    control,
    files,
    folders,
    layers,
    native_transformer,
    others,
    quantized,
    quantized_patcher,
    references,
)
from .kernels import KernelHalfOperations, KernelOperations, gain
from .others import NATIVE, OURS

logger = logging.getLogger(__name__)

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HALF = 2  # bytes
NATIVE_DIM = 3840  # the width for which ComfyUI measured memory_usage_factor


class ZImageNextDiT(ZImageTransformer):
    """The S3-DiT behind the call that ComfyUI makes of a diffusion model. Others know it by NextDiT in its name."""

    gain: Gain = staticmethod(gain)
    lean_operations = KernelOperations
    half_operations = KernelHalfOperations
    rope_embedder: Any  # where other nodes put their own

    def __init__(self, config: TransformerConfig, *, operations: Any, device: Any, dtype: Any, **_unused: Any):
        super().__init__(config, ops=operations, device=device, dtype=dtype)
        self.dtype = dtype
        self.run_captions = _RunCaptions()
        others.describe_transformer(self)

    def forward(self, x, timesteps, context, num_tokens=None, attention_mask=None, **kwargs):  # type: ignore[override]
        """Latents [B, 16, h, w], sigma [B], captions [B, L, cap_feat_dim] -> dlatents/dsigma [B, 16, h, w].

        The positional order is the native model's: wrappers installed by other nodes (EasyCache, ...) rely on it.
        """
        options = kwargs.get("transformer_options", {})
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        if wrappers:
            x = x.clone()  # EasyCache writes into it, and where nothing was cast ComfyUI still computes with it
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        return executor.execute(x, timesteps, context, num_tokens, attention_mask, **kwargs)

    def _velocity(self, x, timesteps, context, num_tokens=None, attention_mask=None, **kwargs):
        options = kwargs.get("transformer_options", {})
        self._check(x, context)
        height, width = x.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            # Areas of an image may have odd sizes; like the native model, make them even and cut the excess off.
            x = comfy.ldm.common_dit.pad_to_patch_size(x, (patch, patch))
        attend: Any = partial(_attention, options)
        override = options.get(attention.OVERRIDE)
        patches = _Patches(options, self.config)
        if beside := references.of(self.config, len(x), kwargs):
            captions: Any = reference.refine(self, context, beside, x.dtype, attention=attend)
        else:
            captions = self.run_captions.refined(self, x, context, options)
        out = super().forward(
            x,
            model_time(timesteps),
            captions,
            attention=attend,
            after_block=patches.after_block,
            patch_tokens=patches.patch_tokens if patches else None,
            rope_options=options.get("rope_options"),
            # as natively, for another node's function, which may go by the places of tokens
            captions_first=override is not None and not isinstance(override, attention.Choice),
            **control.at_work(options, x),
        )
        return velocity(out)[:, :, :height, :width]

    def _rotations(self, positions: Tensor) -> Tensor:
        return self.rope_embedder(positions).movedim(1, 2)

    def refines_as_built(self) -> bool:
        own = type(self.rope_embedder) is others.Rotations and self.rope_embedder.is_as_built(self.config)
        return own and super().refines_as_built()

    def _check(self, x: Tensor, context: Tensor) -> None:
        latent = ("batch", self.config.in_channels, "height/8", "width/8")
        borders.checked("The latent", x, latent, "Z-Image makes images: start from EmptySD3LatentImage.")
        borders.checked("The prompt", context, borders.FEATURES, "Encode it anew.")
        if context.shape[-1] != self.config.cap_feat_dim:
            raise ValueError(
                f"The prompt was encoded with a width of {context.shape[-1]}, this model expects "
                f"{self.config.cap_feat_dim}. Load text encoder and transformer from the same Z-Image snapshot."
            )


def _attention(options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """ComfyUI's attention of choice; the options carry overrides that other nodes set."""
    return optimized_attention_masked(q, k, v, q.shape[1], mask, skip_reshape=True, transformer_options=options)


class _RunCaptions:
    """Refined captions, from the start of a sampling run to its end; only on a CPU.

    ComfyUI hands the same prompts over in new tensors at every step, and other nodes may change them on the way: only
    their content tells whether they are the same. On a GPU looking would make ComfyUI wait for it, for a hundredth of
    a step at most.
    """

    MOST = 8  # prompts of areas and schedules; more than any graph in use, and a bound

    def __init__(self) -> None:
        self.patcher: Any = None  # of the run
        self.known: list[tuple[Tensor, torch.dtype, Captions]] = []

    def begin(self, patcher: Any) -> None:
        self.patcher, self.known = patcher, []

    def end(self, _patcher: Any) -> None:
        self.patcher, self.known = None, []

    def refined(
        self, model: ZImageTransformer, x: Tensor, context: Tensor, options: dict[str, Any]
    ) -> Captions | Tensor:
        """What the transformer takes in place of `context`."""
        # ComfyUI's hooks change weights, other nodes' overrides the attention and what they put into the blocks
        # anything, all perhaps by the step
        steady = self.patcher is not None and self.patcher.current_hooks is None
        steady = steady and isinstance(options.get(attention.OVERRIDE), attention.Choice)
        steady = steady and model.refines_as_built()
        if not steady or x.device.type != "cpu" or torch.compiler.is_compiling() or len(context) != len(x):
            return context
        for features, dtype, captions in self.known:
            if dtype == x.dtype and features.dtype == context.dtype and torch.equal(features, context):
                return captions
        captions = model.refine_captions(context, x.dtype, attention=partial(_attention, options))
        self.known = [*self.known[1 - self.MOST :], (context, x.dtype, captions)]
        return captions


class _Patches:
    """The patches of other nodes, run after a block as the native model does; true where there are any."""

    def __init__(self, options: dict[str, Any], config: TransformerConfig):
        self.options = options
        self.config = config
        self.patches = options.get("patches", {})

    def __bool__(self) -> bool:
        return any(self.patches.get(name) for name in ("noise_refiner", "double_block"))

    def after_block(self, stage: str, index: int) -> None:
        """Keeps the options current."""
        if not torch.compiler.is_compiling():
            mm.throw_exception_if_processing_interrupted()  # a step takes minutes; only newer versions look inside
        if self:
            return  # the options say where a patch is until it has run
        self._advance(stage, index)

    def patch_tokens(self, stage: str, index: int, state: dict[str, Any]) -> None:
        if stage == "noise_refiner":
            for patch in self.patches.get("noise_refiner", []):
                out = patch(self._arguments(state, index, block_type="noise_refiner"))
                if "img" in out:
                    state["img"] = out["img"]
        else:
            for patch in self.patches.get("double_block", []):
                out = patch(self._arguments(state, index))
                for name in ("img", "txt"):
                    if name in out and out[name] is not state[name]:
                        state[name][:] = out[name]
        self._advance(stage, index)

    def _advance(self, stage: str, index: int) -> None:
        if stage == "layers" and index + 1 < self.config.n_layers:
            self.options["block_index"] = index + 1
        elif stage == "noise_refiner" and index == self.config.n_refiner_layers - 1:
            self.options.update(total_blocks=self.config.n_layers, block_type="double", block_index=0)

    def _arguments(self, state: dict[str, Any], index: int, **extra: Any) -> dict[str, Any]:
        return {**state, "block_index": index, "transformer_options": self.options, **extra}


class ZImageModel(comfy.model_base.Lumina2):
    """ComfyUI's native model class around our network: being a Lumina2 is what makes ComfyUI map Z-Image's LoRA."""

    def __init__(
        self,
        model_config: ZImageModelConfig,
        config: TransformerConfig,
        scheduler: SchedulerConfig,
        device: torch.device,
    ):
        comfy.model_base.BaseModel.__init__(
            self,
            model_config,
            comfy.model_base.ModelType.FLOW,
            device=device,
            unet_model=partial(ZImageNextDiT, config),
        )
        self.memory_usage_factor_conds = ("ref_latents",)  # read by the inherited extra_conds_shapes
        self.scheduler_config = scheduler

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        references.check_vision(kwargs)
        return super().extra_conds(**kwargs)


class ZImageModelConfig(comfy.supported_models.ZImage):
    """What ComfyUI wants to know of a model, from the snapshot's files instead of from a detected state dict."""

    def __init__(self, source: ModelSource, allow_half: bool = True):
        """allow_half: float16 where the device has no bfloat16."""
        config = source.component.config
        super().__init__(
            {
                **others.native_config(config),  # some of it is read by ComfyUI's map of LoRA keys
                # ComfyUI judges by one norm whether its own network would overflow; ours doesn't, whatever the weights
                "allow_fp16": allow_half,
            }
        )
        self.sampling_settings = {
            "multiplier": 1.0,
            "shift": source.schedule.shift,
        }  # multiplier 1: the network gets sigma
        native: Any = type(self)
        self.memory_usage_factor = native.memory_usage_factor * config.dim / NATIVE_DIM
        if source.latent_factors is not None:  # the published ones are ComfyUI's defaults
            self.latent_format.scale_factor, self.latent_format.shift_factor = source.latent_factors


def load_model(
    path: str | Path,
    weight_dtype: torch.dtype | None = None,
    compiled: bool = False,
    cache_converted: bool = False,
    network: str = OURS,
    disable_dynamic: bool = False,
):
    """A ModelPatcher of the transformer in a snapshot or single file, whose tensors stay mapped where nothing is cast.

    weight_dtype: of the weights in memory; None is the file's, fitted to the device. compiled: see `ZImageTransformer`.
    cache_converted: weights that have to be cast or fused are mapped as well, from a file that is written for it.
    network: one of `others.NETWORKS`. In ComfyUI's own, GGUF weights are expanded.
    """
    native = network == NATIVE
    if native and compiled:
        raise ValueError(
            f"compile is for the network {OURS!r}, and network is {network!r}. Switch compile off; ComfyUI's node "
            "TorchCompileModel compiles its own network."
        )
    source = open_model(path, map_file=files.map_file())
    component = source.component
    model_config = ZImageModelConfig(source, not native or native_transformer.fits_half(component))
    device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    packed = weight_dtype is None and quantized.keeps(component) and not (native and quantized.is_gguf(component))
    if packed:
        asked = folders.asked_dtype()  # of the weights that are not quantized
        storage = component.dtype() if asked in (None, *FP8) else asked
        compute = mm.unet_manual_cast(None, device, model_config.supported_inference_dtypes)
        model_config.custom_operations, build_device = quantized.operations(component, compute, device)
        # GGUF has norms in float32: rounded, they would err more than all of the rest
        exact = compute == torch.float32 and quantized.is_gguf(component)
        weights = quantized.state_dict(component, None if exact else storage, compute)
    else:
        storage, compute = _dtypes(
            weight_dtype or folders.asked_dtype(), component, model_config.supported_inference_dtypes, device
        )
        model_config.custom_operations = None if native else layers.for_device(device)  # None: ComfyUI picks
        build_device = torch.device("meta")
        dtypes = _dtypes_in_memory(component, storage)
        stored = files.cache_converted(component, dtypes) if cache_converted else component
        weights = {name: stored.tensor(name, shape, dtype=dtypes[name]) for name, shape in component.shapes.items()}
    model_config.set_inference_dtype(storage, compute)

    if native:
        model: Any = native_transformer.Lumina2(model_config, component.shapes, build_device)
        model.scheduler_config = source.schedule
    else:
        model = ZImageModel(model_config, component.config, source.schedule, build_device)
        model.diffusion_model.compiled = compiled
    model.diffusion_model.requires_grad_(False).load_state_dict(weights, strict=True, assign=True)
    model.diffusion_model.requires_grad_(False).eval()
    if (compute or storage) == torch.float16 and not native:
        fits = model.diffusion_model.sums_fit_half = component.sums_fit_half()
        logger.info(
            "%s computes in float16, and adds up what its blocks put out in %s.",
            component.source,
            "float16 as well" if fits else "float32, as by its weights float16 might overflow",
        )
    model.trained_side = source.side
    model.device = offload_device  # until here "meta", where it was built
    model.to(offload_device)

    # ComfyUI rebinds CoreModelPatcher when it starts; it must be looked up at the time of the call.
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=offload_device)
    if packed or mm.is_device_cpu(device):
        quantized_patcher.keep_packed(patcher)
    if not native:
        captions = model.diffusion_model.run_captions
        patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, captions.begin)
        patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_CLEANUP, captions.end)
    patcher.cached_patcher_init = (load_model, (str(path), weight_dtype, compiled, cache_converted, network))
    return patcher


def _dtypes(
    asked: torch.dtype | None,
    component: Component,
    supported: list[torch.dtype],
    device: torch.device,
) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype of the weights in memory, dtype to which each layer casts them or None to compute in the former).

    ComfyUI decides what is computed in. Weights that each layer would cast to that anyhow, or that would be held in
    32 bits or more, stay as the file has them.
    """
    if asked is not None:
        return asked, mm.unet_manual_cast(asked, device, supported)
    stored = component.dtype()
    parameters = sum(math.prod(shape) for shape in component.shapes.values())
    storage = mm.unet_dtype(device=device, model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    compute = mm.unet_manual_cast(storage, device, supported) or storage
    if not mm.supports_cast(device, storage):  # fp8, where memory is short on a device that has none
        storage = compute
    cast = compute != storage or storage.itemsize > HALF
    if cast and stored.itemsize <= storage.itemsize and mm.supports_cast(device, stored):
        storage = stored
    return storage, None if compute == storage else compute


def _dtypes_in_memory(component: Component, storage: torch.dtype) -> dict[str, torch.dtype | None]:
    """Of each weight, None for the file's; only matrices become fp8, the rest is small and stays as it is."""
    return {
        name: storage if storage not in FP8 or (len(shape) == 2 and "." in name) else None
        for name, shape in component.shapes.items()
    }
