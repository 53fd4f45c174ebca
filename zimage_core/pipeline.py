"""The whole of Z-Image on one page: prompt -> caption features -> denoised latents -> image."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from . import autoencoding, images, inpaint
from .config import SchedulerConfig
from .diagnostics import finite
from .diagnostics.finite import NotFinite
from .errors import CheckpointError
from .lora import apply as lora_apply
from .lora import files as lora_files
from .model.control import ControlNetwork
from .model.text_encoder import TextEncoder
from .model.tokenizer import MAX_LENGTH, PROMPT_TEMPLATE, Tokenizer
from .model.transformer import ZImageTransformer
from .model.vae import AutoencoderKL
from .parallel.team import Team
from .prompts.cache import PromptCache, key_of, stamps
from .sampling import loop, reference, request
from .sampling.control import Control, working
from .sampling.schedule import shift_of, sigmas
from .sampling.start import Noise, Repaint, left_out, noised
from .weights.snapshot import open_component, open_tokenizer, schedule_of
from .weights.unread import UnreadEncoder

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
        self.sight: reference.Sight | None = None  # for reference images
        self.team: Team | None = None  # may be set: the processes that make each image together
        self._plain: dict[str, dict[str, Tensor]] = {}  # component -> the weights that LoRA changed, as they were
        self._networks_of_control: dict[tuple[Any, ...], ControlNetwork] = {}  # stamps of a file -> what it holds
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
        pipe = cls(
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
        pipe.sight = reference.Sight.of(places["transformer"])
        return pipe

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

    def release_text_encoder(self) -> None:
        """Gives its memory back, if its files can be read again; they are when a prompt is not in `prompt_cache`."""
        if self._unread is None or self._text_encoder is None:
            return
        self._text_encoder = None
        self._plain.pop("text_encoder", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
        width: int | None = None,
        height: int | None = None,
        steps: int = 8,
        guidance_scale: float = 0.0,
        cfg_normalization: bool | float = False,
        cfg_truncation: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = 1,
        max_prompt_tokens: int = MAX_LENGTH,
        image: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
        posterior: Literal["mean", "sample"] = "mean",
        control: Sequence[Control] = (),
        references: Sequence[Tensor] = (),
        output: Literal["image", "latents"] = "image",
        callback: loop.Callback | None = None,
    ) -> Tensor:
        """Images [B, 3, height, width] float32 in 0..1, or scaled latents [B, 16, height/8, width/8].

        prompt: one, or a list; each gives `batch_size` images in a row, B in all.
        negative_prompt: one for all or one per prompt; counts only with guidance. None is the empty prompt.
        width, height: pixels, divisible by 16; by default 1024, or those of `image`, cut to such numbers.
        steps: model evaluations; 8 for Turbo, 28-50 for Base.
        guidance_scale: 0 is off (Turbo), 3-5 for Base; the CFG of ComfyUI is this + 1.
        cfg_normalization: k caps the norm of the guided velocity at k times the unguided one (True is 1, False off).
        cfg_truncation: guidance stops once 1 - sigma exceeds it; 1 never stops it.
        seed: an int seeds one generator for the whole batch, a list of B seeds each image on its own.
        image: [1 or B, 3, H, W] in 0..1, to begin with; scaled and cut to width and height, never stretched.
        strength: of the steps, which share is run: near 0 the image hardly changes, 1 begins with noise. By default
            0.6, with a mask 1.
        mask: [1 or B, 1, H, W], of the same size as `image`, 1 where it is repainted; pixels with 0 stay bit for bit
            (if no size is given that has to cut or scale it). Between, see `sampling.start.Repaint`.
        posterior: "sample" draws the image's latents as diffusers does, before the noise; "mean" is the same always.
        control: networks that steer by images; several add up. See `sampling.control.Control`.
        references: images [1, 3, H, W] in 0..1, of any size, that Z-Image Omni or Edit sees beside the prompt.
        callback: (steps done, steps, latents, estimated image latents) after each step; False cancels by raising
            `loop.Cancelled`. It starts over where sampling has to (see `safe_retry` of `__init__`).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        width, height = request.size(width, height, image)
        request.check(prompts, width, height, batch_size, output)
        negatives = request.spread(negative_prompt, len(prompts))
        batch = len(prompts) * batch_size
        source = request.Source.of(image, mask, strength, batch, height, width)
        begin = 0 if source is None else left_out(steps, source.strength)
        steering = [self._steering(one, source, batch) for one in control]

        downscale = self.vae.config.downscale
        levels = sigmas(steps, self.scheduler, self._tokens(height, width))[begin:]
        draws = Noise(seed, batch)
        clean = None if source is None else self._clean(source.image, draws, posterior)
        latents = draws.draw((self.transformer.config.in_channels, height // downscale, width // downscale))
        keep = None
        if clean is not None and source is not None:
            if source.mask is not None:
                keep = Repaint(clean, latents.to(clean), images.covered(source.mask, downscale).to(clean), levels)
            latents = noised(clean, latents.to(clean), levels[0])
        shift = shift_of(self.scheduler, self._tokens(height, width))
        works = [working(one, network, self.encode, downscale, (height, width), shift) for one, network in steering]

        encode = partial(self.encode_prompts, max_tokens=max_prompt_tokens, template=reference.template(references))
        seen = reference.seen(references, self.sight, self.transformer, self.dtype, self.encode, self.encode_prompts)
        features = request.repeat(encode(prompts), batch_size)  # B x [L_i, 2560]
        negative_features = request.repeat(encode(negatives), batch_size) if guidance_scale > 0 else []

        together = None if self.team is None else self.team.model(self.transformer, guidance_scale > 0)

        def sample(dtype: torch.dtype) -> Tensor:
            refine = reference.refining(self.transformer, seen, dtype)
            watched = finite.Steps(steps)
            if dtype == torch.float16 and any(item.dtype != dtype for item in [*features, *negative_features]):
                raise NotFinite("text features for step 1")  # which are wider where they don't fit

            def after_step(step: int, steps: int, latents: Tensor, estimate: Tensor) -> bool | None:
                watched.saw(estimate)
                return None if callback is None else callback(step, steps, latents, estimate)

            sampled = loop.denoise(
                together or self.transformer,
                latents.to(self.device),
                levels,
                features,
                negative_features or None,
                guidance_scale=guidance_scale,
                cfg_normalization=float(cfg_normalization),
                cfg_truncation=cfg_truncation,
                dtype=dtype,
                refine=partial(together.refined, refine) if together else refine,
                controls=lambda sigma: [active for work in works for active in work.at(sigma)],
                keep=keep,
                callback=after_step,
            )  # [B, 16, h, w] float32
            watched.check()
            return sampled

        safe = finite.safer(self.dtype, self.device)
        sampled = self._finite(sample, self.dtype, safe, transformer=self.transformer)
        if output == "latents":
            return sampled
        made = self.decode(sampled)
        if source is None or source.mask is None:
            return made
        image, hole = source.image.to(made), source.mask.to(made)
        return images.composed(inpaint.matched(made, image, hole), image, hole)

    def _tokens(self, height: int, width: int) -> int:
        """Of an image of so many pixels."""
        side = self.vae.config.downscale * self.transformer.config.patch_size
        return (height // side) * (width // side)

    def _clean(self, image: Tensor, draws: Noise, posterior: str) -> Tensor:
        """Latents of the image to begin with, [1 or B, 16, h, w] float32."""
        if posterior not in ("mean", "sample"):
            raise ValueError(f'posterior is {posterior!r}, expected "mean" or "sample"')
        mean, logvar = autoencoding.encode_moments(self.vae, image.to(self.device), self._finite)
        if posterior == "sample":
            mean = mean + (0.5 * logvar).exp() * draws.draw(mean.shape[1:], len(mean)).to(mean)
        return self.vae.scale(mean)

    def _steering(self, control: Control, source: request.Source | None, batch: int) -> tuple[Control, ControlNetwork]:
        """With the image to repaint if the network takes it, and that network, read once.

        Raises ValueError where it doesn't suit the transformer or the images.
        """
        key = tuple(stamps([control.path]))
        network = self._networks_of_control.get(key)
        if network is None:
            network = open_component(control.path, "control").build(device=self.device, dtype=self.dtype)
            network.check(self.transformer.config)
        if network.config.inpaints and control.mask is None and source is not None and source.mask is not None:
            control = dataclasses.replace(control, mask=source.mask, inpaint_image=source.image)
        control.check(network.config, batch)
        self._networks_of_control[key] = network
        return control, network

    def _finite(
        self,
        compute: Callable[[torch.dtype], Result],
        dtype: torch.dtype,
        safe: torch.dtype | None,
        **networks: nn.Module,
    ) -> Result:
        return finite.tried(compute, dtype, safe, allowed=self.safe_retry, **networks)

    @torch.inference_mode()
    def encode_prompts(
        self, prompts: Sequence[str], max_tokens: int = MAX_LENGTH, template: str = PROMPT_TEMPLATE
    ) -> list[Tensor]:
        """Caption features of each prompt, [L_i, 2560] in the pipeline's dtype; those that are known are not computed.

        Token ids stand for prompt, template, limit and tokenizer: the features depend on nothing else of these.
        """
        prompts_ids = [tuple(self.tokenizer(prompt, max_tokens, template)) for prompt in prompts]
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
        return autoencoding.decode(self.vae, latents, self._finite)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 to scaled latents [B, 16, H/8, W/8] float32, the posterior's mean."""
        return self.vae.scale(autoencoding.encode_moments(self.vae, image.to(self.device), self._finite)[0])


def _tokenizer_place(text_encoder: Path, path: str | Path | None) -> str | Path:
    return path if path is not None and os.path.isfile(text_encoder) and os.path.isdir(path) else text_encoder
