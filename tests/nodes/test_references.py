"""Reference images from ComfyUI's own nodes: our CLIP and MODEL against the native ones of the same weights."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from safetensors.torch import save_file

from ..helpers import NANO, relative
from . import native_model
from .stock import run

SIGLIP = 40  # width of its features
TEXT = "a red circle on a blue background"
SIZES = ((64, 96), (128, 64), (80, 80))  # of the images, width and height
VISION = {  # as ComfyUI describes siglip2, smaller
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": SIGLIP,
    "image_size": -1,
    "intermediate_size": 64,
    "model_type": "siglip2_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 16,
    "num_patches": 25,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def randomized(module, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and "pad_token" not in name:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module.eval()


@pytest.fixture(scope="module")
def make_models(pack, comfy, tmp_path_factory):
    """(ours, native) of the same random weights, from a single file that says its numbers."""

    def make(features: int | None):
        core = importlib.import_module(f"{pack.bridge.model.__name__.split('.')[0]}.zimage_core.model.transformer")
        raw = json.loads((NANO / "transformer" / "config.json").read_text()) | {"n_layers": 3, "n_refiner_layers": 2}
        raw["siglip_feat_dim"] = features
        with torch.inference_mode(False):
            config = core.TransformerConfig.from_dict(raw, "config.json")
            network = randomized(core.ZImageTransformer(config), 4)
        path = tmp_path_factory.mktemp("model") / "model.safetensors"
        metadata = {"zimage.transformer.config": json.dumps(raw)}
        save_file({name: value.data for name, value in network.named_parameters()}, path, metadata)
        ours = pack.bridge.model.load_model(path, torch.float32)
        return ours, native_model.like(comfy, ours)

    with torch.inference_mode():
        yield make


@pytest.fixture(scope="module")
def omni(make_models):
    return make_models(SIGLIP)


@pytest.fixture(scope="module")
def plain(make_models):
    return make_models(None)


@pytest.fixture(scope="module")
def clips(pack, comfy):
    with torch.inference_mode():
        ours = pack.bridge.clip.load_clip(NANO, torch.float32)
        return ours, native_model.clip_like(comfy, ours, NANO)


@pytest.fixture(scope="module")
def vae(pack):
    with torch.inference_mode():
        return pack.bridge.vae.ZImageVAE(NANO)


@pytest.fixture(scope="module")
def vision(comfy):
    """ComfyUI's own siglip2 encoder, small, of random weights."""
    with torch.inference_mode():
        encoder = importlib.import_module("comfy.clip_vision").ClipVisionModel(VISION)
        randomized(encoder.model, 6)
        return encoder


def images(count: int):
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(1, height, width, 3, generator=generator) for width, height in SIZES[:count]]


def encoded(clip, vae, vision, count: int, text: str = TEXT):
    """By TextEncodeZImageOmni, at the images' own sizes."""
    inputs = {f"image{number}": image for number, image in enumerate(images(count), 1)}
    settings = {"clip": clip, "prompt": text, "vae": vae, "image_encoder": vision, "auto_resize_images": False}
    return run("TextEncodeZImageOmni", **settings, **inputs)[0]


