"""Numbers that are not finite, which would end as a black image: noticed without a wait, told, computed anew.

A stage (text features, a step, decoding) raises `NotFinite`; its caller hands that to `again`, which looks for the
reason among the weights and else computes the stage once more in a way that has room for larger numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WHAT = "values that are not finite (NaN or infinite)"
ADVICE = (
    "There is no safer way to compute it: try without LoRA and without what other programs or nodes change in the model"
)


class NotFinite(ArithmeticError):
    """A stage gave numbers that are not finite; the message is the stage, as in "step 3 of 8"."""


class Steps:
    """Finds the first step of a run that gave numbers which are not finite, without a wait between steps.

    On a GPU what is seen stays there until the run is over. On a CPU, where looking waits for nothing, the run ends
    with that step: those after it would be in vain.
    """

    def __init__(self, count: int):
        self.count = count
        self._largest: list[Tensor] = []  # per step, on its device; what is not finite is larger than all, or NaN

    def saw(self, values: Tensor) -> None:
        """To be called after each step with what it gave, of any shape. Raises NotFinite on a CPU."""
        self._largest.append(values.abs().max())
        if values.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises NotFinite if one of the steps so far gave numbers that are not finite. Waits for the device."""
        largest: list[float] = torch.stack(self._largest).tolist() if self._largest else []
        for step, value in enumerate(largest, 1):
            if not math.isfinite(value):
                raise NotFinite(f"step {step} of {self.count}")


def again(
    stage: str, ran: str, safe: str | None, compute: Callable[[], Result], *, allowed: bool, **networks: nn.Module
) -> Result:
    """What `compute` gives: a stage once more in a safe way, after it gave numbers that are not finite.

    stage: what NotFinite said. ran, safe: how it ran and how `compute` runs, as in "float16 with attention 'sage'";
    safe is None where there is no safer way. allowed: whether there may be a second time.
    networks: those that took part, by kind (`transformer=...`).

    Raises CheckpointError, naming the first weight that is not finite, as then no way helps; or saying what was tried.
    """
    if safe is None or damaged(**networks) is not None:
        raise not_finite(stage, ran, **networks)
    fault = f"{stage} gave {WHAT} in {ran}, though all weights are finite"
    if not allowed:
        raise CheckpointError(f"{fault}. Computing it again in {safe} may help, but safe_retry is off: switch it on")
    logger.warning("%s, so it is computed again, in %s. Choose that from the start to save the time.", fault, safe)
    try:
        return compute()
    except NotFinite as error:
        second = str(error)
    raise CheckpointError(f"{fault}; computed again in {safe}, {second} gave such values, too. {ADVICE}")


def tried(
    compute: Callable[[torch.dtype], Result],
    dtype: torch.dtype,
    safe: torch.dtype | None,
    *,
    allowed: bool,
    **networks: nn.Module,
) -> Result:
    """compute(dtype), or `again` as compute(safe) where that raises `NotFinite`."""
    try:
        return compute(dtype)
    except NotFinite as error:
        stage = str(error)
    way = None if safe is None else named(safe)
    return again(stage, named(dtype), way, lambda: compute(safe or dtype), allowed=allowed, **networks)


def not_finite(stage: str = "", ran: str = "", **networks: nn.Module) -> CheckpointError:
    """Why networks, by kind, put out numbers that are not finite, where there is no safer way to compute them.

    Names the first weight that is not finite, if one is. stage, ran: as for `again`.
    """
    kinds = " and ".join(kind.replace("_", " ") for kind in networks)
    fault = f"{stage or f'the {kinds}'} gave {WHAT}" + (f" in {ran}" if ran else "")
    found = damaged(**networks)
    if found is not None:
        return CheckpointError(f"{fault}: {found}")
    return CheckpointError(f"{fault}, though all weights are finite. {ADVICE}")


def damaged(**networks: nn.Module) -> CheckpointError | None:
    """Names the first weight of these networks, by kind, that is not finite; None if all are.

    Weights are only looked through once a result is bad, so that loading need not read them all.
    """
    for kind, network in networks.items():
        for name, values in _weights(network):
            if values.is_meta or values.float().isfinite().all():
                continue
            reason = "the file is damaged, download it again"
            if values.dtype == torch.float16:
                reason += ", or it holds values that float16 can't, then choose bf16 or fp32"
            return CheckpointError(f"{name} of the {kind.replace('_', ' ')} has {WHAT}: {reason}")
    return None


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    for name, layer in network.named_modules():
        if hasattr(layer, "expanded"):  # a packed one, whose weight is no parameter
            yield f"{name}.weight", layer.expanded()


def named(dtype: torch.dtype) -> str:
    """As people write it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def safer(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype to compute in where numbers don't fit `dtype`; None where there is none with more room."""
    if dtype == torch.float16 and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else None
