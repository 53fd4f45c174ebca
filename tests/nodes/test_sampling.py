"""The sampler node in one process: schedules, batches, what other nodes hang into it, and what it refuses."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.config import SchedulerConfig
from zimage_core.sampling.schedule import sigmas

from ..helpers import NANO, relative


@pytest.fixture(scope="module")
def parts(pack) -> SimpleNamespace:
    """MODEL, VAE and conditioning of the nano model in float32."""
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)

    def encode(text: str):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    return SimpleNamespace(
        model=pack.bridge.model.load_model(NANO, torch.float32),
        vae=pack.bridge.vae.ZImageVAE(NANO),
        encode=encode,
        positive=encode("a red circle on a blue background"),
        negative=encode("a green square in the corner"),
    )


def empty(batch: int = 1, height: int = 16, width: int = 16) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 16, height, width)}


@pytest.fixture
def sample(pack, parts):
    """Runs the node; keyword arguments replace its inputs. The raw latents."""

    def run(**inputs: Any) -> torch.Tensor:
        defaults = {
            "model": parts.model,
            "positive": parts.positive,
            "negative": parts.negative,
            "latent_image": empty(),
            "seed": 3,
            "steps": 4,
            "guidance_scale": 0.0,
            "cfg_normalization": 0.0,
            "cfg_truncation": 1.0,
            "denoise": 1.0,
        }
        (out,) = pack.sampling.ZImageSampler.execute(**{**defaults, **inputs}).args
        return out["samples"]

    return run


# The schedule


@pytest.mark.parametrize(("steps", "denoise"), [(4, 1.0), (8, 1.0), (4, 0.5), (5, 0.25), (2, 0.04)])
def test_denoise_means_what_it_means_in_the_ksampler(pack, comfy, parts, steps, denoise):
    """Steps that divide 1000 in all: there the stock `simple` schedule is the exact one."""
    stock = comfy.samplers.KSampler(parts.model, steps, torch.device("cpu"), "euler", "simple", denoise)
    config = pack.bridge.sampler.scheduler_config(parts.model)
    ours = pack.sampling.noise_levels(steps, denoise, config, torch.zeros(1, 16, 16, 16))
    assert len(ours) == steps + 1
    assert torch.allclose(ours, stock.sigmas, atol=1e-6)


def test_dynamic_shift_of_the_snapshot_is_followed_unless_a_node_sets_another(pack, comfy, tmp_path):
    folder = Path(shutil.copytree(NANO, tmp_path / "Dynamic"))
    path = folder / "scheduler" / "scheduler_config.json"
    raw = {**json.loads(path.read_text()), "use_dynamic_shifting": True}
    path.write_text(json.dumps(raw))
    model = pack.bridge.model.load_model(folder, torch.float32)
    config = pack.bridge.sampler.scheduler_config(model)
    levels = pack.sampling.noise_levels(6, 1.0, config, torch.zeros(1, 16, 64, 32))
    assert torch.equal(levels, sigmas(6, SchedulerConfig.from_dict(raw, "test"), 32 * 16))

    class Shifted:
        shift = 6.0

    model.add_object_patch("model_sampling", Shifted())
    config = pack.bridge.sampler.scheduler_config(model)
    assert config.shift == 6.0 and not config.use_dynamic_shifting


# Batches and masks


def test_one_image_of_a_batch_comes_out_alone_as_in_the_batch(sample):
    """LatentFromBatch leaves the place in `batch_index`; the noise is that of the place."""
    together = sample(latent_image=empty(batch=3))
    alone = sample(latent_image={**empty(), "batch_index": [2]})
    assert relative(alone[0], together[2]) <= 1e-3
    assert relative(together[0], together[2]) > 0.02


def test_other_entries_of_the_latent_stay_and_its_old_scale_goes(pack, parts, sample):
    latent = {**empty(), "noise_mask": torch.ones(1, 128, 128), "batch_index": [0], "downscale_ratio_spacial": 8}
    inputs = {"seed": 3, "steps": 1, "guidance_scale": 0.0, "cfg_normalization": 0.0, "cfg_truncation": 1.0}
    node = pack.sampling.ZImageSampler
    (out,) = node.execute(model=parts.model, positive=parts.positive, latent_image=latent, denoise=1.0, **inputs).args
    assert out.keys() == {"samples", "noise_mask", "batch_index"}
    assert out["noise_mask"] is latent["noise_mask"] and not latent["samples"].any()


def test_prompts_of_different_length_with_guidance_and_a_batch(sample, parts):
    """ComfyUI never pads captions: unequal lengths run apart, with the result of one image at a time."""
    negative = parts.encode("blurry, " * 60)
    assert negative[0][0].shape[1] > 64 > parts.positive[0][0].shape[1]
    together = sample(latent_image=empty(batch=2), negative=negative, guidance_scale=2.0)
    alone = sample(latent_image={**empty(), "batch_index": [1]}, negative=negative, guidance_scale=2.0)
    assert relative(alone[0], together[1]) <= 1e-3


# What other nodes hang into the sampling


def test_formula_and_corrections_of_other_nodes_take_effect(comfy, parts, sample):
    """sampler_cfg_function (RescaleCFG) replaces the formula, post-CFG functions (APG) see its result."""
    seen = []

    def formula(args):
        return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"] * 0.5

    def correction(args):
        seen.append(args["cond_scale"])
        return args["denoised"]

    model = parts.model.clone()
    model.set_model_sampler_cfg_function(formula)
    model.set_model_sampler_post_cfg_function(correction)
    halved = sample(model=model, guidance_scale=3.0)
    assert seen == [4.0] * 4
    assert relative(halved, sample(guidance_scale=1.0)) <= 1e-5  # half of CFG 4 is CFG 2, so guidance 1
    with pytest.raises(ValueError, match="cfg_normalization can't be combined with a node that replaces the CFG"):
        sample(model=model, guidance_scale=3.0, cfg_normalization=1.0)


def test_areas_of_odd_size_and_combined_prompts(parts, sample):
    """ConditioningSetArea counts in cells; 7x9 of them can't be cut into 2x2 and must work all the same."""
    area = [[parts.negative[0][0], {**parts.negative[0][1], "area": (7, 9, 3, 2), "strength": 1.0}]]
    plain = sample()
    out = sample(positive=[*parts.positive, *area])
    assert torch.isfinite(out).all()
    assert relative(out, plain) > 1e-2


