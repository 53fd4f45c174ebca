"""The autoencoder against diffusers, in both key layouts."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from zimage_core.weights.snapshot import Snapshot

from ..helpers import relative
from .conftest import VAES


@pytest.fixture(params=[(name, seed) for name in VAES for seed in (0, 1)], ids=str)
def reference(request, make_vae):
    return make_vae(*request.param)


@pytest.fixture(params=["diffusers keys", "original keys"])
def model(request, reference, tmp_path):
    folder = tmp_path / "vae"
    reference.save_pretrained(folder)
    model = Snapshot(tmp_path).vae()
    if request.param == "original keys":
        weights = model.state_dict()  # our names are the original's; diffusers' own converter must agree
        converted = convert_ldm_vae_checkpoint(dict(weights), reference.config)
        theirs = reference.state_dict()
        assert converted.keys() == theirs.keys()
        assert all(torch.equal(converted[key].reshape(theirs[key].shape), theirs[key]) for key in theirs)
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        model = Snapshot(tmp_path).vae()
    return model


@torch.no_grad()
def test_encode_and_decode(reference, model):
    generator = torch.Generator().manual_seed(7)
    image = torch.rand(2, 3, 48, 80, generator=generator) * 2 - 1
    posterior = reference.encode(image).latent_dist
    mean, logvar = model.encode_moments(image)
    assert relative(mean, posterior.mode()) <= 1e-5
    assert relative(logvar, posterior.logvar) <= 1e-5
    cell = model.config.downscale
    latents = torch.randn(2, 16, 48 // cell, 80 // cell, generator=generator)
    assert relative(model.decode(latents), reference.decode(latents).sample) <= 1e-5
