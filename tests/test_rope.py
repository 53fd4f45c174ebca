"""Positions and rotations, against their definitions."""

from __future__ import annotations

import cmath

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zimage_core.model import rope
from zimage_core.model.rope import caption_positions, image_positions, rotate, rotations


def test_positions():
    assert caption_positions(3).tolist() == [[[1, 0, 0], [2, 0, 0], [3, 0, 0]]]
    positions = image_positions([32, 64], rows=2, columns=3, padded_length=8)
    assert positions.shape == (2, 8, 3)
    assert positions[0, :6].tolist() == [[33, row, column] for row in range(2) for column in range(3)]
    assert positions[1, 5].tolist() == [65, 1, 2]  # behind the padded caption
    assert positions[:, 6:].abs().sum() == 0  # image padding stays at the origin


def test_rope_options_stretch_and_shift_the_grid():
    options = {"scale_x": 0.5, "shift_x": 2.0, "scale_y": 2.0, "shift_y": -1.0}
    positions = image_positions([32], 2, 2, 4, rope_options=options)
    assert positions[0].tolist() == [[33, -1, 2], [33, -1, 2.5], [33, 1, 2], [33, 1, 2.5]]


def test_rotation_is_multiplication_by_a_complex_number():
    axes, theta = (4, 2, 6), 256.0
    position = torch.tensor([[[3.0, 7.0, 11.0]]])
    x = torch.randn(1, 1, 2, 12)
    turned = rotate(x, rotations(position, axes, theta))
    angles = [p * theta ** (-2 * j / d) for p, d in zip((3, 7, 11), axes, strict=True) for j in range(d // 2)]
    for head in range(2):
        for pair, angle in enumerate(angles):
            a, b = x[0, 0, head, 2 * pair : 2 * pair + 2].tolist()
            expected = complex(a, b) * cmath.exp(1j * angle)
            got = complex(*turned[0, 0, head, 2 * pair : 2 * pair + 2].tolist())
            assert abs(got - expected) < 1e-5


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(at_q, at_k):
        turn = [rotate(x, rotations(torch.tensor([[at]]), (4, 4, 4), 256.0)) for x, at in ((q, at_q), (k, at_k))]
        return (turn[0] * turn[1]).sum()

    near = score([5.0, 1.0, 2.0], [3.0, 4.0, 2.0])
    far = score([45.0, 11.0, 7.0], [43.0, 14.0, 7.0])
    assert torch.allclose(near, far, atol=1e-5)
    assert not torch.allclose(near, score([5.0, 1.0, 2.0], [3.0, 5.0, 2.0]), atol=1e-3)


def test_half_precision_is_rotated_in_float32():
    x = torch.randn(1, 4, 1, 12).bfloat16()
    rotation = rotations(torch.rand(1, 4, 3) * 1000, (4, 4, 4), 256.0)
    turned = rotate(x, rotation)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), rotation).bfloat16())


class NoFloat64(TorchDispatchMode):
    """Makes the meta device one that has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(x.is_meta and x.dtype == torch.float64 for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            raise self.error
        return out


@pytest.mark.parametrize("error", [TypeError("Cannot convert"), RuntimeError("Required aspect fp64 is not supported")])
def test_devices_without_float64_get_the_same_rotations(error, monkeypatch):
    """Devices are asked once, whatever their name; angles are computed in float64 all the same."""
    positions = torch.rand(1, 4, 3) * 1000
    expected = rotations(positions, (4, 4, 4), 256.0)
    meta = positions.to("meta")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: positions)  # what meta does not have
    rope._computes_in_float64.cache_clear()
    mode = NoFloat64()
    mode.error = error
    with mode:
        found = [rotations(meta, (4, 4, 4), 256.0) for _ in range(2)]
    assert rope._computes_in_float64.cache_info().misses == 1
    rope._computes_in_float64.cache_clear()
    assert all(turn.is_meta and turn.shape == expected.shape and turn.dtype == torch.float32 for turn in found)
    assert rotations(meta, (4, 4, 4), 256.0).is_meta  # it has


def test_angles_are_those_of_float64():
    positions = torch.tensor([[[1023.0, 511.0, 77.0]]])
    found = rotations(positions, (4, 4, 4), 256.0)[0, 0, 0]
    exact = positions.double()[0, 0, :, None] * 256.0 ** -(torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    assert torch.equal(found[:, 0, 0], exact.flatten().float().cos())
    assert torch.equal(found[:, 1, 0], exact.flatten().float().sin())