def test_lora_that_hangs_on_a_prompt(comfy, parts, sample):
    """A hook LoRA on the whole prompt is the same LoRA on the model, and gone afterwards."""
    hooks = importlib.import_module("comfy.hooks")
    generator = torch.Generator().manual_seed(4)
    dim = parts.model.model.diffusion_model.config.dim
    stem = "diffusion_model.layers.1.attention.out"
    lora = {
        f"{stem}.lora_A.weight": torch.randn(2, dim, generator=generator),
        f"{stem}.lora_B.weight": 0.3 * torch.randn(dim, 2, generator=generator),
    }
    plain = sample()
    on_model, _ = comfy.sd.load_lora_for_models(parts.model, None, lora, 1.0, 0.0)
    expected = sample(model=on_model)
    hook = hooks.create_hook_lora(lora, 1.0, 0.0)
    hooked = hooks.set_hooks_for_conditioning(parts.positive, hook)
    assert relative(sample(positive=hooked), expected) <= 1e-4
    assert relative(expected, plain) > 1e-2
    assert torch.equal(sample(), plain)


# What it refuses


def test_negative_is_asked_for_only_where_it_counts(pack):
    status = pack.sampling.ZImageSampler.check_lazy_status
    assert status(guidance_scale=0.0, negative=None, steps=8) == []
    assert status(guidance_scale=2.0, negative=None, steps=8) == ["negative"]
    assert status(guidance_scale=2.0, negative=[], steps=8) == []  # evaluated already
    assert status(guidance_scale=2.0, steps=8) == []  # not connected: the node itself says so


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),  # the widget forbids it, a wire doesn't
        ({"denoise": 0.0}, r"denoise is 0.0, expected more than 0 and at most 1"),
        ({"denoise": 1.5}, r"denoise is 1.5, expected more than 0 and at most 1"),
        ({"positive": []}, "`positive` holds no prompt. Connect a Z-Image Text Encode"),
        ({"guidance_scale": 2.0, "negative": []}, "`negative` holds no prompt"),
        ({"guidance_scale": 2.0, "negative": None}, "nothing is connected to `negative`"),
        ({"latent_image": {"samples": torch.ones(1, 16, 1, 16, 16)}}, r"not an image's \(shape \[1, 16, 1, 16, 16\]"),
        ({"latent_image": {"samples": torch.ones(1, 4, 16, 16)}}, "4 channels, expected 16"),
        ({"latent_image": empty(height=15)}, "128x120 pixels; .* divisible by 16.* 128x112"),
        ({"latent_image": empty(height=1, width=1)}, "8x8 pixels; .* 16x16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_input_that_cannot_work(sample, inputs, message):
    with pytest.raises(ValueError, match=message):
        sample(**inputs)
    assert torch.isfinite(sample(steps=1)).all()


def test_several_latents_in_one_are_refused(sample):
    nested = importlib.import_module("comfy.nested_tensor").NestedTensor([torch.ones(1, 16, 16, 16)] * 2)
    with pytest.raises(ValueError, match=r"not an image's \(several tensors\)"):
        sample(latent_image={"samples": nested})


def test_reference_images_are_seen(parts, sample):
    (features, extra), *_ = parts.positive
    with_reference = [[features, {**extra, "reference_latents": [torch.ones(1, 16, 16, 16)]}]]
    assert not torch.equal(sample(positive=with_reference), sample())


# Images


def test_vae_nodes_without_an_autoencoder_say_what_to_connect(pack):
    for node, inputs in (
        (pack.vae.ZImageVAEDecode, {"samples": empty()}),
        (pack.vae.ZImageVAEEncode, {"pixels": None}),
    ):
        with pytest.raises(ValueError, match="no VAE in `vae`.* Connect a Load Z-Image VAE node"):
            node.execute(vae=None, **inputs)


def test_decoding_takes_odd_cells_and_names_foreign_channels(pack, parts):
    decode = pack.vae.ZImageVAEDecode.execute
    (image,) = decode(vae=parts.vae, samples=empty(batch=2, height=15, width=13)).args
    assert image.shape == (2, 120, 104, 3) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    with pytest.raises(ValueError, match="4 channels, expected 16"):
        decode(vae=parts.vae, samples={"samples": torch.zeros(1, 4, 16, 16)})


def test_encoding_gives_the_mean_of_the_core_whatever_the_alpha_channel(pack, parts):
    core = importlib.import_module("zimage_core.weights.snapshot").Snapshot(NANO).vae(dtype=torch.float32)
    pixels = torch.rand(2, 64, 96, 4, generator=torch.Generator().manual_seed(5))
    (latent,) = pack.vae.ZImageVAEEncode.execute(vae=parts.vae, pixels=pixels).args
    mean = core.encode(pixels[..., :3].movedim(-1, 1) * 2 - 1)
    assert relative(latent["samples"], mean) <= 1e-5


@pytest.mark.parametrize("share", [0.6, 0.1])
def test_partly_loaded_vae_decodes_the_same(parts, share):
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(6))
    whole = parts.vae.first_stage_model.decode(latents)
    patcher = parts.vae.patcher
    patcher.detach()
    patcher.load(torch.device("cpu"), lowvram_model_memory=max(1, int(patcher.model_size() * share)))
    assert patcher.model.model_lowvram
    assert torch.allclose(parts.vae.first_stage_model.decode(latents), whole, atol=1e-5)
    patcher.detach()


