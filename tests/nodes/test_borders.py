"""What comes through the sockets in a shape or with values that no network can take is told at the border, by name."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ..helpers import NANO


@pytest.fixture(scope="module")
def vae(pack):
    return pack.bridge.vae.ZImageVAE(NANO)


@pytest.fixture(scope="module")
def parts(pack) -> SimpleNamespace:
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    return SimpleNamespace(model=pack.bridge.model.load_model(NANO, torch.float32), positive=positive)


def sample(pack, parts, **inputs):
    settings = {"guidance_scale": 0.0, "cfg_normalization": 0.0, "cfg_truncation": 1.0, "denoise": 1.0}
    given = {"latent_image": {"samples": torch.zeros(1, 16, 16, 16)}, "seed": 3, "steps": 1, **vars(parts), **settings}
    return pack.sampling.ZImageSampler.execute(**{**given, **inputs})


LATENTS = [(0, 16, 16, 16), (1, 16, 1, 16, 16), (1, 16, 16), (1, 12, 16, 16), (1, 16, 0, 16)]


@pytest.mark.parametrize("shape", LATENTS)
def test_latents_of_another_shape(pack, vae, parts, shape):
    latent = {"samples": torch.ones(shape)}
    with pytest.raises(ValueError, match="^The latent"):
        sample(pack, parts, latent_image=latent)
    with pytest.raises(ValueError, match="^The latent"):
        pack.vae.ZImageVAEDecode.execute(vae=vae, samples=latent)


@pytest.mark.parametrize("shape", LATENTS)
def test_latents_that_stock_nodes_hand_to_our_networks(pack, vae, parts, shape):
    with pytest.raises(ValueError, match="^The latent has the shape"):
        parts.model.model.diffusion_model(torch.ones(shape), torch.ones(1), parts.positive[0][0])
    with pytest.raises(ValueError, match="^The latent has the shape"):
        vae.first_stage_model.decode(torch.ones(shape))


@pytest.mark.parametrize("shape", [(0, 32, 32, 3), (1, 32, 32, 1), (1, 32, 32, 12), (32, 32, 3), (1, 0, 32, 3)])
def test_images_of_another_shape(pack, vae, shape):
    with pytest.raises(ValueError, match="^The image has the shape"):
        pack.vae.ZImageVAEEncode.execute(vae=vae, pixels=torch.ones(shape))


def test_an_image_of_twelve_channels_does_not_leave(pack, vae):
    class Other:
        first_stage_model = vae.first_stage_model
        latent_channels = 16

        def decode(self, latents):
            return torch.ones(1, 32, 32, 12)

    with pytest.raises(ValueError, match=r"^What this VAE makes has the shape \[1, 32, 32, 12\], expected \[batch"):
        pack.vae.ZImageVAEDecode.execute(vae=Other(), samples={"samples": torch.ones(1, 16, 4, 4)})


@pytest.mark.parametrize("shape", [(0, 4, 128), (4, 128), (1, 0, 128)])
def test_prompts_of_another_shape(pack, parts, shape):
    with pytest.raises(ValueError, match="^The prompt in `positive` has the shape"):
        sample(pack, parts, positive=[[torch.ones(shape), {}]])


@pytest.mark.parametrize("name", ["guidance_scale", "cfg_normalization", "cfg_truncation", "denoise"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(pack, parts, name, value):
    with pytest.raises(ValueError, match=f"^`{name}` is (nan|inf), expected a finite number"):
        sample(pack, parts, **{name: value})


def test_a_stock_lora_of_nan_is_blamed_and_not_the_model(pack, parts):
    patched = parts.model.clone()
    key = "diffusion_model.layers.0.attention.out.weight"
    patched.add_patches({key: ("diff", (torch.full((192, 192), math.nan),))})
    with pytest.raises(ValueError, match=f"^What a LoRA or another node adds to {key} is not finite"):
        sample(pack, SimpleNamespace(**{**vars(parts), "model": patched}))
    again = parts.model.clone()
    again.add_patches({key: ("diff", (torch.ones(192, 192),))}, math.nan)
    with pytest.raises(ValueError, match=f"^What a LoRA or another node adds to {key} is not finite"):
        sample(pack, SimpleNamespace(**{**vars(parts), "model": again}))


@pytest.mark.parametrize("template", [None, "<|im_start|>{}"])
def test_half_a_character_is_replaced(pack, caplog, template):
    clip = pack.bridge.clip.load_clip(NANO)
    tokens = clip.tokenize("a fish \ud83d, here", llama_template=template)
    assert tokens == clip.tokenize("a fish \ufffd, here", llama_template=template)
    assert "half a character" in caplog.text
    assert clip.tokenize("\ud83d\udc1f") == clip.tokenize("\U0001f41f")  # both halves are one


@pytest.mark.parametrize("empty", [None, "None", " null ", ""])
def test_a_repository_of_null_is_none(pack, empty):
    assert pack.bridge.folders.model_path(pack.bridge.folders.NANO, "vae", empty) == NANO


@pytest.mark.parametrize("lost", ["encoder", "decoder"])
def test_half_a_vae_says_which_half_is_missing(pack, tmp_path, lost):
    from ..test_single_files import native

    path = tmp_path / "half.safetensors"
    save_file({key: value for key, value in native("vae").items() if not key.startswith(lost)}, path)
    with pytest.raises(ValueError, match=f"^this VAE has no {lost}"):
        pack.bridge.vae.ZImageVAE(path)
