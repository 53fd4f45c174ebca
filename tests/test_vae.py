"""The autoencoder's own layers against what they are to compute."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_core.vae import UpsamplingConv2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def straightforward(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), conv.weight, conv.bias, padding=1)


@pytest.fixture
def conv() -> UpsamplingConv2d:
    torch.manual_seed(0)
    return UpsamplingConv2d(48, 24, 3, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [(9, 14), (1, 3), (2, 1)], ids=str)
def test_upsampling_is_a_convolution_of_repeated_cells(conv, layout, size):
    x = torch.randn(2, 48, *size).contiguous(memory_format=layout)
    found, exact = conv(x), straightforward(x.double(), copy.deepcopy(conv).double())
    assert found.shape == (2, 24, 2 * size[0], 2 * size[1]) and found.is_contiguous(memory_format=layout)
    error = (found - exact).norm()
    assert error <= 1.1 * (straightforward(x, conv) - exact).norm() and error <= 1e-6 * exact.norm()


def test_upsampling_multiplies_less(conv):
    """Four of nine products per output cell; a border of a cell comes on top."""
    x = torch.randn(1, 48, 32, 32)
    done = []
    for call in (lambda: conv(x), lambda: straightforward(x, conv)):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True, acc_events=True
        ) as profiled:
            call()
        done.append(sum(event.flops for event in profiled.key_averages() if event.key == "aten::conv2d"))
    ours, plain = done
    assert 0 < ours <= plain * 4 / 9 * (33 / 32) ** 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_upsampling_adds_up_no_weights_of_other_dtypes(conv, dtype):
    """A sum of two weights of 16 bits is none."""
    conv, x = conv.to(dtype), torch.randn(2, 48, 5, 4, dtype=dtype)
    assert torch.equal(conv(x), straightforward(x, conv))


def test_upsampling_can_be_trained(conv):
    x = torch.randn(2, 48, 5, 4, requires_grad=True)
    noise = torch.randn(2, 24, 10, 8)
    found = torch.autograd.grad((conv(x) * noise).sum(), [x, *conv.parameters()])
    expected = torch.autograd.grad((straightforward(x, conv) * noise).sum(), [x, *conv.parameters()])
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(found, expected, strict=True))