# Folders


def test_extra_model_paths_are_offered(pack, tmp_path):
    """ComfyUI's own reader of extra_model_paths.yaml, with this pack's and the diffusers folder in it."""
    folder_paths = importlib.import_module("folder_paths")
    extra_config = importlib.import_module("utils.extra_config")
    (tmp_path / "mine" / "Alpha" / "transformer").mkdir(parents=True)
    (tmp_path / "theirs" / "Beta").mkdir(parents=True)
    (tmp_path / "theirs" / "Beta" / "model_index.json").write_text("{}")
    (tmp_path / "paths.yaml").write_text(f"other:\n  base_path: {tmp_path}\n  zimage: mine\n  diffusers: theirs\n")
    before = {kind: list(folder_paths.get_folder_paths(kind)) for kind in ("zimage", "diffusers")}
    extra_config.load_extra_path_config(str(tmp_path / "paths.yaml"))
    try:
        choices = pack.bridge.folders.model_choices("transformer")
        assert choices[0] == "Z-Image-Nano (built in)" and {"Alpha", "Beta"} <= set(choices)
        assert pack.bridge.folders.model_path("Beta", "vae") == tmp_path / "theirs" / "Beta"
        empty_print = pack.bridge.folders.fingerprint("Alpha", "transformer")
        (tmp_path / "mine" / "Alpha" / "transformer" / "config.json").write_text("{}")
        assert pack.bridge.folders.fingerprint("Alpha", "transformer") != empty_print
    finally:
        for kind, paths in before.items():
            folder_paths.folder_names_and_paths[kind][0][:] = paths
    with pytest.raises(FileNotFoundError, match="no model 'Alpha'.*models/diffusion_models.*zimage.*press R"):
        pack.bridge.folders.model_path("Alpha", "transformer")


