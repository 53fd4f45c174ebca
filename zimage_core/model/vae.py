"""AutoencoderKL: images to 16-channel latents at 1/8 of the size, and back.

Module names are those of the original single file (`ae.safetensors`), so its keys load as they are.

Letters: B batch, C channels, H W image height and width, h = H/8, w = W/8.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VAEConfig
from .block import is_changed

NORM_EPS = 1e-6  # every GroupNorm of the FLUX autoencoder

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of maps q, k and v, each [B, C, h, w], as is what it returns

# of (a convolution or group norm, a map): its weight and bias as the map would meet them, until the block is left
Weights = Callable[[Any, Tensor], AbstractContextManager[tuple[Tensor, Tensor]]]


def own_weights(layer: Any, _x: Tensor) -> AbstractContextManager[tuple[Tensor, Tensor]]:
    """`Weights` that lie where they are used."""
    return nullcontext((layer.weight, layer.bias))


class AutoencoderKL(nn.Module):
    """The autoencoder of FLUX and Z-Image.

    `ops` supplies Conv2d and GroupNorm (`torch.nn`, or a host's namespace of the same names), `attention` what is used
    in place of torch's on other devices than a CPU, `weights` those of a layer where a host keeps them elsewhere or
    patched.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        ops: Any = nn,
        attention: Attention | None = None,
        weights: Weights = own_weights,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        self.weights = weights
        make = _Factory(config, ops, attention, weights, device, dtype)
        self.encoder = Encoder(config, make)
        self.decoder = Decoder(config, make)

    def encode_moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image [B, 3, H, W] in -1..1 to mean and log-variance of its latents, each [B, 16, h, w]."""
        self.check_size(image)
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # the reference's bounds, so that exp() stays finite

    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in -1..1 to raw latents [B, 16, h, w]: the posterior's mean, no randomness."""
        return self.encode_moments(image)[0]

    def check_size(self, image: Tensor) -> None:
        """Raises ValueError unless height and width of an image [B, 3, H, W] are multiples of 8."""
        height, width = image.shape[-2:]
        if height % self.config.downscale or width % self.config.downscale:
            raise ValueError(
                f"an image of {width}x{height} can't be encoded: "
                f"width and height must be divisible by {self.config.downscale}"
            )

    def decode(self, raw_latents: Tensor) -> Tensor:
        """Raw latents [B, 16, h, w] to an image [B, 3, H, W] in about -1..1 (not clamped)."""
        return self.decoder(raw_latents)

    def scale(self, raw_latents: Tensor) -> Tensor:
        """What the encoder gives to what the transformer is trained on: (raw - shift_factor) * scaling_factor."""
        return (raw_latents - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return latents / self.config.scaling_factor + self.config.shift_factor


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig, make: _Factory):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = make.conv(config.in_channels, channels[0])
        widths_in = (channels[0], *channels[:-1])
        self.down = nn.ModuleList(
            DownStage(width_in, width, config.layers_per_block, level < len(channels) - 1, make)
            for level, (width_in, width) in enumerate(zip(widths_in, channels, strict=True))
        )
        self.mid = Mid(channels[-1], make)
        self.norm_out = make.norm(channels[-1])
        self.conv_out = make.conv(channels[-1], 2 * config.latent_channels)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)  # (B, 128, H, W)
        for stage in self.down:
            x = stage(x)  # but for the last: half the height and width
        x = self.mid(x)  # (B, 512, h, w)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))  # (B, 32, h, w): mean, then log-variance


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig, make: _Factory):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = make.conv(config.latent_channels, channels[-1])
        self.mid = Mid(channels[-1], make)
        # up.0 is the last to run: the original numbers its levels by resolution, as the encoder does
        widths_in = (*channels[1:], channels[-1])
        self.up = nn.ModuleList(
            UpStage(width_in, width, config.layers_per_block + 1, level > 0, make)
            for level, (width_in, width) in enumerate(zip(widths_in, channels, strict=True))
        )
        self.norm_out = make.norm(channels[0])
        self.conv_out = make.conv(channels[0], config.out_channels)

    def forward(self, raw_latents: Tensor) -> Tensor:
        x = self.conv_in(raw_latents)  # (B, 512, h, w)
        x = self.mid(x)
        for stage in reversed(self.up):
            x = stage(x)  # but for the last: twice the height and width
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))  # (B, 3, H, W)


