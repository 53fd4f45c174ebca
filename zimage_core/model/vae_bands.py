"""The autoencoder in bands of rows: the same numbers as `AutoencoderKL`, in a fraction of its memory.

Convolutions get the true rows above and below their band, group norms the mean and variance of the whole map, the
attention all its keys: there are no seams to hide. At the image's size no more is held than its widest map: that one,
which the last upsampling gives, shrinks band by band while the two that follow from it grow, of half its channels each.

Letters: B batch, C channels, H W height and width of a map, G groups of a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import memory
from . import vae as networks
from .vae import AutoencoderKL, Weights

WORKSPACE = 96 * 2**20  # bytes of the widest band; a handful of such are alive at a time
LEAST_ROWS = 8  # each band repeats up to two rows of its neighbors, upsampling four
SCORES = 256 * 2**20  # bytes of attention scores at a time, where a kernel materializes them

Tick = Callable[[], None]  # called before each band; may raise to stop
_Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def decode(vae: AutoencoderKL, raw_latents: Tensor, rows: int | None = None, tick: Tick | None = None) -> Tensor:
    """`vae.decode` in bands: raw latents [B, 16, h, w] to images [B, 3, 8h, 8w], item by item.

    rows: height of a band of the image; None fits WORKSPACE. tick: called before each band.
    """
    widest, width = max(vae.config.block_out_channels[:2]), raw_latents.shape[-1] * vae.config.downscale
    rows = rows or _rows(widest, width, raw_latents)
    bands = _Bands(rows, tick, raw_latents.device, vae.weights)
    return torch.cat([_decode(vae.decoder, item, bands) for item in _laid_out(raw_latents).split(1)]).contiguous()


@torch.no_grad()
def encode(vae: AutoencoderKL, image: Tensor, rows: int | None = None, tick: Tick | None = None) -> Tensor:
    """`vae.encode` in bands: images [B, 3, H, W] in -1..1 to raw latents [B, 16, H/8, W/8], item by item."""
    vae.check_size(image)
    rows = rows or _rows(vae.config.block_out_channels[0], image.shape[-1], image)
    bands = _Bands(rows, tick, image.device, vae.weights)
    moments = torch.cat([_encode(vae.encoder, item, bands) for item in _laid_out(image).split(1)])
    return moments.chunk(2, dim=1)[0].contiguous()


def advised(vae: AutoencoderKL, height: int, width: int, like: Tensor) -> bool:
    """Whether to decode an image on the device of `like` in bands: to save time, or memory that is not free now."""
    free = memory.free_bytes(like.device)
    short = free is not None and free < plain_bytes(vae, height, width, like.dtype)
    return possible(vae) and (short or faster(vae, height, width, like.device, like.dtype))


def possible(vae: AutoencoderKL) -> bool:
    """Whether bands are the whole image's: not where a convolution was changed to see more than its neighbors."""
    return all(networks.pads_with_zeros(module) for module in vae.modules() if isinstance(module, nn.Conv2d))