def test_single_files_are_offered_by_the_loader_made_for_them(pack, tmp_path):
    """In ComfyUI's own folders; each loads as the snapshot that it was saved from."""
    folder_paths = importlib.import_module("folder_paths")
    loaders = pack.loaders
    nodes = {
        "transformer": (loaders.ZImageTransformerLoader, "diffusion_models", {"weight_dtype": "fp32"}),
        "text_encoder": (loaders.ZImageTextEncoderLoader, "text_encoders", {"weight_dtype": "fp32"}),
        "vae": (loaders.ZImageVAELoader, "vae", {}),
    }
    before = {kind: list(folder_paths.get_folder_paths(kind)) for _, kind, _ in nodes.values()}
    try:
        for part, (_, kind, _) in nodes.items():
            (tmp_path / kind).mkdir()
            (weights,) = (NANO / part).glob("*.safetensors")
            config = {f"zimage.{part}.config": (NANO / part / "config.json").read_text()}
            save_file(load_file(weights), tmp_path / kind / "nano.safetensors", config)
            (tmp_path / kind / "old.ckpt").touch()
            folder_paths.add_model_folder_path(kind, str(tmp_path / kind))
        for part, (loader, kind, settings) in nodes.items():
            choice, nano = "nano.safetensors", pack.bridge.folders.NANO
            choices = pack.bridge.folders.model_choices(part)
            assert choices[:2] == [choice, nano] and not any(other.endswith(".ckpt") for other in choices)
            of_0_1 = f"{kind}/{choice}"
            assert loader.validate_inputs(of_0_1) is loader.validate_inputs(choice) is True
            assert loader.fingerprint_inputs(of_0_1, **settings) == loader.fingerprint_inputs(choice, **settings)
            assert loader.fingerprint_inputs(choice, **settings)[0][0] == str(tmp_path / kind / "nano.safetensors")
            ours, theirs = (_weights(loader.execute(name, **settings).args[0]) for name in (of_0_1, nano))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    finally:
        for kind, paths in before.items():
            folder_paths.folder_names_and_paths[kind][0][:] = paths


def _weights(loaded: Any) -> dict[str, torch.Tensor]:
    """Of a MODEL, which is a patcher, or of a CLIP or VAE, which have one."""
    return getattr(loaded, "patcher", loaded).model.state_dict()


# Damaged weights


@pytest.mark.parametrize("kind", ["transformer", "text_encoder", "vae"])
def test_a_weight_that_is_not_finite_is_named(pack, kind):
    """Not when it is loaded, which need not read it, but where it spoils the result."""
    clip, model, vae = (
        pack.bridge.clip.load_clip(NANO),
        pack.bridge.model.load_model(NANO),
        pack.bridge.vae.ZImageVAE(NANO),
    )
    module, name = {
        "transformer": (model.model.diffusion_model, "layers.1.attention.qkv.weight"),
        "text_encoder": (clip.cond_stage_model.encoder, "model.layers.0.mlp.up_proj.weight"),
        "vae": (vae.first_stage_model, "decoder.mid.block_1.conv1.bias"),
    }[kind]
    weight = module.get_parameter(name)
    weight.data = weight.data.clone()
    weight.data.view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=f"{name} of the .* has values that are not finite .* download it again"):
        (positive,) = pack.conditioning.ZImageTextEncode.execute(clip, "a red circle").args
        (latent,) = pack.sampling.ZImageSampler.execute(
            model=model,
            positive=positive,
            latent_image={"samples": torch.zeros(1, 16, 8, 8)},
            seed=1,
            steps=1,
            guidance_scale=0.0,
            cfg_normalization=0.0,
            cfg_truncation=1.0,
            denoise=1.0,
        ).args
        pack.vae.ZImageVAEDecode.execute(vae, latent)


def test_sizes_that_the_model_was_not_trained_on_are_told(pack, parts, sample, caplog):
    sample(latent_image=empty(height=32, width=32), steps=1)
    assert "trained on" not in caplog.text
    for side in (4, 40):
        caplog.clear()
        sample(latent_image=empty(height=side, width=side), steps=1)
        assert f"trained on images of 128x128; {8 * side}x{8 * side} is far from that" in caplog.text


def test_words_that_the_nano_model_does_not_know_are_told(pack, caplog):
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    pack.bridge.clip.encode(clip, "Two RED stars, on a blue background")
    assert "doesn't know" not in caplog.text
    pack.bridge.clip.encode(clip, "a red cat on the moon, cinematic")
    assert "This small model doesn't know: cat, cinematic." in caplog.text
