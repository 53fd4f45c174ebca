"""A loaded model that makes images of tasks: prompts encoded together, images of one kind sampled together."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import image_files
from ..pipeline import ZImagePipeline
from ..prompts.cache import PromptCache
from ..sampling.control import Control
from ..sampling.loop import Cancelled
from .features import Features, Wish, windows
from .plan import Task
from .sizes import Sizes

logger = logging.getLogger(__name__)

ENCODED = 16  # prompts that are encoded together at most


@dataclass(frozen=True)
class Settings:
    """How a maker is set up, in words that another process or machine can be told."""

    model: str
    transformer: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    tokenizer: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    prompt_cache: str | None = None
    safe_retry: bool = True
    batch_size: int | None = None  # images sampled together at most; None: as many as is fastest
    keep_text_encoder: bool = False  # in memory beside the transformer, for one who makes few tasks at a time


@dataclass(frozen=True)
class Made:
    """What became of a task: an image [3, H, W] in 0..1 on the CPU, or why there is none."""

    task: Task
    image: Tensor | None
    seconds: float
    error: str | None = None


Stop = Callable[[], bool]  # whether to leave off after the step that runs


class Maker:
    """maker = Maker(Settings("nano/snapshot"))
    for made in maker.make(tasks): ...

    With `batch_size` 1 an image is bit for bit that of `generate` on the same machine, whatever else is made.
    """

    def __init__(self, settings: Settings):
        """Loads the model. Raises CheckpointError, naming the file."""
        behind = None if settings.prompt_cache is None else PromptCache(settings.prompt_cache)
        self.features = Features(behind)
        self.pipe = ZImagePipeline.from_pretrained(
            settings.model,
            device=settings.device,
            dtype=getattr(torch, settings.dtype),
            tokenizer=settings.tokenizer,
            prompt_cache=self.features,
            safe_retry=settings.safe_retry,
            transformer=settings.transformer,
            text_encoder=settings.text_encoder,
            vae=settings.vae,
        )
        self.sizes = Sizes(settings.batch_size, self.pipe.device)
        self._keeps_encoder = settings.keep_text_encoder
        self._loras: tuple[tuple[str, float], ...] = ()
        self._loras_encode = False  # whether they change the text encoder
        self._lengths: dict[Wish, int] = {}
        self._encoded_together = 1 if settings.batch_size == 1 else ENCODED

    def make(self, tasks: Sequence[Task], stop: Stop = lambda: False) -> Iterator[Made]:
        """Each task once, in an order of its own, unless `stop` ends it: then the rest is left out."""
        try:
            by_loras = grouped(tasks, lambda task: task.row.loras)
            for window in windows([task for group in by_loras for task in group], self._wishes, self._bytes):
                yield from self._window(window, stop)
                self.features.clear()
                self._lengths.clear()
        except Cancelled:
            pass
        finally:
            self.features.clear()

    def _window(self, tasks: Sequence[Task], stop: Stop) -> Iterator[Made]:
        for group in grouped(tasks, lambda task: task.row.loras):
            if stop():
                raise Cancelled
            try:
                self._set_loras(group[0].row.loras)
            except Exception as error:
                yield from (Made(task, None, 0.0, _told(error)) for task in group)
                continue
            # where no LoRA changes the text encoder, it is read once for all of the window
            self._encode(group if self._loras_encode else tasks, stop)
            self._release()
            for alike in grouped(group, kind_of):
                yield from self._alike(alike, stop)

    def _set_loras(self, loras: tuple[tuple[str, float], ...]) -> None:
        if loras == self._loras:
            return
        files = self.pipe.set_loras(*loras)
        self._loras = loras
        self._loras_encode = any(
            strength and file.of("text_encoder") for (_, strength), file in zip(loras, files, strict=True)
        )
        for file in files:
            if file.left:
                logger.warning("%s: %d of %d keys have no place in this model", file.path, len(file.left), file.total)

    # Prompts

    def _wishes(self, task: Task) -> list[Wish]:
        """What is to be encoded for it: (prompt, limit of tokens)."""
        row = task.row
        texts = [row.prompt] + ([row.negative_prompt or ""] if row.guidance_scale > 0 else [])
        return [(text, row.max_prompt_tokens) for text in texts]

    def _length(self, wish: Wish) -> int:
        """In tokens."""
        if wish not in self._lengths:
            self._lengths[wish] = len(self.pipe.tokenizer(*wish))
        return self._lengths[wish]

    def _bytes(self, wish: Wish) -> int:
        return self._length(wish) * self.pipe.transformer.config.cap_feat_dim * self.pipe.dtype.itemsize

    def _encode(self, tasks: Iterable[Task], stop: Stop) -> None:
        """All prompts that these tasks need, each once, those of similar length together."""
        by_limit: dict[int, list[str]] = {}
        for text, limit in dict.fromkeys(wish for task in tasks for wish in self._wishes(task)):
            by_limit.setdefault(limit, []).append(text)
        for limit, texts in by_limit.items():
            waiting = sorted(texts, key=lambda text: self._length((text, limit)))
            together = self._encoded_together
            while waiting:
                if stop():
                    raise Cancelled
                failed = short = False
                try:
                    self.pipe.encode_prompts(waiting[:together], limit)
                except Exception as error:
                    failed, short = True, is_out_of_memory(error)
                if failed:
                    _make_room()
                if failed and together > 1:
                    together //= 2
                    continue
                del waiting[:together]  # one that fails alone is told of the rows that need it, when they are made
                if failed and not short:
                    together = self._encoded_together

    def _release(self) -> None:
        if not self._keeps_encoder:
            self.pipe.release_text_encoder()

    # Images

    def _alike(self, tasks: Sequence[Task], stop: Stop) -> Iterator[Made]:
        """Tasks that may be sampled together, in batches that fit."""
        first = tasks[0]
        side = self.pipe.vae.config.downscale * self.pipe.transformer.config.patch_size
        copies = 2 if first.row.guidance_scale > 0 else 1
        tokens = (first.height // side) * (first.width // side) * copies
        if not first.row.alone and self.sizes.most != 1:  # captions are padded to the longest
            tasks = sorted(tasks, key=lambda task: self._length((task.row.prompt, task.row.max_prompt_tokens)))
        waiting = deque(tasks)
        halves: list[list[Task]] = []  # of a batch that failed, to find the image that it is about
        while waiting or halves:
            if stop():
                raise Cancelled
            if halves:
                batch = halves.pop()
            else:
                count = 1 if first.row.alone else min(self.sizes.next(tokens), len(waiting))
                batch = [waiting.popleft() for _ in range(count)]
            failure, made = "", []
            try:
                with self.sizes.measuring(tokens, len(batch)):
                    made = list(self._batch(batch, stop))
            except Cancelled:
                raise
            except Exception as error:
                failure, short = _told(error), is_out_of_memory(error)
            yield from made
            if not failure:
                continue
            self._release()  # which a prompt that can't be encoded has had read again
            _make_room()  # here, where no traceback holds tensors any more
            half = len(batch) // 2
            if not half:
                yield Made(batch[0], None, 0.0, OUT_OF_MEMORY.format(failure) if short else failure)
            elif short:
                self.sizes.lower(tokens, half)
                waiting.extendleft(reversed(batch))
                logger.warning("%d images of this size don't fit in memory together; %d are tried", len(batch), half)
            else:
                halves += [batch[half:], batch[:half]]

    def _batch(self, batch: Sequence[Task], stop: Stop) -> Iterator[Made]:
        """Sampled together, decoded one by one."""
        first, row = batch[0], batch[0].row
        started = time.perf_counter()
        asked: dict[str, Any] = {
            "width": first.width,
            "height": first.height,
            "steps": row.steps,
            "guidance_scale": row.guidance_scale,
            "cfg_normalization": row.cfg_normalization,
            "cfg_truncation": row.cfg_truncation,
            "max_prompt_tokens": row.max_prompt_tokens,
            "callback": lambda *_: not stop(),
        }
        if row.alone:
            image = self.pipe.generate(row.prompt, row.negative_prompt, seed=first.seed, **asked, **_seen(first))
            yield Made(first, image[0].cpu(), time.perf_counter() - started)
            return
        latents = self.pipe.generate(
            [task.row.prompt for task in batch],
            [task.row.negative_prompt or "" for task in batch],
            seed=[task.seed for task in batch],
            output="latents",
            **asked,
        )
        each = (time.perf_counter() - started) / len(batch)
        for number, task in enumerate(batch):
            began = time.perf_counter()
            image = self.pipe.decode(latents[number : number + 1])
            yield Made(task, image[0].cpu(), each + time.perf_counter() - began)


OUT_OF_MEMORY = "out of memory with this image alone ({}); make it smaller, or free memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or this computer had no more."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _told(error: Exception) -> str:
    """In one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _make_room() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _seen(task: Task) -> dict[str, Any]:
    """The images of a task that is made alone."""
    row = task.row
    found: dict[str, Any] = {"references": [image_files.read(Path(path)) for path in row.references]}
    if row.image is not None:
        found |= {"image": image_files.read(Path(row.image)), "strength": row.strength}
        if row.mask is not None:
            found["mask"] = image_files.read(Path(row.mask), 1)
    if row.control is not None:
        shown = None if row.control_image is None else image_files.read(Path(row.control_image))
        found["control"] = [Control(Path(row.control), shown, row.control_strength)]
    return found


def kind_of(task: Task) -> Any:
    """What must be the same in one batch; a task that is made alone has a kind of its own."""
    row = task.row
    guidance = (row.guidance_scale, row.cfg_normalization, row.cfg_truncation)
    own = task.place if row.alone else None
    return task.width, task.height, row.steps, guidance, row.max_prompt_tokens, own


def grouped(tasks: Iterable[Task], kind: Callable[[Task], Any]) -> list[list[Task]]:
    """Those of one kind together, in the order of their first."""
    groups: dict[Any, list[Task]] = {}
    for task in tasks:
        groups.setdefault(kind(task), []).append(task)
    return list(groups.values())