def faster(vae: AutoencoderKL, height: int, width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether bands take less time: in float32 on a CPU, from two bands on (benchmarks/RESULTS.md)."""
    more_than_one = _widest_bytes(vae, height, width, dtype) > WORKSPACE
    return device.type == "cpu" and dtype == torch.float32 and more_than_one


def _widest_bytes(vae: AutoencoderKL, height: int, width: int, dtype: torch.dtype) -> int:
    return max(vae.config.block_out_channels[:2]) * height * width * dtype.itemsize


def plain_bytes(vae: AutoencoderKL, height: int, width: int, dtype: torch.dtype, maps: float | None = None) -> float:
    """What decoding an image as a whole takes at its peak beside the weights; encoding takes PLAIN_ENCODING_MAPS."""
    return (maps or PLAIN_MAPS) * _widest_bytes(vae, height, width, dtype)


def bands_bytes(vae: AutoencoderKL, height: int, width: int, itemsize: int) -> int:
    """What decoding or encoding in bands takes at its peak beside the weights."""
    return _kept_bytes(vae, height, width, itemsize) + BAND_MAPS * WORKSPACE


def rows_that_fit(vae: AutoencoderKL, height: int, width: int, itemsize: int, free: int) -> int:
    """How high bands of an image may be where `free` bytes are all there is: higher ones repeat fewer rows."""
    row = max(vae.config.block_out_channels[:2]) * width * itemsize
    return max(LEAST_ROWS, int(free - _kept_bytes(vae, height, width, itemsize)) // (BAND_MAPS * row))


def _kept_bytes(vae: AutoencoderKL, height: int, width: int, itemsize: int) -> int:
    """The maps of the image's size."""
    return 2 * vae.config.block_out_channels[0] * height * width * itemsize


PLAIN_MAPS = 4.5  # of the widest at the image's size: 3.8 were measured, the rest is for what else happens
PLAIN_ENCODING_MAPS = 3.2  # tensors take 2.1, in decoding 3
BAND_MAPS = 8  # of the widest band: 3 to 3.5 were measured on a CPU; a GPU, which is unmeasured, may want more


def _laid_out(x: Tensor) -> Tensor:
    """A map as this device convolves it best; what is computed from it keeps the layout.

    On a CPU the channels of a place lie side by side, as oneDNN's kernels read them, which else copy each map there and
    back. The plain autoencoder can't have it so, as torch's group norm errs by 6e-3 in this layout at 2048x2048.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def _rows(channels: int, width: int, like: Tensor) -> int:
    return max(LEAST_ROWS, WORKSPACE // (channels * width * like.element_size()))


def _decode(decoder: Any, raw_latents: Tensor, bands: _Bands) -> Tensor:
    x: Map = Stored([_mid(decoder.mid, decoder.conv_in(raw_latents), bands)])
    for stage in reversed(decoder.up):
        for block in stage.block:
            x = _resnet(block, x, bands)
        if stage.upsample is not None:
            x = bands.stored(Upsampled(stage.upsample, x))
    return _out(decoder, x, bands)


def _encode(encoder: Any, image: Tensor, bands: _Bands) -> Tensor:
    x: Map = bands.stored(Convolved(encoder.conv_in, Stored([image])))
    for stage in encoder.down:
        for block in stage.block:
            x = _resnet(block, x, bands)
        if stage.downsample is not None:
            x = bands.stored(Downsampled(stage.downsample, x))
    return _out(encoder, Stored([_mid(encoder.mid, x.rows(0, x.height), bands)]), bands)


def _out(half: Any, x: Map, bands: _Bands) -> Tensor:
    """The last norm and convolution of a decoder or encoder."""
    return torch.cat(bands.stored(Convolved(half.conv_out, bands.normed(half.norm_out, x))).bands, dim=2)


def _resnet(block: networks.ResnetBlock, x: Map, bands: _Bands) -> Stored:
    """A residual block; x is spent. Its own map and the inner one are all that is held."""
    first = Convolved(block.conv1, bands.normed(block.norm1, x))
    hidden, shortened = Stored([]), Stored([])
    shortcut = block.nin_shortcut
    for top, bottom in bands.of(x.height):
        hidden.bands.append(first.rows(top, bottom))
        if shortcut is not None:
            shortened.bands.append(shortcut(x.rows(top, bottom)))
            x.free(bottom - 1)  # the next band's convolution reaches one row up
    residual = shortened if shortened.bands else x
    second = Convolved(block.conv2, bands.normed(block.norm2, hidden))
    out = Stored([])
    for top, bottom in bands.of(hidden.height):
        out.bands.append(second.rows(top, bottom) + residual.rows(top, bottom))
        residual.free(bottom)
        hidden.free(bottom - 1)
    return out


def _mid(mid: networks.Mid, x: Tensor, bands: _Bands) -> Tensor:
    """The bottom, where maps are small: as a whole, but for the attention's scores."""
    x = mid.block_1(x)
    bands.tick()
    x = _attention(mid.attn_1, x, bands)
    return mid.block_2(x)


def _attention(layer: networks.AttentionBlock, x: Tensor, bands: _Bands) -> Tensor:
    if layer.uses_given(x):
        return layer(x)
    q, k, v = layer.heads(x)  # each (1, 1, h*w, C)
    step = max(1, SCORES // (k.shape[2] * k.element_size()))
    found = []
    for part in q.split(step, dim=2):
        bands.tick()
        found.append(F.scaled_dot_product_attention(part, k, v))
    return layer.joined(x, torch.cat(found, dim=2))


# Maps, of which any rows can be had


class Map:
    """A map [1, C, height, W], somewhere or still to be computed."""

    height: int

    def rows(self, top: int, bottom: int) -> Tensor:
        """[1, C, bottom - top, W]; not to be written to."""
        raise NotImplementedError

    def parts(self, top: int, bottom: int) -> list[Tensor]:
        """The same rows as they lie in memory, one below the other."""
        return [self.rows(top, bottom)]

    def free(self, bottom: int) -> None:
        """Rows above `bottom` are not needed any more."""


class Stored(Map):
    """Bands of rows, one below the other."""

    def __init__(self, bands: list[Tensor]):
        self.bands: list[Any] = bands

    @property
    def height(self) -> int:  # type: ignore[override]
        return sum(self._heights())

    def _heights(self) -> list[int]:
        return [band if isinstance(band, int) else band.shape[2] for band in self.bands]

    def rows(self, top: int, bottom: int) -> Tensor:
        return _joined(self.parts(top, bottom))

    def parts(self, top: int, bottom: int) -> list[Tensor]:
        parts, start = [], 0
        for band, height in zip(self.bands, self._heights(), strict=True):
            first, last = max(top - start, 0), min(bottom - start, height)
            if first < last:
                parts.append(band[:, :, first:last])
            start += height
        return parts

    def free(self, bottom: int) -> None:
        start = 0
        for index, height in enumerate(self._heights()):
            start += height
            if start <= bottom:
                self.bands[index] = height  # of a freed band only its height is known


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


class Convolved(Map):
    """A 3x3 convolution with padding 1 of a map. Its module pads the band; rows that this falsifies are cut off."""

    def __init__(self, conv: nn.Module, source: Map):
        self.conv, self.source, self.height = conv, source, source.height

    def rows(self, top: int, bottom: int) -> Tensor:
        above, below = int(top > 0), int(bottom < self.height)
        out = self.conv(self.source.rows(top - above, bottom + below))
        return out[:, :, above : out.shape[2] - below]

    def free(self, bottom: int) -> None:
        self.source.free(bottom - 1)


class Upsampled(Map):
    """Twice the height and width by repeating, then a convolution. Bands of it begin and end on even rows."""

    def __init__(self, layer: networks.Upsample, source: Map):
        self.layer, self.source, self.height = layer, source, 2 * source.height

    def rows(self, top: int, bottom: int) -> Tensor:
        above, below = int(top > 0), int(bottom < self.height)
        return self.layer(self.source.rows(top // 2 - above, bottom // 2 + below), above, below)

    def free(self, bottom: int) -> None:
        self.source.free(bottom // 2 - 1)


class Downsampled(Map):
    """A convolution of stride 2, with a row and column of zeros at the bottom and right of the whole map only."""

    def __init__(self, layer: networks.Downsample, source: Map):
        self.layer, self.source, self.height = layer, source, source.height // 2

    def rows(self, top: int, bottom: int) -> Tensor:
        last = 2 * bottom + 1
        band = self.source.rows(2 * top, min(last, self.source.height))
        return self.layer.conv(F.pad(band, (0, 1, 0, max(0, last - self.source.height))))

    def free(self, bottom: int) -> None:
        self.source.free(2 * bottom)


class Normed(Map):
    """silu(group norm) of a map, with the whole map's statistics (see `_Bands.statistics`)."""

    def __init__(self, norm: Any, source: Map, statistics: _Pair, weights: Weights = networks.own_weights):
        self.source, self.height = source, source.height
        of_a_group = norm.num_channels // norm.num_groups
        # repeat_interleave would tell the device how often, which is a copy
        mean, variance = (value[:, None].expand(-1, of_a_group).flatten() for value in statistics)
        with weights(norm, source.rows(0, 1)) as (gain, bias):
            scale = gain.to(mean) * torch.rsqrt(variance + norm.eps)
            shift = bias.to(mean) - mean * scale
        self.scale, self.shift = (value.float().view(1, -1, 1, 1) for value in (scale, shift))

    def rows(self, top: int, bottom: int) -> Tensor:
        parts = self.source.parts(top, bottom)
        if not _casts_within_kernels(parts[0].device):
            band = _joined(parts)
            normed = torch.addcmul(self.shift, band.float(), self.scale)
            return F.silu(normed.to(band.dtype), inplace=True)
        out = parts[0].new_empty((1, parts[0].shape[1], bottom - top, parts[0].shape[3]))
        for part, place in zip(parts, out.split([part.shape[2] for part in parts], dim=2), strict=True):
            torch.addcmul(self.shift, part, self.scale, out=place)
        return F.silu(out, inplace=True)

    def free(self, bottom: int) -> None:
        self.source.free(bottom)


def _casts_within_kernels(device: torch.device) -> bool:
    """Whether a kernel may read 16 bits, compute in 32 and write 16. Elsewhere such operands are copied first."""
    return device.type == "cuda"


def _moments(band: Tensor) -> _Pair:
    """Mean and variance of each channel of a band [1, C, rows, W], [C] float32, of the mean first, to keep digits."""
    # of a channel, not of a group, as that reads memory in order in any layout
    if _casts_within_kernels(band.device):
        variance = torch.empty(band.shape[1], dtype=torch.float32, device=band.device)
        torch.var(band, (0, 2, 3), correction=0, out=variance)
        return band.mean((0, 2, 3), dtype=torch.float32), variance
    band = band.float()
    center = band.mean((0, 2, 3), keepdim=True)
    return center.flatten(), (band - center).square_().mean((0, 2, 3))


class _Bands:
    """The height of bands and what goes over all of them."""

    def __init__(self, rows: int, tick: Tick | None, device: torch.device, weights: Weights = networks.own_weights):
        self.height = max(2, rows + rows % 2)
        self._tick, self._weights = tick, weights
        self._in_main_memory = device.type == "cpu"

    def tick(self) -> None:
        if self._tick is not None:
            self._tick()

    def of(self, height: int) -> Iterator[tuple[int, int]]:
        """(top, bottom) of each band of a map."""
        for top in range(0, height, self.height):
            self.tick()
            yield top, min(top + self.height, height)
            if self._in_main_memory:
                memory.give_back()

    def stored(self, lazy: Map) -> Stored:
        """The whole map; what it is computed from is spent on the way."""
        result = Stored([])
        for top, bottom in self.of(lazy.height):
            result.bands.append(lazy.rows(top, bottom))
            lazy.free(bottom)
        return result

    def normed(self, norm: Any, x: Map) -> Normed:
        return Normed(norm, x, self.statistics(norm, x), self._weights)

    def statistics(self, norm: Any, x: Map) -> _Pair:
        """Mean and variance of each group over the whole map, [G], from those of the bands, on the map's device.

        float64 on a CPU; elsewhere float32, as not every device has more and none is to be waited for.
        """
        bands = [_moments(x.rows(top, bottom)) for top, bottom in self.of(x.height)]
        exact = torch.float64 if self._in_main_memory else torch.float32
        means, variances = (torch.stack(values).to(exact) for values in zip(*bands, strict=True))  # (bands, C)
        share = means.new_full((len(bands), 1), self.height / x.height)  # of all rows
        share[-1].fill_(1 - (len(bands) - 1) * self.height / x.height)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        # from channels to groups: the variance within, and of the means
        means, variances = (value.unflatten(0, (norm.num_groups, -1)) for value in (mean, variance))
        return means.mean(1), variances.mean(1) + torch.var(means, dim=1, correction=0)
