from __future__ import annotations

import pytest
import torch

from zimage_core.model.patchify import padded, patchify, unpatchify


def test_a_token_is_row_column_channel_with_the_channel_fastest():
    latents = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    tokens = patchify(latents, 2)
    assert tokens.shape == (1, 6, 8)
    second = [latents[0, c, y, x].item() for y in (0, 1) for x in (2, 3) for c in (0, 1)]
    assert tokens[0, 1].tolist() == second


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 10), (16, 6)])
def test_unpatchify_is_the_inverse(height, width):
    latents = torch.randn(3, 16, height, width)
    assert torch.equal(unpatchify(patchify(latents, 2), height, width, 2), latents)


def test_odd_latents_are_refused_with_the_rule():
    with pytest.raises(ValueError, match="latents of 5x4 pixels.*divisible by 16"):
        patchify(torch.zeros(1, 16, 4, 5), 2)


def test_padded():
    assert [padded(n) for n in (1, 31, 32, 33, 64)] == [32, 32, 32, 64, 64]
