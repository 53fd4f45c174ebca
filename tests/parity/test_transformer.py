"""The S3-DiT against diffusers, with the same weights."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.config import TransformerConfig
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.weights.snapshot import Snapshot, open_component
from zimage_core.weights.specs import PUBLISHED_TRANSFORMER, SPECS

from ..helpers import relative
from .conftest import TRANSFORMERS

# (caption lengths, latent height, latent width); 32 tokens is the unit of padding
CASES = {
    "caption and image multiples of 32": ([32, 32], 16, 16),
    "caption not a multiple": ([19], 16, 16),
    "image not a multiple": ([64], 12, 20),
    "neither, portrait": ([33, 33], 22, 6),
    "mixed lengths": ([5, 40, 96], 10, 14),
    "mixed lengths, same padding": ([40, 64], 8, 8),
}


@pytest.fixture(scope="module", params=[(name, seed) for name in TRANSFORMERS for seed in (0, 1)], ids=str)
def models(request, make_transformer, tmp_path_factory):
    name, seed = request.param
    reference = make_transformer(name, seed)
    folder = tmp_path_factory.mktemp("snapshot")
    reference.save_pretrained(folder / "transformer")
    return reference, Snapshot(folder)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradients", [True, False], ids=["as a module", "row blocks"])
def test_forward(models, case, gradients):
    reference, snapshot = models
    with torch.set_grad_enabled(gradients):  # without gradients a CPU runs its blocks another way
        ours, theirs = _both(reference, snapshot.transformer(), case, torch.float32)
    assert relative(ours, theirs) <= 1e-5


def test_captions_as_one_tensor_equal_captions_as_a_list(models):
    _, snapshot = models
    model = snapshot.transformer()
    latents, t, cap_feats = _inputs(model.config.cap_feat_dim, [40, 40], 8, 12)
    assert torch.equal(model(latents, t, torch.stack(cap_feats)), model(latents, t, cap_feats))


def test_a_mixed_batch_equals_its_items_run_alone(models):
    _, snapshot = models
    model = snapshot.transformer()
    latents, t, cap_feats = _inputs(model.config.cap_feat_dim, [5, 40, 96], 10, 14)
    batch = model(latents, t, cap_feats)
    alone = torch.cat([model(latents[i : i + 1], t[i : i + 1], cap_feats[i : i + 1]) for i in range(3)])
    assert relative(batch, alone) <= 1e-5


def test_bfloat16_is_no_further_from_float32_than_diffusers(make_transformer, tmp_path):
    """Distances are summed over several models and cases: a single one is luck."""
    ours = theirs = 0.0
    for seed in range(2):
        reference = make_transformer("wide", seed)
        folder = tmp_path / str(seed)
        reference.save_pretrained(folder / "transformer")
        model = Snapshot(folder).transformer(dtype=torch.bfloat16)
        exact = {case: _both(reference, None, case, torch.float32)[1] for case in CASES}
        reference = reference.to(torch.bfloat16)
        for case in CASES:
            a, b = _both(reference, model, case, torch.bfloat16)
            ours += relative(a, exact[case])
            theirs += relative(b, exact[case])
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("has, says", [(True, True), (True, False), (False, True)], ids=["both", "file", "config"])
def test_the_siglip_part_of_omni(make_transformer, tmp_path, caplog, has, says):
    """Is read where file and config have it, from a snapshot and a single file; text alone gives the same image."""
    caplog.set_level(logging.INFO)
    reference = make_transformer("wide", 0, siglip_feat_dim=40)
    reference.save_pretrained(tmp_path / "transformer")
    theirs = {name: value for name, value in reference.state_dict().items() if has or not name.startswith("siglip_")}
    count = sum(name.startswith("siglip_") for name in theirs)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"siglip_feat_dim": 40 if says else None}))
    save_file(theirs, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    prefixed = {f"model.diffusion_model.{name}": value for name, value in theirs.items()}
    save_file(prefixed, tmp_path / "omni.safetensors", {"zimage.transformer.config": config.read_text()})
    for place in (tmp_path, tmp_path, tmp_path / "omni.safetensors"):
        model = open_component(place, "transformer").build()
        parts = {name: value for name, value in model.state_dict().items() if "siglip" in name}
        assert bool(parts) == (has and says)
        for name, value in parts.items():
            if "qkv" not in name and name in theirs:
                assert torch.equal(value, theirs[name])
        found, expected = _both(reference, model, "neither, portrait", torch.float32)
        assert relative(found, expected) <= 1e-5
    said = [record.getMessage() for record in caplog.records if "reference images" in record.getMessage()]
    assert len(said) == (2 if has and not says else 0)
    assert all(f"(siglip_*, {count} tensors)" in line and "siglip_feat_dim" in line for line in said)


def test_a_single_file_tells_by_its_shapes_whether_it_is_omni():
    sizes = {"dim": 384, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3, "cap_feat_dim": 48, "siglip_feat_dim": 40}
    config = TransformerConfig(**PUBLISHED_TRANSFORMER, **sizes, in_channels=16, patch_size=2)
    shapes = {name: tuple(value.shape) for name, value in ZImageTransformer(config, device="meta").named_parameters()}
    assert SPECS["transformer"].config_of(shapes, {}, "", lambda name: None) == config
    plain = {name: shape for name, shape in shapes.items() if "siglip" not in name}
    assert SPECS["transformer"].config_of(plain, {}, "", lambda name: None).siglip_feat_dim is None


def _inputs(cap_feat_dim, lengths, height, width):
    generator = torch.Generator().manual_seed(len(lengths) * 1000 + lengths[0])
    latents = torch.randn(len(lengths), 16, height, width, generator=generator)
    t = torch.rand(len(lengths), generator=generator)
    return latents, t, [3 * torch.randn(length, cap_feat_dim, generator=generator) for length in lengths]


@torch.no_grad()
def _both(reference, model, case, dtype):
    lengths, height, width = CASES[case]
    latents, t, cap_feats = _inputs(reference.config.cap_feat_dim, lengths, height, width)
    latents, cap_feats = latents.to(dtype), [feats.to(dtype) for feats in cap_feats]
    ours = None if model is None else model(latents, t, cap_feats)
    theirs = reference(list(latents.unsqueeze(2)), t, cap_feats, return_dict=False)[0]
    return ours, torch.stack(list(theirs)).squeeze(2)
