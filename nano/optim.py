"""What both trainings share: ranks, Muon for convolutions, averaged weights, a schedule in wall time."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch import autocast as torch_autocast  # `autocast` is ours

from zimage_core.backends.matmul import multiplies


class Ranks:
    """The processes that train together: one thread each on the CPU, or one process on a GPU.

    Two OpenMP threads lose most of their speed to any busy neighbor; two processes that average gradients do not.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.count > 1:
            torch.set_num_threads(1)
            dist.init_process_group("gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average(self, parameters: Sequence[nn.Parameter], number: float) -> float:
        """Averages the gradients in place, and `number`, which it returns, over the ranks."""
        if self.count == 1:
            return number
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.reshape(-1) for g in gradients), torch.tensor([number])])
        dist.all_reduce(flat)
        flat /= self.count
        place = 0
        for gradient in gradients:
            gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
            place += gradient.numel()
        return float(flat[-1])

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's quintic


class Muon:
    """Muon (Jordan et al. 2024) for weights of any shape, flattened to [out, rest]: orthogonalised momentum.

    A weight three times as tall as wide is a fused q, k, v: its three matrices are orthogonalised apart.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, momentum: float = 0.9, weight_decay: float = 0.0):
        self.parameters = list(parameters)
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.buffers = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        # matrices of one shape go through together: on a CPU that takes 40 % of the time
        stacks: dict[tuple[int, int], list[Tensor]] = {}
        owners: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            if parameter.grad is None:
                continue
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(buffer, self.momentum).bfloat16().flatten(1)  # Nesterov
            rows, columns = update.shape
            parts = list(update.chunk(3)) if rows == 3 * columns else [update]
            wide = (min(parts[0].shape), max(parts[0].shape))
            stacks.setdefault(wide, []).extend(part.T if part.shape[0] > part.shape[1] else part for part in parts)
            owners.setdefault(wide, []).append(parameter)
        for wide, stack in stacks.items():
            done = iter(_orthogonal(torch.stack(stack)).unbind())
            # 0.2 sqrt(longer side) gives the update Adam's usual size (Moonshot 2025)
            step = -lr * 0.2 * wide[1] ** 0.5
            for parameter in owners[wide]:
                rows, columns = parameter.flatten(1).shape
                count = 3 if rows == 3 * columns else 1
                parts = [part.T if rows // count > columns else part for part in (next(done) for _ in range(count))]
                parameter.mul_(1 - lr * self.weight_decay)
                parameter.add_(torch.cat(parts).reshape(parameter.shape), alpha=step)


def _orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices with equal singular values, roughly (Newton-Schulz): [n, rows, columns], rows <= columns."""
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-9)
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Average:
    """Exponential moving average of a module's parameters, shorter at the start of a run."""

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        ours, theirs = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)


def rate(done: float, step: int, *, warm_steps: int = 60, hold: float = 0.3, floor: float = 0.01) -> float:
    """Share of the peak learning rate when `done` (0..1) of the run is over: warm-up, constant, cosine to `floor`."""
    fall = 1.0 if done < hold else 0.5 * (1 + math.cos(math.pi * min(1.0, (done - hold) / (1 - hold))))
    return min(1.0, (step + 1) / warm_steps) * (floor + (1 - floor) * fall)


def autocast(device: str) -> torch.autocast:
    """To bfloat16, on a GPU and on processors that multiply it; on others it is several times as slow."""
    return torch_autocast(device, torch.bfloat16, enabled=device != "cpu" or multiplies(torch.bfloat16))


def save_atomically(state: object, path: str | os.PathLike[str]) -> None:
    """torch.save that a killed process can't leave half done."""
    temporary = f"{path}.part"
    torch.save(state, temporary)
    os.replace(temporary, path)


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in -1..1, in dB: [B]."""
    return 10 * torch.log10(4 / (image - reference).square().mean((1, 2, 3)))
