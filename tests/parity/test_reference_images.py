"""Reference images in the pipeline against diffusers' ZImageOmniPipeline, whose positions are put right for it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import ZImageOmniPipeline
from PIL import Image
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from zimage_core.pipeline import ZImagePipeline
from zimage_core.sampling.reference import Sight

from ..helpers import relative
from .conftest import randomize

WIDTH = 40
PROMPT = "a red circle on a blue background"
SIZES = ((64, 96), (80, 48))  # height and width, as all that is made divisible by 16


@pytest.fixture(scope="module")
def folder(make_snapshot, make_transformer):
    """A snapshot with a siglip encoder."""
    folder = make_snapshot("narrow", 0)
    make_transformer("narrow", 0, siglip_feat_dim=WIDTH).save_pretrained(folder / "transformer")
    config = Siglip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_patches=16,
        patch_size=16,
    )
    randomize(Siglip2VisionModel(config), 5).save_pretrained(folder / "siglip")
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return ZImagePipeline.from_pretrained(folder)


def pictures():
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(1, 3, *size, generator=generator) for size in SIZES]


def as_pillow(image):
    return Image.fromarray((image[0].movedim(0, -1) * 255).round().byte().numpy())


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (160, 33), (16, 16), (300, 300)])
def test_what_siglip_sees(folder, size):
    """As through transformers' own processor, which rounds pixels to 8 bits."""
    processors = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    processor = processors.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
    picture = torch.nn.functional.interpolate(pictures()[0][..., ::8, ::8], size, mode="bicubic").clamp(0, 1)
    given = processor(images=[as_pillow(picture)], return_tensors="pt")
    rows, columns = given["spatial_shapes"][0].tolist()
    network = Siglip2VisionModel.from_pretrained(folder / "siglip")
    expected = network(**given).last_hidden_state[:, : rows * columns].unflatten(1, (rows, columns))
    found = Sight(folder / "siglip").features(picture, torch.float32)
    assert found.shape == expected.shape and relative(found, expected) <= 0.02
