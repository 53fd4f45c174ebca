"""The autoencoder's own layers against what they are to compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, autocast

from zimage_core.model.vae import Upsample

from .test_vae_bands import TINY, random_vae

CHANNELS = 24
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def layer() -> Upsample:
    return random_vae(TINY).decoder.up[3].upsample


def straightforward(layer: Upsample, x: Tensor) -> Tensor:
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(doubled, layer.conv.weight, layer.conv.bias, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [(9, 14), (1, 3), (2, 1)], ids=str)
def test_upsampling_is_a_convolution_of_repeated_cells(layer, layout, size):
    x = torch.randn(2, CHANNELS, *size).contiguous(memory_format=layout)
    found, exact = layer(x), straightforward(copy.deepcopy(layer).double(), x.double())
    assert found.shape == (2, CHANNELS, 2 * size[0], 2 * size[1]) and found.is_contiguous(memory_format=layout)
    error = (found - exact).norm()
    assert error <= 1.1 * (straightforward(layer, x) - exact).norm() and error <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_context_only_are_not_in_the_result(layer, dtype):
    layer, x = layer.to(dtype), torch.randn(1, CHANNELS, 7, 5, dtype=dtype)
    whole = layer(x)
    for above, below in ((1, 0), (0, 1), (1, 2)):
        assert torch.equal(layer(x, above, below), whole[:, :, 2 * above : 14 - 2 * below])
    part = layer.float()(x.float(), 1, 1)
    assert part.untyped_storage().nbytes() == part.numel() * 4  # nor held by it


def multiplications(call: Callable[[], object]) -> int:
    """Of convolutions, as torch counts them."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], with_flops=True, acc_events=True) as profiled:
        call()
    return sum(event.flops for event in profiled.key_averages() if event.key == "aten::conv2d")


def test_upsampling_multiplies_less(layer):
    """Four of nine products for a cell of the result; a border of one cell comes on top."""
    x = torch.randn(1, CHANNELS, 32, 32)
    plain = multiplications(lambda: straightforward(layer, x))
    assert 0 < multiplications(lambda: layer(x)) <= plain * 4 / 9 * (33 / 32) ** 2


def test_weights_of_16_bits_are_not_added_up(layer):
    """Their sum would have to be rounded."""
    x = torch.randn(2, CHANNELS, 5, 4)
    with autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), straightforward(layer, x))
    assert torch.equal(layer.bfloat16()(x.bfloat16()), straightforward(layer, x.bfloat16()))


@pytest.mark.parametrize("kind", ["padding mode", "convolution", "forward"])
def test_nodes_that_make_images_tile_keep_working(layer, kind):
    """They change the padding mode of each convolution, or replace a method of it."""
    x, conv = torch.randn(1, CHANNELS, 5, 4), layer.conv

    def circular(x: Tensor, weight: Tensor = conv.weight, bias: Tensor = conv.bias) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    if kind == "padding mode":
        conv.padding_mode = "circular"
    elif kind == "convolution":
        conv._conv_forward = circular
    else:
        conv.forward = circular
    expected = circular(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.equal(layer(x), expected) and not torch.allclose(straightforward(layer, x), expected, atol=0.1)


def test_hooks_of_the_convolution_run(layer):
    x, seen = torch.randn(1, CHANNELS, 5, 4), []
    layer.conv.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    found = layer(x)
    assert len(seen) == 1 and torch.equal(seen[0], found)


def test_upsampling_can_be_trained(layer):
    x, noise = torch.randn(2, CHANNELS, 5, 4, requires_grad=True), torch.randn(2, CHANNELS, 10, 8)
    wanted = [x, *layer.requires_grad_().parameters()]
    found = torch.autograd.grad((layer(x) * noise).sum(), wanted)
    expected = torch.autograd.grad((straightforward(layer, x) * noise).sum(), wanted)
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(found, expected, strict=True))