class DownStage(nn.Module):
    """The residual blocks of one resolution, then half of it unless this is the smallest."""

    def __init__(self, width_in: int, width: int, blocks: int, halves: bool, make: _Factory):
        super().__init__()
        self.block = make.resnets(width_in, width, blocks)
        self.downsample = Downsample(width, make) if halves else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class UpStage(nn.Module):
    """The residual blocks of one resolution, then twice of it unless this is the image's."""

    def __init__(self, width_in: int, width: int, blocks: int, doubles: bool, make: _Factory):
        super().__init__()
        self.block = make.resnets(width_in, width, blocks)
        self.upsample = Upsample(width, make) if doubles else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class Mid(nn.Module):
    """The bottom of both halves: the only place where distant places see each other."""

    def __init__(self, width: int, make: _Factory):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, make)
        self.attn_1 = AttentionBlock(width, make)
        self.block_2 = ResnetBlock(width, width, make)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, make: _Factory):
        super().__init__()
        self.norm1 = make.norm(width_in)
        self.conv1 = make.conv(width_in, width_out)
        self.norm2 = make.norm(width_out)
        self.conv2 = make.conv(width_out, width_out)
        self.nin_shortcut = make.conv(width_in, width_out, kernel=1, padding=0) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        # in place: a new map's memory costs a CPU as much time as the arithmetic
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """One head over all places; its projections are 1x1 convolutions, as the original stores them."""

    def __init__(self, width: int, make: _Factory):
        super().__init__()
        self.norm = make.norm(width)
        self.q = make.conv(width, width, kernel=1, padding=0)
        self.k = make.conv(width, width, kernel=1, padding=0)
        self.v = make.conv(width, width, kernel=1, padding=0)
        self.proj_out = make.conv(width, width, kernel=1, padding=0)
        self.given = make.attention

    def forward(self, x: Tensor) -> Tensor:
        if not self.uses_given(x):
            return self.joined(x, F.scaled_dot_product_attention(*self.heads(x)))
        h = self.norm(x)
        return x + self.proj_out(self.given(self.q(h), self.k(h), self.v(h)))  # type: ignore[misc]

    def uses_given(self, x: Tensor) -> bool:
        """Whether a host's attention runs, which bounds its memory itself. On a CPU torch's stores no scores."""
        return self.given is not None and x.device.type != "cpu"

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a map [B, C, h, w], each [B, 1, h*w, C]."""
        h = self.norm(x)
        return _cells(self.q(h)), _cells(self.k(h)), _cells(self.v(h))

    def joined(self, x: Tensor, out: Tensor) -> Tensor:
        """The map with what attention found, [B, 1, h*w, C], added."""
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, width: int, make: _Factory):
        super().__init__()
        self.conv = make.conv(width, width, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one zero right and below only, as trained


class Upsample(nn.Module):
    """Twice the height and width by repeating rows and columns, then a convolution.

    What is repeated need not be multiplied twice. An output pixel's three rows are only two of the input's, one of them
    twice, and so are its columns: with the weights of equal places added up, 2x2 products remain of 3x3. A float32
    convolution on a CPU goes this way, in half the time (benchmarks/RESULTS.md).
    """

    def __init__(self, width: int, make: _Factory):
        super().__init__()
        self.conv = make.conv(width, width)
        self.weights = make.weights

    def forward(self, x: Tensor, above: int = 0, below: int = 0) -> Tensor:
        """[B, C, h, w] to [B, C, 2(h - above - below), 2w]. above, below: rows of x that the rest only needs to see."""
        if self._adds_up_weights(x):
            with self.weights(self.conv, x) as (weight, bias):
                return _upsampled(x, weight, bias, above, below)
        out = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out[:, :, 2 * above : out.shape[2] - 2 * below]

    def _adds_up_weights(self, x: Tensor) -> bool:
        # in 16 bits the sums would be rounded
        exact = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        as_made = pads_with_zeros(self.conv) and not is_changed(self.conv)
        return exact and x.device.type == "cpu" and as_made


def pads_with_zeros(conv: nn.Module) -> bool:
    """Whether a convolution is as made: nodes for images that tile set its padding mode or replace a method."""
    return conv.padding_mode == "zeros" and not vars(conv).keys() & {"forward", "_conv_forward"}


def _upsampled(x: Tensor, weight: Tensor, bias: Tensor, above: int, below: int) -> Tensor:
    """A 3x3 convolution of x [B, C, h, w] with every row and column repeated: [B, C', 2(h - above - below), 2w].

    Which places are equal differs between even and odd rows and columns: four 2x2 kernels, what they find interleaved.
    """
    height, width = x.shape[2] - above - below, x.shape[3]
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    size = (len(x), len(weight), 2 * height, 2 * width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    for row, of_rows in enumerate(_of_even_and_odd(weight, 2)):
        kernels = torch.cat(_of_even_and_odd(of_rows, 3))  # (2C', C, 2, 2)
        top = row + above
        found = F.conv2d(x, kernels, bias.repeat(2), padding=1)[:, :, top : top + height]  # (B, 2C', height, w+1)
        for column, half in enumerate(found.chunk(2, dim=1)):
            out[:, :, row::2, column::2] = half[..., column : column + width]
    return out


def _of_even_and_odd(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weights of three repeated rows (dim 2) or columns (3) to those of two that are not, for even and odd outputs."""
    before, same, after = weight.split(1, dim)
    return torch.cat([before, same + after], dim), torch.cat([before + same, after], dim)


class _Factory:
    """Makes the leaf layers of one autoencoder, all from the same operations, attention, device and dtype."""

    def __init__(
        self,
        config: VAEConfig,
        ops: Any,
        attention: Attention | None,
        weights: Weights,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        self.groups = config.norm_num_groups
        self.ops = ops
        self.attention = attention
        self.weights = weights
        self.kwargs = {"device": device, "dtype": dtype}

    def conv(self, width_in: int, width_out: int, *, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Module:
        return self.ops.Conv2d(width_in, width_out, kernel, stride=stride, padding=padding, **self.kwargs)

    def norm(self, width: int) -> nn.Module:
        return self.ops.GroupNorm(self.groups, width, eps=NORM_EPS, affine=True, **self.kwargs)

    def resnets(self, width_in: int, width_out: int, count: int) -> nn.ModuleList:
        widths = [width_in] + [width_out] * count
        return nn.ModuleList(ResnetBlock(a, b, self) for a, b in zip(widths, widths[1:], strict=False))


def _cells(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 1, h*w, C), the channels of a place side by side, else SDPA on a CPU stores all scores."""
    return x.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
