"""The processes that make one image together, as torchrun starts them, and who of them computes what.

With guidance, the captions for and against are evaluated by one half of the processes each (an exchange per step); the
processes of a half share the tokens of its sequence (several exchanges per block).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.share import Share, Shares
from ..model.transformer import ZImageTransformer
from .sequence import DividedShare

Refine = Callable[[Sequence[Tensor]], Any]


@dataclass
class Team:
    """All processes of `torchrun`; each holds the whole model and ends with the same latents."""

    rank: int
    size: int
    device: torch.device
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)

    @classmethod
    def of_environment(cls, cpu: bool = False) -> Team | None:
        """The one that torchrun started this process for; None where it did not, or for a single process.

        On GPUs each process takes that of its number on this machine. Raises ValueError where there are fewer.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or "RANK" not in os.environ:
            return None
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cpu")
        if not cpu and torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; start as many "
                    "processes as there are GPUs (torchrun --nproc-per-node), or add --cpu"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and saves."""
        return self.rank == 0

    def told(self, value: Any) -> Any:
        """The value that the first process has, by all; waits for it. Numbers, text and None."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device if self.device.type == "cuda" else None)
        return values[0]

    def leave(self) -> None:
        dist.destroy_process_group()

    def model(self, transformer: ZImageTransformer, guided: bool) -> Together:
        """The transformer as `sampling.loop.denoise` calls it, over all processes.

        guided: whether there will be captions for and against. Raises ValueError where heads can't be shared so.
        """
        heads = transformer.config.n_heads
        branches = _branches(self.size, guided)
        ways = self.size // branches
        if heads % ways:
            fitting = [str(n) for n in range(2, 2 * heads + 1) if heads % (n // _branches(n, guided)) == 0]
            raise ValueError(
                f"{self.size} processes can't share the {heads} heads of this transformer; "
                f"{'with' if guided else 'without'} guidance start {', '.join(fitting[:-1])} or {fitting[-1]}"
            )
        branch, place = divmod(self.rank, ways)
        for number in range(branches):  # all processes make all groups, in one order
            self._group([number * ways + i for i in range(ways)])
        for number in range(ways):
            self._group([number + i * ways for i in range(branches)])
        same_items = self._group([branch * ways + i for i in range(ways)])
        same_tokens = self._group([place + i * ways for i in range(branches)])
        shares: Shares = Share if ways == 1 else partial(DividedShare, group=same_items)
        return Together(transformer, shares, same_tokens, branch, branches)

    def _group(self, ranks: list[int]) -> dist.ProcessGroup:
        key = tuple(ranks)
        if key not in self._groups:
            self._groups[key] = dist.new_group(ranks)
        return self._groups[key]


@dataclass(frozen=True)
class Together:
    """A transformer over the processes of a team; see `ZImageTransformer.forward`."""

    transformer: ZImageTransformer
    shares: Shares
    group: dist.ProcessGroup  # of those that evaluate other items, for the same tokens
    branch: int  # which of the items are evaluated here
    branches: int

    def refined(self, refine: Refine, features: Sequence[Tensor]) -> Any:
        """What `refine` makes of the features [L_i, D] of those captions that are evaluated here."""
        return refine(features[self._own(len(features))])

    def __call__(
        self,
        latents: Tensor,
        t: Tensor,
        captions: Any,
        *,
        controls: Sequence[Any] = (),
        images: Sequence[int] | None = None,
    ) -> Tensor:
        """Latents [B, 16, h, w] of all items, captions of those that are evaluated here; gives all, [B, 16, h, w]."""
        own = self._own(len(latents))
        images = range(len(latents)) if images is None else images
        found: Tensor = self.transformer(
            latents[own],
            t[own],
            captions,
            controls=[replace(control, strength=_of(own, control.strength)) for control in controls],
            images=images[own],
            shares=self.shares,
        )
        if len(found) == len(latents):
            return found
        together = torch.empty_like(latents)
        dist.all_gather_into_tensor(together, found.contiguous(), group=self.group)
        return together

    def _own(self, count: int) -> slice:
        """All of them where they can't be halved: a step without guidance."""
        if count % self.branches:
            return slice(0, count)
        each = count // self.branches
        return slice(self.branch * each, (self.branch + 1) * each)


def _of(own: slice, strength: float | Tensor) -> float | Tensor:
    return strength[own] if isinstance(strength, Tensor) and len(strength) > 1 else strength


def _branches(size: int, guided: bool) -> int:
    """Among how many groups of processes the prompts are shared out."""
    return 2 if guided and size % 2 == 0 else 1
