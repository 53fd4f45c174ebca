"""ComfyUI's own nodes do to our MODEL and VAE what they do to the native ones, on the same weights.

Out of reach: packs that call the inside of the native network (NegPip, NAG, DyPE, Triton kernels) need the loader's
`network` "ComfyUI". EasyCache has a test of its own: natively it writes into latents that nothing has cast.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ..helpers import NANO, ROOT, relative
from . import native_model
from .stock import nodes, run

TEXTS = ("a red circle on a blue background", "two green stars on a white background", "")


@pytest.fixture(scope="module")
def models(pack, comfy):
    """(ours, native) of the same weights."""
    with torch.inference_mode():
        ours = pack.bridge.model.load_model(NANO, torch.float32)
        return ours, native_model.like(comfy, ours)


@pytest.fixture(scope="module")
def prompts(pack):
    with torch.inference_mode():
        clip = pack.bridge.clip.load_clip(NANO, torch.float32)
        return [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in TEXTS]


@pytest.fixture(scope="module")
def latent():
    return {"samples": 0.3 * torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))}


def sampled(model, prompts, latent, sampler="euler", scheduler="simple", cfg=2.5, steps=3, denoise=0.8):
    positive, _, negative = prompts
    (out,) = run(
        "KSampler",
        model=model,
        seed=5,
        steps=steps,
        cfg=cfg,
        sampler_name=sampler,
        scheduler=scheduler,
        positive=positive,
        negative=negative,
        latent_image=latent,
        denoise=denoise,
    )
    return out["samples"]


PATCHES = {
    "RenormCFG": {"cfg_trunc": 100.0, "renorm_cfg": 0.8},
    "RescaleCFG": {"multiplier": 0.7},
    "CFGZeroStar": {},
    "CFGNorm": {"strength": 1.0},
    "APG": {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.3},
    "TCFG": {},
    "Mahiro": {},
    "Epsilon Scaling": {"scaling_factor": 1.005},
    "TemporalScoreRescaling": {"tsr_k": 0.95, "tsr_sigma": 1.0},
    "FreSca": {"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 3},
    "DifferentialDiffusion": {"strength": 1.0},
    "LazyCache": {"reuse_threshold": 0.4, "start_percent": 0.0, "end_percent": 1.0, "verbose": False},
    "ScaleROPE": {"scale_x": 1.2, "shift_x": 1.0, "scale_y": 0.8, "shift_y": 0.0, "scale_t": 1.0, "shift_t": 0.0},
    "CFGOverride": {"cfg": 1.0, "start_percent": 0.3, "end_percent": 1.0},
    "ModelSamplingAuraFlow": {"shift": 5.0},
    "ModelSamplingFlux": {"max_shift": 1.15, "base_shift": 0.5, "width": 128, "height": 128},
    "ModelNoiseScale": {"noise_scale": 0.9},
    "ModelComputeDtype": {"dtype": "fp32"},
    "SkipLayerGuidanceDiTSimple": {
        "double_layers": "2,3",
        "single_layers": "",
        "start_percent": 0.0,
        "end_percent": 1.0,
    },
    "HyperTile": {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False},
    "UNetSelfAttentionMultiply": {"q": 1.1, "k": 0.9, "v": 1.0, "out": 1.0},
    "VideoLinearCFGGuidance": {"min_cfg": 1.0},
    "NAGuidance": {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5},
    "PerpNeg": {"empty_conditioning": None, "neg_scale": 1.0},
    "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
    "TomePatchModel": {"ratio": 0.3},
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
}


def outcome(call):
    """What comes out, or the type of what is raised."""
    try:
        return call()
    except Exception as error:
        return type(error)


def agree(found, expected, tolerance=1e-4):
    if isinstance(expected, type):
        assert found is expected  # fails alike
    else:
        assert not isinstance(found, type), found
        assert relative(found, expected) <= tolerance


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", PATCHES)
def test_patches_of_a_model(models, prompts, latent, name):
    if name not in nodes():
        pytest.skip(f"this ComfyUI has no {name}")
    inputs = PATCHES[name] | ({"empty_conditioning": prompts[2]} if name == "PerpNeg" else {})
    found, expected = (
        outcome(lambda model=model: sampled(run(name, model=model, **inputs)[0], prompts, latent)) for model in models
    )
    agree(found, expected)


def test_merged_models(comfy, models, prompts, latent):
    """With one of other weights: a LoRA on top, of half its strength."""
    found = []
    for model in models:
        (other,) = run("ModelSamplingAuraFlow", model=with_lora(comfy, model), shift=3.0)
        (merged,) = run("ModelMergeSimple", model1=model, model2=other, ratio=0.5)
        found.append(sampled(merged, prompts, latent))
    agree(*found)


def with_lora(comfy, model):
    tensors = comfy.utils.load_torch_file(str(ROOT / "nano" / "zimage_nano_moon.safetensors"))
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]


def test_a_lora(comfy, models, prompts, latent):
    plain = sampled(models[0], prompts, latent)
    found, expected = (sampled(with_lora(comfy, model), prompts, latent) for model in models)
    agree(found, expected)
    assert relative(found, plain) > 1e-3


CONDITIONS = {
    "ConditioningSetArea": {"width": 64, "height": 128, "x": 64, "y": 0, "strength": 1.0},
    "ConditioningSetAreaPercentage": {"width": 0.5, "height": 1.0, "x": 0.0, "y": 0.0, "strength": 0.8},
    "ConditioningSetMask": {"mask": None, "strength": 1.0, "set_cond_area": "default"},
    "ConditioningSetTimestepRange": {"start": 0.2, "end": 0.9},
    "ConditioningZeroOut": {},
    "ConditioningAverage": {},
    "ConditioningConcat": {},
    "ConditioningCombine": {},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CONDITIONS)
def test_conditionings(models, prompts, latent, name):
    first, second, negative = prompts
    inputs = dict(CONDITIONS[name])
    if "mask" in inputs:
        inputs["mask"] = torch.linspace(0, 1, 128).expand(1, 128, 128)
    if name in ("ConditioningAverage", "ConditioningConcat"):
        inputs |= {"conditioning_to": first, "conditioning_from": second}
        inputs |= {"conditioning_to_strength": 0.6} if name == "ConditioningAverage" else {}
        (positive,) = run(name, **inputs)
    elif name == "ConditioningCombine":
        (positive,) = run(name, conditioning_1=first, conditioning_2=second)
    else:
        (changed,) = run(name, conditioning=first, **inputs)
        (positive,) = run("ConditioningCombine", conditioning_1=changed, conditioning_2=second)
    agree(*(sampled(model, (positive, None, negative), latent) for model in models))


def test_a_mask_of_the_latents(models, prompts, latent):
    (masked,) = run("SetLatentNoiseMask", samples=latent, mask=torch.linspace(0, 1, 128).expand(1, 128, 128))
    agree(*(sampled(model, prompts, masked) for model in models))


def test_a_batch(models, prompts, latent):
    (batch,) = run("RepeatLatentBatch", samples=latent, amount=3)
    agree(*(sampled(model, prompts, batch) for model in models))


GUIDERS = {
    "BasicGuider": lambda p: {"conditioning": p[0]},
    "CFGGuider": lambda p: {"positive": p[0], "negative": p[2], "cfg": 3.0},
    "DualCFGGuider": lambda p: {
        "cond1": p[0],
        "cond2": p[1],
        "negative": p[2],
        "cfg_conds": 2.0,
        "cfg_cond2_negative": 3.0,
        "style": "regular",
    },
    "PerpNegGuider": lambda p: {
        "positive": p[0],
        "negative": p[1],
        "empty_conditioning": p[2],
        "cfg": 3.0,
        "neg_scale": 1.0,
    },
}


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(models, prompts, latent, name):
    found = []
    for model in models:
        (noise,), (sampler,) = run("RandomNoise", noise_seed=2), run("KSamplerSelect", sampler_name="euler")
        (sigmas,) = run("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0)
        (guider,) = run(name, model=model, **GUIDERS[name](prompts))
        inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
        found.append(run("SamplerCustomAdvanced", **inputs)[0]["samples"])
    agree(*found)


def test_schedules(comfy, models):
    for name in comfy.samplers.KSampler.SCHEDULERS:
        found = [run("BasicScheduler", model=model, scheduler=name, steps=7, denoise=1.0)[0] for model in models]
        assert torch.equal(*found), name


@pytest.mark.slow
def test_samplers(comfy, models, prompts, latent):
    missed = {}
    for name in comfy.samplers.KSampler.SAMPLERS:
        found, expected = (
            outcome(lambda model=model, name=name: sampled(model, prompts, latent, sampler=name)) for model in models
        )
        if isinstance(expected, type) or isinstance(found, type):
            missed |= {} if found is expected else {name: (found, expected)}
        elif not relative(found, expected) <= 1e-3:
            missed[name] = relative(found, expected)
    assert not missed


@pytest.mark.slow
def test_what_is_trained(pack, comfy, models, prompts, latent, monkeypatch):
    """From the same random numbers the same LoRA. ComfyUI draws its first factors, for a fresh model, unseeded."""
    schema = nodes()["TrainLoraNode"].GET_SCHEMA()
    defaults = {entry.id: entry.default for entry in schema.inputs if getattr(entry, "default", None) is not None}
    defaults |= {"existing_lora": "[None]", "training_dtype": "fp32", "lora_dtype": "fp32", "steps": 3, "rank": 4}
    ours, native = models
    found = []
    for model, make in ((ours, pack.bridge.model.load_model), (native, native_model.like)):
        arguments = (NANO, torch.float32) if model is ours else (comfy, ours)

        def fresh(disable_dynamic, make=make, arguments=arguments):
            made = make(*arguments)
            torch.manual_seed(7)
            return made

        monkeypatch.setattr(model, "cached_patcher_init", (fresh, ()))
        given = {name: [value] for name, value in defaults.items()}
        with torch.inference_mode():
            out = nodes()["TrainLoraNode"].execute(model=[model], latents=[latent], positive=[prompts[0]], **given)
        found.append(out.args)
    (ours_lora, ours_loss, _), (native_lora, native_loss, _) = found
    assert ours_lora.keys() == native_lora.keys() and len(native_lora) > 200
    assert ours_loss["loss"] == pytest.approx(native_loss["loss"], rel=1e-5)
    joined = [torch.cat([lora[name].flatten() for name in native_lora]) for lora in (ours_lora, native_lora)]
    assert relative(*joined) <= 1e-4


# VAE


def walked(part: nn.Module, x: torch.Tensor, is_decoder: bool) -> torch.Tensor:
    """Through its modules as those do that cut an image into tiles: by their names, levels and widths."""

    def resnet(block, x):
        h = block.conv1(nn.functional.silu(block.norm1(x)))
        h = block.conv2(nn.functional.silu(block.norm2(h)))
        return h + (block.nin_shortcut(x) if block.in_channels != block.out_channels else x)

    def middle(x):
        x, attn = resnet(part.mid.block_1, x), part.mid.attn_1
        q, k, v = (layer(attn.norm(x)).flatten(2).transpose(1, 2) for layer in (attn.q, attn.k, attn.v))
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return resnet(part.mid.block_2, x + attn.proj_out(h))

    x = part.conv_in(x)
    if is_decoder:
        x = middle(x)
    levels = range(part.num_resolutions)
    for level in reversed(levels) if is_decoder else levels:
        stage = (part.up if is_decoder else part.down)[level]
        for number in range(part.num_res_blocks + is_decoder):
            x = resnet(stage.block[number], x)
        if level != (0 if is_decoder else part.num_resolutions - 1):
            x = (stage.upsample if is_decoder else stage.downsample)(x)
    if not is_decoder:
        x = middle(x)
    assert not getattr(part, "tanh_out", False) and not getattr(part, "give_pre_end", False)
    return part.conv_out(nn.functional.silu(part.norm_out(x)))


def test_others_walk_through_the_vae(pack):
    network = pack.bridge.vae.ZImageVAE(NANO).first_stage_model
    generator = torch.Generator().manual_seed(0)
    images, latents = torch.randn(1, 3, 64, 48, generator=generator), torch.randn(1, 16, 8, 6, generator=generator)
    assert relative(walked(network.encoder, images, False), network.encoder(images)) <= 1e-5
    assert relative(walked(network.decoder, latents, True), network.decoder(latents)) <= 1e-5
