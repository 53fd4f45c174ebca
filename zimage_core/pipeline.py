"""The whole of Z-Image on one page: prompt -> caption features -> denoised latents -> image."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .config import SchedulerConfig
from .diagnostics import finite
from .diagnostics.finite import NotFinite, named
from .errors import CheckpointError
from .lora import apply as lora_apply
from .lora import files as lora_files
from .model import vae_bands
from .model.text_encoder import TextEncoder
from .model.tokenizer import MAX_LENGTH, Tokenizer
from .model.transformer import ZImageTransformer
from .model.vae import AutoencoderKL
from .prompts.cache import PromptCache, key_of, stamps
from .sampling import loop
from .sampling.schedule import sigmas
from .weights.component import Component
from .weights.snapshot import open_component, open_tokenizer, schedule_of

Result = TypeVar("Result")


class ZImagePipeline:
    """The four stages of one snapshot, on one device.

    pipe = ZImagePipeline.from_pretrained("models/Tongyi-MAI--Z-Image-Turbo", device="cuda", dtype=torch.bfloat16)
    image = pipe.generate("a red fox in the snow", seed=7)  # [1, 3, 1024, 1024] float32, 0..1
    """

    _text_encoder: TextEncoder | None  # None until `_unread` is built
    _unread: UnreadEncoder | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder | UnreadEncoder,
        transformer: ZImageTransformer,
        vae: AutoencoderKL,
        scheduler: SchedulerConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        prompt_cache: PromptCache | None = None,
        safe_retry: bool = True,
    ):
        """prompt_cache: keeps the features of prompts that an `UnreadEncoder` has encoded. What another network holds
        can't be known, so its features are not kept.
        safe_retry: a stage that gives numbers which are not finite (they would end as a black image) is computed once
        more in a dtype with more room, and the log says so; without it, and where that doesn't help, `CheckpointError`.
        """
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.device = torch.device(device)
        self.dtype = dtype
        self.prompt_cache = prompt_cache
        self.safe_retry = safe_retry
        self._plain: dict[str, dict[str, Tensor]] = {}  # component -> the weights that LoRA changed, as they were
        self._loras: list[tuple[lora_files.Lora, float]] = []
        self._encoder_loras: list[Any] = []  # those that change the text encoder, as they count for `prompt_cache`
        self.text_encoder = text_encoder

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        *,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        prompt_cache: PromptCache | None = None,
        safe_retry: bool = True,
    ) -> ZImagePipeline:
        """Loads a snapshot folder or an all-in-one file. The VAE runs in float32 unless asked otherwise, as officially.

        transformer, text_encoder, vae: where that part comes from, if from elsewhere: a single file or a snapshot.
        tokenizer: a snapshot or a tokenizer's folder; needed where no snapshot is given for the text encoder.
        The schedule is that of the transformer's snapshot; a single file gets Turbo's.
        prompt_cache: where features of prompts are looked up, and kept. The text encoder is read when a prompt is not
        in it, so a known one costs nothing. What is changed in its weights by hand, other than by `set_loras`, goes
        unnoticed.
        safe_retry: see `__init__`.

        Raises `CheckpointError`, naming the file, when something is missing, damaged or of another model.
        """
        given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        places = {kind: Path(place) for kind, own in given.items() if (place := own or path) is not None}
        if missing := given.keys() - places.keys():
            missed = " and ".join(sorted(missing))
            raise CheckpointError(f"no model given for {missed}; name a snapshot, or a file for each")
        parts = {kind: open_component(place, kind) for kind, place in places.items()}
        return cls(
            open_tokenizer(tokenizer or _tokenizer_place(places["text_encoder"], path)),
            UnreadEncoder(parts["text_encoder"], device=device, dtype=dtype),
            parts["transformer"].build(device=device, dtype=dtype),
            parts["vae"].build(device=device, dtype=vae_dtype),
            schedule_of(places["transformer"]),
            device=device,
            dtype=dtype,
            prompt_cache=prompt_cache,
            safe_retry=safe_retry,
        )

    @property
    def text_encoder(self) -> TextEncoder:
        """The network, with LoRA on it. Its weights are read now if nothing needed them before."""
        if self._text_encoder is None:
            assert self._unread is not None
            with torch.inference_mode(False):  # else it could never be trained, as what is made in that mode can't
                encoder = self._unread.build()
                self._plain["text_encoder"] = lora_apply.add(encoder, "text_encoder", self._loras)
            self._text_encoder = encoder
        return self._text_encoder

    @text_encoder.setter
    def text_encoder(self, encoder: TextEncoder | UnreadEncoder) -> None:
        self._unread = encoder if isinstance(encoder, UnreadEncoder) else None
        self._text_encoder = None if isinstance(encoder, UnreadEncoder) else encoder
        self._plain.pop("text_encoder", None)

    def set_loras(self, *files: tuple[str | Path, float]) -> list[lora_files.Lora]:
        """Puts exactly these LoRA files, each with its strength, onto transformer and text encoder; none takes all off.

        Returns what each holds; its `report()` tells what was matched. Raises `CheckpointError` for files of other
        models, and then changes nothing.
        """
        shapes = lora_files.shapes_of(transformer=self.transformer, text_encoder=self._text_encoder)
        if self._unread is not None:
            shapes["text_encoder"] = self._unread.shapes
        before = stamps(path for path, _ in files)
        opened = [
            (lora_files.open_lora(path, shapes), lora_files.checked_strength(strength)) for path, strength in files
        ]
        for kind, model in self._networks().items():
            lora_apply.remove(model, self._plain.pop(kind, {}))
            self._plain[kind] = lora_apply.add(model, kind, opened)
        self._loras = opened
        self._encoder_loras = [
            (stamp, strength)
            for stamp, (file, strength) in zip(before, opened, strict=True)
            if strength and file.of("text_encoder")
        ]
        return [file for file, _ in opened]

    def _networks(self) -> dict[str, nn.Module]:
        """Those that LoRA may be put on, without a text encoder that was not read yet."""
        encoder = {} if self._text_encoder is None else {"text_encoder": self._text_encoder}
        return {"transformer": self.transformer, **encoder}

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        width: int = 1024,
        height: int = 1024,
        steps: int = 8,
        guidance_scale: float = 0.0,
        cfg_normalization: bool | float = False,
        cfg_truncation: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = 1,
        max_prompt_tokens: int = MAX_LENGTH,
        output: Literal["image", "latents"] = "image",
        callback: loop.Callback | None = None,
    ) -> Tensor:
        """Images [B, 3, height, width] float32 in 0..1, or scaled latents [B, 16, height/8, width/8].

        prompt: one, or a list; each gives `batch_size` images in a row, B in all.
        negative_prompt: one for all or one per prompt; counts only with guidance. None is the empty prompt.
        width, height: pixels, divisible by 16.
        steps: model evaluations; 8 for Turbo, 28-50 for Base.
        guidance_scale: 0 is off (Turbo), 3-5 for Base; the CFG of ComfyUI is this + 1.
        cfg_normalization: k caps the norm of the guided velocity at k times the unguided one (True is 1, False off).
        cfg_truncation: guidance stops once 1 - sigma exceeds it; 1 never stops it.
        seed: an int seeds one generator for the whole batch, a list of B seeds each image on its own.
        callback: (steps done, steps, latents, estimated image latents) after each step; False cancels by raising
            `loop.Cancelled`. It starts over where sampling has to (see `safe_retry` of `__init__`).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check(prompts, width, height, batch_size, output)
        negatives = _spread(negative_prompt, len(prompts))
        batch = len(prompts) * batch_size

        cell = self.vae.config.downscale
        latents = noise(seed, (batch, self.transformer.config.in_channels, height // cell, width // cell))

        features = _repeat(self.encode_prompts(prompts, max_prompt_tokens), batch_size)  # B x [L_i, 2560]
        negative_features: list[Tensor] = []
        if guidance_scale > 0:
            negative_features = _repeat(self.encode_prompts(negatives, max_prompt_tokens), batch_size)

        patch = cell * self.transformer.config.patch_size
        levels = sigmas(steps, self.scheduler, (height // patch) * (width // patch))

        def sample(dtype: torch.dtype) -> Tensor:
            watched = finite.Steps(steps)
            if dtype == torch.float16 and any(item.dtype != dtype for item in [*features, *negative_features]):
                raise NotFinite("text features for step 1")  # which are wider where they don't fit

            def after_step(step: int, steps: int, latents: Tensor, estimate: Tensor) -> bool | None:
                watched.saw(estimate)
                return None if callback is None else callback(step, steps, latents, estimate)

            sampled = loop.denoise(
                self.transformer,
                latents.to(self.device),
                levels,
                features,
                negative_features or None,
                guidance_scale=guidance_scale,
                cfg_normalization=float(cfg_normalization),
                cfg_truncation=cfg_truncation,
                dtype=dtype,
                refine=partial(self.transformer.refine_captions, dtype=dtype),
                callback=after_step,
            )  # [B, 16, h, w] float32
            watched.check()
            return sampled

        safe = finite.safer(self.dtype, self.device)
        sampled = self._finite(sample, self.dtype, safe, transformer=self.transformer)
        return sampled if output == "latents" else self.decode(sampled)

    def _finite(
        self,
        compute: Callable[[torch.dtype], Result],
        dtype: torch.dtype,
        safe: torch.dtype | None,
        **networks: nn.Module,
    ) -> Result:
        """compute(dtype), or compute(safe) where that raises `NotFinite`."""
        try:
            return compute(dtype)
        except NotFinite as error:
            stage = str(error)
        return finite.again(
            stage,
            named(dtype),
            None if safe is None else named(safe),
            lambda: compute(safe or dtype),
            allowed=self.safe_retry,
            **networks,
        )

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], max_tokens: int = MAX_LENGTH) -> list[Tensor]:
        """Caption features of each prompt, [L_i, 2560] in the pipeline's dtype; those that are known are not computed.

        Token ids stand for prompt, template, limit and tokenizer: the features depend on nothing else of these.
        """
        prompts_ids = [tuple(self.tokenizer(prompt, max_tokens)) for prompt in prompts]
        features = {ids: found for ids in prompts_ids if (found := self._known(ids)) is not None}
        if missing := [ids for ids in dict.fromkeys(prompts_ids) if ids not in features]:
            longest = max(map(len, missing))
            rows = [[*ids, *[self.tokenizer.pad_id] * (longest - len(ids))] for ids in missing]
            for ids, feats in zip(missing, self._encoded(rows, [len(ids) for ids in missing]), strict=True):
                features[ids] = feats
                if self.prompt_cache is not None and self._unread is not None:
                    self.prompt_cache.put(self._key(ids), features[ids])
        return [features[ids] for ids in prompts_ids]

    def _encoded(self, rows: list[list[int]], lengths: list[int]) -> list[Tensor]:
        """Features [L_i, 2560] of rows of token ids, padded to one length; float32 where they don't fit our dtype."""
        ids = torch.tensor(rows, device=self.device)

        def encode(dtype: torch.dtype) -> list[Tensor]:
            encoded = self.text_encoder(ids, dtype)  # (B, L, 2560)
            features = [item[:length] for item, length in zip(encoded, lengths, strict=True)]
            if not torch.cat(features).isfinite().all():
                raise NotFinite("the text encoder")
            return features

        safe = torch.float32 if self.dtype.itemsize < torch.float32.itemsize else None
        features = self._finite(encode, self.dtype, safe, text_encoder=self.text_encoder)
        fitting = [item.to(self.dtype) for item in features]
        return fitting if torch.cat(fitting).isfinite().all() else features

    def _known(self, ids: tuple[int, ...]) -> Tensor | None:
        if self.prompt_cache is None or self._unread is None:
            return None
        found = self.prompt_cache.get(self._key(ids))
        return None if found is None else found.to(self.device)

    def _key(self, ids: tuple[int, ...]) -> str:
        assert self._unread is not None
        return key_of(
            encoder=self._unread.identity,
            loras=self._encoder_loras,
            device=self.device.type,
            dtype=str(self.dtype),
            tokens=ids,
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 16, h, w] to images [B, 3, H, W] float32 in 0..1."""

        def decode(dtype: torch.dtype) -> Tensor:
            vae = self.vae if dtype == own else copy.deepcopy(self.vae).to(dtype)
            raw = vae.unscale(latents).to(dtype)
            images = torch.cat([_decode_one(vae, item) for item in raw.split(1)])  # one by one bounds the memory
            if not images.isfinite().all():
                if not latents.isfinite().all():
                    raise ValueError(f"the latents to decode hold {finite.WHAT}: they are at fault, not the VAE")
                raise NotFinite("decoding (VAE)")
            return (images.float() / 2 + 0.5).clamp(0, 1)

        own = next(self.vae.parameters()).dtype
        return self._finite(decode, own, torch.float32 if own.itemsize < torch.float32.itemsize else None, vae=self.vae)


def _decode_one(vae: AutoencoderKL, raw: Tensor) -> Tensor:
    height, width = (side * vae.config.downscale for side in raw.shape[-2:])
    in_bands = vae_bands.advised(vae, height, width, raw)
    return vae_bands.decode(vae, raw) if in_bands else vae.decode(raw)


class UnreadEncoder:
    """A text encoder whose weights are read when it is built, though its files are checked before: it may never be."""

    def __init__(self, component: Component, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
        """dtype: of the weights, None the file's. Raises CheckpointError, naming the file, if it can't be built."""
        self.shapes = component.shapes
        self.identity = {"config": repr(component.config), "files": stamps(component.files.paths)}
        self._component = component
        self._device = device
        self._dtype = dtype
        # scales of a quantized weight can only be checked by reading it
        if not any(not part.is_gguf for name in self.shapes for part in component.packed(name)):
            component.build(device="meta", dtype=dtype)  # on this device no value is read

    def build(self) -> TextEncoder:
        """Raises CheckpointError if the files are no longer those that were opened."""
        if stamps(self._component.files.paths) != self.identity["files"]:
            raise CheckpointError(
                "the file has changed since it was opened; open the pipeline again", self._component.source
            )
        return self._component.build(device=self._device, dtype=self._dtype)


def _tokenizer_place(text_encoder: Path, path: str | Path | None) -> str | Path:
    return path if path is not None and os.path.isfile(text_encoder) and os.path.isdir(path) else text_encoder


def noise(seed: int | Sequence[int], shape: tuple[int, int, int, int]) -> Tensor:
    """Gaussian noise drawn on the CPU, so that a seed means the same on every device; float32.

    One seed draws the whole batch from one generator, as diffusers and ComfyUI do; a list draws each item from its own.
    """
    if isinstance(seed, int):
        return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    if len(seed) != shape[0]:
        raise ValueError(f"{len(seed)} seeds for {shape[0]} images; give one seed, or one for each image")
    return torch.stack([torch.randn(shape[1:], generator=torch.Generator("cpu").manual_seed(s)) for s in seed])


def _check(prompts: list[str], width: int, height: int, batch_size: int, output: Any) -> None:
    if not prompts:
        raise ValueError("no prompt given; an empty string is a valid prompt")
    for name, value in (("width", width), ("height", height)):
        if value < 16 or value % 16:
            nearest = max(16, round(value / 16) * 16)
            raise ValueError(f"{name} is {value}, but must be divisible by 16; the nearest is {nearest}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    if output not in ("image", "latents"):
        raise ValueError(f'output is {output!r}, expected "image" or "latents"')


def _spread(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    if len(negative_prompt) != count:
        raise ValueError(f"{len(negative_prompt)} negative prompts for {count} prompts; give one, or one for each")
    return list(negative_prompt)


def _repeat(items: list[Tensor], times: int) -> list[Tensor]:
    return [item for item in items for _ in range(times)]
