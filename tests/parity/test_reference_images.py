"""Reference images in the pipeline against diffusers' ZImageOmniPipeline, whose positions are put right for it."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from diffusers import ZImageOmniPipeline
from diffusers import ZImagePipeline as TextToImage
from PIL import Image
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from zimage_core.__main__ import main
from zimage_core.errors import CheckpointError
from zimage_core.pipeline import ZImagePipeline
from zimage_core.sampling.reference import Sight

from ..helpers import relative
from .conftest import randomize

WIDTH = 40
PROMPT = "a red circle on a blue background"
# Height and width. Latents have 8 rows and columns for each of siglip's: for others diffusers stretches its grid to the
# latents, ComfyUI by 8
SIZES = ((256, 256), (128, 512))


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


def images():
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
    image = torch.nn.functional.interpolate(images()[0][..., ::8, ::8], size, mode="bicubic").clamp(0, 1)
    given = processor(images=[as_pillow(image)], return_tensors="pt")
    rows, columns = given["spatial_shapes"][0].tolist()
    network = Siglip2VisionModel.from_pretrained(folder / "siglip")
    expected = network(**given).last_hidden_state[:, : rows * columns].unflatten(1, (rows, columns))
    found = Sight(folder / "siglip").features(image, torch.float32)
    assert found.shape == expected.shape and relative(found, expected) <= 0.02


@pytest.fixture
def omni(folder, pipe, monkeypatch):
    """diffusers' pipeline, with ComfyUI's positions, clean pads and all in float32, which sees what ours sees."""
    parts = TextToImage.from_pretrained(folder)
    transformer = type(parts.transformer)
    pad, embed = transformer._pad_with_ids, transformer.patchify_and_embed_omni

    def once(self, feat, *arguments):
        padded, places, mask, total, noise = pad(self, feat, *arguments)
        return padded, places[:total], mask, total, noise

    def clean(self, *arguments):
        *others, masks = embed(self, *arguments)
        return (*others, [mask[:-32] + [0] * 32 for mask in masks])

    monkeypatch.setattr(transformer, "_pad_with_ids", once)
    monkeypatch.setattr(transformer, "patchify_and_embed_omni", clean)
    sight = Sight(folder / "siglip")

    def latents(self, images, batch_size, device, dtype):
        found = [pipe.encode((image + 1) / 2)[0].unsqueeze(1) for image in images]
        return [list(found) for _ in range(batch_size)]

    def features(self, images, batch_size, device, dtype):
        found = [sight.features(_tensor(image), torch.float32)[0] for image in images]
        return [list(found) for _ in range(batch_size)]

    monkeypatch.setattr(ZImageOmniPipeline, "prepare_image_latents", latents)
    monkeypatch.setattr(ZImageOmniPipeline, "prepare_siglip_embeds", features)
    reference = ZImageOmniPipeline(
        parts.scheduler, parts.vae, parts.text_encoder, parts.tokenizer, parts.transformer, None, None
    )
    reference.set_progress_bar_config(disable=True)
    return reference


def _tensor(image):
    return torch.from_numpy(numpy.asarray(image).copy()).movedim(-1, 0).unsqueeze(0) / 255


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_latents_after_three_steps(pipe, omni, count, guidance):
    pillows = [as_pillow(image) for image in images()[:count]]
    settings = {"width": 96, "height": 64, "guidance_scale": guidance}
    found = pipe.generate(
        PROMPT,
        "blurry",
        steps=3,
        seed=11,
        output="latents",
        references=[_tensor(image) for image in pillows],
        **settings,
    )
    expected = omni(
        pillows,
        [PROMPT],
        negative_prompt=["blurry"],
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
        **settings,
    )[0]
    assert relative(found, expected) <= 1e-4


def test_several_prompts_and_images_of_each(pipe):
    settings = {"width": 64, "height": 64, "steps": 2, "output": "latents", "guidance_scale": 1.5}
    prompts = [PROMPT, "two green stars beside a long list of other things"]
    seeds = [1, 2, 3, 4]
    found = pipe.generate(prompts, batch_size=2, seed=seeds, references=images(), **settings)
    for index, seed in enumerate(seeds):
        alone = pipe.generate(prompts[index // 2], seed=[seed], references=images(), **settings)
        assert relative(found[index : index + 1], alone) <= 1e-4
        assert relative(alone, pipe.generate(prompts[index // 2], seed=[seed], **settings)) > 1e-3


def test_a_large_image_is_scaled_down(pipe):
    large = torch.nn.functional.interpolate(images()[0], (1100, 1300))
    seen = []
    encode, pipe.encode = pipe.encode, lambda image: seen.append(image.shape[-2:]) or encode(image)
    try:
        pipe.generate(PROMPT, width=32, height=32, steps=1, references=[large], output="latents")
    finally:
        del pipe.encode
    assert seen == [(928, 1104)]  # 941 x 1113, cut


def test_what_is_missing_is_said(make_snapshot, folder, pipe):
    plain = ZImagePipeline.from_pretrained(make_snapshot("narrow", 0))
    with pytest.raises(
        ValueError, match="need Z-Image Omni or Edit, and the folder siglip/ in its snapshot is missing"
    ):
        plain.generate(PROMPT, width=64, height=64, references=images())
    plain.sight = Sight(folder / "siglip")
    with pytest.raises(ValueError, match="and a transformer with a siglip part is missing"):
        plain.generate(PROMPT, width=64, height=64, references=images())
    with pytest.raises(
        ValueError, match=r"reference image 2 has shape \[3, 8, 8\], expected \[batch, 3, height, width\]"
    ):
        pipe.generate(PROMPT, width=64, height=64, references=[images()[0], torch.zeros(3, 8, 8)])
    with pytest.raises(CheckpointError, match="this siglip2 encoder can't be read"):
        Sight(folder / "vae").features(images()[0], torch.float32)


def test_the_command_takes_them(folder, pipe, tmp_path):
    pillow = as_pillow(images()[0])
    pillow.save(tmp_path / "seen.png")
    options = ["-m", str(folder), "--reference", str(tmp_path / "seen.png"), "-o", str(tmp_path / "made.png"), "--cpu"]
    asked = ["--width", "64", "--height", "48", "--steps", "2", "--seed", "4"]
    assert main(["generate", PROMPT, *options, *asked]) == 0
    expected = pipe.generate(PROMPT, width=64, height=48, steps=2, seed=4, references=[_tensor(pillow)])
    made = Image.open(tmp_path / "made.png")
    assert (_tensor(made) - expected).abs().max() <= 0.51 / 255
    assert "Reference: seen.png" in made.text["parameters"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": PROMPT, "references": ["seen.png"], "seed": 4}))
    out = tmp_path / "batch"
    assert main(["batch", str(tmp_path / "rows.jsonl"), "-o", str(out), "-m", str(folder), "--cpu", *asked[:6]]) == 0
    of_row = Image.open(out / "000001_4.png")
    assert of_row.tobytes() == made.tobytes() and "Reference: seen.png" in of_row.text["parameters"]