def sampled(model, positive, negative=None, batch: int = 1, steps: int = 2):
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(batch, 16, 12, 16, generator=generator)
    (out,) = run(
        "KSampler",
        model=model,
        seed=5,
        steps=steps,
        cfg=1.0 if negative is None else 2.5,
        sampler_name="euler",
        scheduler="simple",
        positive=positive,
        negative=negative if negative is not None else positive,
        latent_image={"samples": samples},
        denoise=1.0,
    )
    return out["samples"]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("sees", [False, True], ids=["", "clip vision"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_omni_nodes(omni, clips, vae, vision, count, sees, guided):
    found, expected = (
        sampled(
            model,
            encoded(clip, vae, vision if sees else None, count),
            encoded(clip, vae, vision if sees else None, count, "two green stars") if guided else None,
        )
        for model, clip in zip(omni, clips, strict=True)
    )
    assert relative(found, expected) <= 1e-5


def test_every_part_counts(omni, clips, vae, vision):
    found = [
        sampled(omni[0], encoded(clips[0], vae, sight, count))
        for count in range(4)
        for sight in (None, vision)[: count + 1]
    ]
    assert all(relative(a, b) > 1e-3 for place, a in enumerate(found) for b in found[:place])


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_is_its_items(omni, clips, vae, vision, count):
    """The native network can't join the pieces of several items: it is asked for each alone."""
    ours, native = (encoded(clip, vae, vision, count) for clip in clips)
    batch = velocity(omni[0], ours, 2)
    assert relative(batch, velocity(omni[1], native, 2, alone=True)) <= 1e-5


def velocity(model, conditioning, batch: int, alone: bool = False, options=None, seed: int = 1):
    """What the model foresees for so many images, with what ComfyUI makes of a prompt, in one call or for each."""
    ((features, extra),) = conditioning
    net = model.model
    conds = net.extra_conds(cross_attn=features, noise=torch.zeros(batch, 16, 12, 16), device="cpu", **extra)
    generator = torch.Generator().manual_seed(seed)
    latents, sigma = torch.randn(batch, 16, 12, 16, generator=generator), torch.linspace(0.7, 0.3, batch)

    def foreseen(items: slice):
        x = latents[items]
        own = {name: cond.process_cond(batch_size=len(x)).cond for name, cond in conds.items()}
        return net.apply_model(x, sigma[items], transformer_options=dict(options or {}), **own)

    return torch.cat([foreseen(slice(i, i + 1)) for i in range(batch)]) if alone else foreseen(slice(None))


# ReferenceLatent


def latents(*sizes: tuple[int, int], batch: int = 1):
    generator = torch.Generator().manual_seed(9)
    return [0.5 * torch.randn(batch, 16, height, width, generator=generator) for width, height in sizes]


def with_latents(clip, given, text: str = TEXT):
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    for samples in given:
        (conditioning,) = run("ReferenceLatent", conditioning=conditioning, latent={"samples": samples})
    return conditioning


GIVEN = {"one": ((16, 12),), "smaller": ((8, 4),), "four": ((8, 12), (16, 12), (10, 6), (2, 2))}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", ["omni", "plain"])
@pytest.mark.parametrize("batch", [1, 2])
def test_reference_latents(request, clips, kind, given, batch):
    models = request.getfixturevalue(kind)
    samples = latents(*GIVEN[given])
    for negative in (None, "two green stars on white", TEXT.replace("red", "blue")):
        found, expected = (
            sampled(
                model,
                with_latents(clip, samples),
                None if negative is None else with_latents(clip, samples, negative),
                batch,
            )
            for model, clip in zip(models, clips, strict=True)
        )
        assert relative(found, expected) <= 1e-5
    assert relative(found, sampled(models[0], with_latents(clips[0], []), with_latents(clips[0], []), batch)) > 1e-3


def test_latents_of_each_image(plain, clips):
    samples = latents((8, 6), batch=2)
    found, expected = (
        velocity(model, with_latents(clip, samples), 2) for model, clip in zip(plain, clips, strict=True)
    )
    assert relative(found, expected) <= 1e-5
    assert relative(found, velocity(plain[0], with_latents(clips[0], [samples[0][:1]]), 2)) > 1e-4


def test_what_comes_without_latents_does_not_count(omni, plain, clips, vae, vision):
    for models in (omni, plain):
        for model, clip in zip(models, clips, strict=True):
            conditioning = encoded(clip, None, vision, 2)
            bare = [[conditioning[0][0], {"attention_mask": conditioning[0][1]["attention_mask"]}]]
            assert torch.equal(velocity(model, conditioning, 1), velocity(model, bare, 1))


def test_features_do_not_count_where_the_model_has_no_part_for_them(plain, clips, vae, vision):
    found, blind, expected = (
        velocity(model, encoded(clip, vae, sight, 2), 1)
        for model, clip, sight in (
            (plain[0], clips[0], vision),
            (plain[0], clips[0], None),
            (plain[1], clips[1], vision),
        )
    )
    assert torch.equal(found, blind) and relative(found, expected) <= 1e-5


# What other nodes do to the model


def patched(model, name):
    """With something that reads and changes what it gets, by the place of a token."""
    model = model.clone()

    def patch(arguments):
        image, before = arguments["img"], arguments["img_input"]
        weight = torch.linspace(0.5, 1.5, image.shape[1]).view(1, -1, 1) * (1 + 0.1 * arguments["vec"][-1].mean())
        turned = arguments["pe"][..., 0, 0].flatten(3).mean(-1).view(1, -1, 1)
        arguments = {**arguments, "img": image * weight + 0.1 * before * turned}
        return arguments | {
            "txt": arguments["txt"] * torch.linspace(0.8, 1.2, arguments["txt"].shape[1]).view(1, -1, 1)
        }

    def override(function, q, k, v, *rest, **more):
        return function(q, k, v * torch.linspace(0.5, 1.5, v.shape[2]).view(1, 1, -1, 1), *rest, **more)

    if name == "attention":
        model.model_options["transformer_options"]["optimized_attention_override"] = override
    elif name == "positions":
        (model,) = run(
            "ScaleROPE", model=model, scale_x=1.2, shift_x=1.0, scale_y=0.8, shift_y=0.0, scale_t=1, shift_t=0
        )
    else:
        model.set_model_patch(patch, name)
    return model


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["noise_refiner", "double_block", "attention", "positions"])
def test_patches(omni, clips, vae, vision, name):
    plain = sampled(omni[0], encoded(clips[0], vae, vision, 2))
    found, expected = (
        sampled(patched(model, name), encoded(clip, vae, vision, 2)) for model, clip in zip(omni, clips, strict=True)
    )
    assert relative(found, expected) <= 1e-5 and relative(found, plain) > 1e-3


def test_the_memory_that_it_says_it_needs_is_the_native_models(omni, clips):
    ours, native = (model.model for model in omni)
    samples = latents((32, 16), (8, 8))
    shapes = [net.extra_conds_shapes(reference_latents=samples) for net in (ours, native)]
    assert shapes[0] == shapes[1] and ours.memory_usage_factor_conds == native.memory_usage_factor_conds
    scale = native.memory_usage_factor / ours.memory_usage_factor  # ours goes by the width
    required = [
        net.memory_required(
            [1, 16, 12, 16], {"ref_latents": [net.extra_conds(reference_latents=samples)["ref_latents"].size()]}
        )
        for net in (ours, native)
    ]
    assert required[0] * scale == pytest.approx(required[1])


# Refusals


def refusal(model, conditioning):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        velocity(model, conditioning, 1)
    return str(caught.value)


REFUSED = {
    "channels": (torch.zeros(1, 4, 8, 12), r"reference image 1 has the shape [1, 4, 8, 12], expected [batch, 16,"),
    "video": (torch.zeros(1, 16, 1, 8, 12), "Encode the image with Z-Image's VAE."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_latents_that_do_not_fit(plain, clips, name):
    samples, message = REFUSED[name]
    ours, native = (with_latents(clip, [samples]) for clip in clips)
    assert message in refusal(plain[0], ours)
    refusal(plain[1], native)


def test_odd_sides_are_made_even_by_their_last_row_and_column(plain, clips):
    """As TextEncodeZImageOmni's own resizing often makes them; ComfyUI's network can't take them."""
    (odd,) = latents((7, 11))
    even = torch.cat((odd, odd[..., -1:, :]), dim=-2)
    even = torch.cat((even, even[..., -1:]), dim=-1)
    refusal(plain[1], with_latents(clips[1], [odd]))
    found, native = (
        velocity(model, with_latents(clip, [samples]), 1)
        for model, clip, samples in zip(plain, clips, (odd, even), strict=True)
    )
    assert relative(found, native) <= 1e-5


def test_features_of_another_width(omni, clips, vae, comfy):
    with torch.inference_mode():
        encoder = importlib.import_module("comfy.clip_vision").ClipVisionModel(VISION | {"hidden_size": 24})
        randomized(encoder.model, 6)
    ours, native = (encoded(clip, vae, encoder, 1) for clip in clips)
    assert "The CLIP vision output has the shape [1, 6, 4, 24], expected [batch, rows, columns, 40]" in refusal(
        omni[0], ours
    )
    refusal(omni[1], native)


def test_features_of_another_encoder(omni, clips, vae, comfy):
    with torch.inference_mode():
        settings = VISION | {
            "model_type": "clip_vision_model",
            "image_size": 32,
            "hidden_act": "gelu",
            "projection_dim": 8,
        }
        encoder = importlib.import_module("comfy.clip_vision").ClipVisionModel(settings)
        randomized(encoder.model, 6)
    ours, native = (encoded(clip, vae, encoder, 1) for clip in clips)
    assert "has 5 tokens for an image of 32x32, expected one for each 16x16 pixels. Connect" in refusal(omni[0], ours)
    refusal(omni[1], native)


def test_in_the_native_network(pack, omni, clips, vae, vision):
    """The loader's other network takes the siglip part as well; its norms have another eps."""
    path, *_ = omni[0].cached_patcher_init[1]
    native = pack.bridge.model.load_model(path, torch.float32, network="ComfyUI")
    conditioning = encoded(clips[0], vae, vision, 2)
    assert relative(velocity(native, conditioning, 1), velocity(omni[0], conditioning, 1)) <= 1e-3
