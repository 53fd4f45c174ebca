"""The loaders' `cache_converted`: weights that ComfyUI gets are pages of a file, and the same."""

from __future__ import annotations

import pytest
import torch

from ..helpers import NANO


def loaded(pack, cached: bool, dtype: str):
    model = pack.loaders.ZImageTransformerLoader.execute(
        str(pack.bridge.folders.NANO), dtype, cache_converted=cached
    ).args[0]
    clip = pack.loaders.ZImageTextEncoderLoader.execute(
        str(pack.bridge.folders.NANO), dtype, cache_converted=cached
    ).args[0]
    return model, clip


def weights(model, clip) -> dict[str, torch.Tensor]:
    clip.cond_stage_model.fill()
    return {**dict(model.model.named_parameters()), **dict(clip.cond_stage_model.named_parameters())}


@pytest.mark.parametrize("dtype", ["default", "fp16"])
def test_the_same_weights_from_files_in_the_user_directory(pack, user, dtype):
    folder = user.with_name("weights")
    expected = weights(*loaded(pack, False, dtype))
    assert not folder.exists()
    for _ in range(2):
        found = weights(*loaded(pack, True, dtype))
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert weight.dtype == found[name].dtype and torch.equal(weight, found[name]), name
    # the nano model's q, k and v lie apart, so they are fused; its encoder has all of it as it is needed
    assert len(list(folder.glob("*.safetensors"))) == (1 if dtype == "default" else 2)


def test_one_is_made_again_for_a_device_of_its_own(pack):
    """ComfyUI makes a patcher anew from what it remembers of it."""
    model, clip = loaded(pack, True, "fp16")
    for patcher in (model, clip.patcher):
        make, given = patcher.cached_patcher_init[:2]
        assert True in given  # cache_converted
        again = make(*given, disable_dynamic=True)
        assert {p.dtype for p in again.model.parameters()} == {torch.float16}
    assert NANO.is_dir()
