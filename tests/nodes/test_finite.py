"""Never a black image: what overflows in the real host is noticed, told and computed again, on its MODEL and ours."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ..helpers import NANO, enlarge, relative
from . import native_model

HALF = torch.float16


@pytest.fixture(scope="module")
def positive(pack):
    return pack.bridge.clip.encode(pack.bridge.clip.load_clip(NANO, torch.float32), "a red circle on a blue background")


@pytest.fixture(params=["ours", "native"])
def model(request, pack, comfy):
    """A MODEL that computes in float16, as on a GPU, and on its weights a network whose last layer overflows there."""
    if request.param == "ours":
        patcher = pack.bridge.model.load_model(NANO, HALF)
        patcher.model.manual_cast_dtype = None  # a CPU's default is to cast to float32
    else:
        patcher = native_model.like(comfy, pack.bridge.model.load_model(NANO, HALF), HALF)
        assert type(patcher.model.diffusion_model).__name__ == "NextDiT"
    assert patcher.model.get_dtype_inference() == HALF
    enlarge(patcher.model.diffusion_model.final_layer.linear.weight)
    return patcher


@pytest.fixture
def sample(pack, positive):
    def run(model: Any, **inputs: Any) -> torch.Tensor:
        width = model.model.diffusion_model.cap_embedder[1].in_features
        features = positive[0][0][..., :1] * torch.linspace(-1, 1, width)
        defaults = {
            "positive": [[features, positive[0][1]]],
            "latent_image": {"samples": torch.zeros(1, 16, 8, 8)},
            "seed": 3,
            "steps": 3,
            "guidance_scale": 0.0,
            "cfg_normalization": 0.0,
            "cfg_truncation": 1.0,
            "denoise": 1.0,
        }
        (out,) = pack.sampling.ZImageSampler.execute(model=model, **{**defaults, **inputs}).args
        return out["samples"]

    return run


def exact(model: Any) -> Any:
    """The same MODEL in float32 from the start."""
    wide = model.clone()
    wide.set_model_compute_dtype(torch.float32)
    return wide


# Steps


def test_steps_that_overflow_run_again_in_float32(comfy, sample, model, told):
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    found = sample(model)
    (warning,) = told()
    assert "step 1 of 3 gave values that are not finite (NaN or infinite) in float16 with attention" in warning
    assert "so it is computed again, in float32 with attention 'pytorch'" in warning
    assert torch.equal(found, sample(exact(model)))
    # the MODEL is as it was
    assert model.model_options["transformer_options"] == {}
    sample(model)
    assert len(told()) == 2
    after = model.model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    comfy.model_management.load_models_gpu([model])
    assert model.model.get_dtype_inference() == HALF
    assert not [name for name, part in model.model.named_modules() if hasattr(part, "prev_comfy_cast_weights")]


def test_lora_hooks_and_masks_count_in_the_second_run(comfy, sample, model, told):
    dim = model.model.diffusion_model.layers[0].attention.out.in_features
    generator = torch.Generator().manual_seed(4)
    stem = "diffusion_model.layers.1.attention.out"
    lora = {
        f"{stem}.lora_A.weight": torch.randn(2, dim, generator=generator),
        f"{stem}.lora_B.weight": 0.3 * torch.randn(dim, 2, generator=generator),
    }
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    scaled = []
    with_lora.set_model_sampler_post_cfg_function(lambda args: scaled.append(1) or args["denoised"] * 0.5)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    latent = {"samples": torch.ones(1, 16, 8, 8), "noise_mask": mask, "batch_index": [1]}
    found = sample(with_lora, latent_image=latent)
    assert len(told()) == 1 and len(scaled) == 4
    assert torch.equal(found, sample(exact(with_lora), latent_image=latent))
    assert not torch.equal(found, sample(exact(model), latent_image=latent))


def test_without_the_retry_an_error_says_what_would_help(sample, model, told):
    with pytest.raises(ValueError, match="in float16 with attention 'pytorch', .* in float32 .* safe_retry is off"):
        sample(model, safe_retry=False)
    assert not told()


def test_a_card_that_computes_bfloat16_gets_it(pack, sample, model, told, monkeypatch):
    monkeypatch.setattr(pack.bridge.sampler.mm, "should_use_bf16", lambda *_, **__: True)
    assert sample(model).isfinite().all()
    assert "in bfloat16 with" in told()[0]


def test_interrupting_ends_the_second_run(pack, comfy, sample, model, told, monkeypatch):
    management = comfy.model_management
    load = management.load_models_gpu

    def interrupting(models, *arguments, **settings):
        if told():
            management.interrupt_current_processing()
        return load(models, *arguments, **settings)

    monkeypatch.setattr(management, "load_models_gpu", interrupting)
    with pytest.raises(management.InterruptProcessingException):
        sample(model)
    management.interrupt_current_processing(False)


def test_memory_is_asked_for_by_the_dtype_of_the_second_run(pack, comfy, sample, model, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "xformers_enabled", lambda: True)  # whose figure counts bytes
    asked, load = [], comfy.model_management.load_models_gpu

    def noted(models, memory_required=0, **settings):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **settings)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", noted)
    sample(model)
    assert asked[2] == 2 * asked[0] > 0 == asked[1]


# Attention


@pytest.fixture
def failing(pack, monkeypatch):
    """A backend in ComfyUI's registry that passes every check and then gives NaN, in one call of the second step."""
    registry = pack.bridge.attention.comfy_attention.REGISTERED_ATTENTION_FUNCTIONS
    calls: list[int] = []

    def backend(q, *arguments, **settings):
        calls.append(1)
        return registry["pytorch"](q, *arguments, **settings) * (float("nan") if len(calls) == backend.at else 1)

    backend.at = 0
    monkeypatch.setitem(registry, "sage", backend)
    return SimpleNamespace(calls=calls, backend=backend)


def test_attention_that_gives_nan_is_replaced_by_plain_attention(pack, sample, told, failing):
    model = pack.bridge.model.load_model(NANO, torch.float32)
    expected = sample(model, attention="pytorch")
    sample(model, attention="sage", steps=1)
    checked = len(failing.calls)
    failing.backend.at = checked + checked + 2
    found = sample(model, attention="sage")
    (warning,) = told()
    assert "step 2 of 3 gave values that are not finite (NaN or infinite) in float32 with attention 'sage'" in warning
    assert "computed again, in float32 with attention 'pytorch'" in warning
    assert torch.equal(found, expected)
    failing.backend.at = len(failing.calls) + checked + 2
    with pytest.raises(ValueError, match="step 2 of 3 .* float32 with attention 'sage'.* safe_retry is off"):
        sample(model, attention="sage", safe_retry=False)


def test_in_bfloat16_only_the_attention_changes_and_then_the_dtype(pack, sample, told, failing):
    model = pack.bridge.model.load_model(NANO, torch.bfloat16)
    model.model.manual_cast_dtype = None
    guider = pack.bridge.sampler.make_guider(
        model,
        [[torch.zeros(1, 3, model.model.diffusion_model.cap_embedder[1].in_features), {}]],
        None,
        scale=0.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        attention="sage",
    )
    ways = []
    while guider is not None:
        ways.append((guider.dtype, guider.attention))
        guider = guider.safe()
    assert ways == [
        (torch.bfloat16, "attention 'sage'"),
        (torch.bfloat16, "attention 'pytorch'"),
        (torch.float32, "attention 'pytorch'"),
    ]


def test_attention_of_another_node_stays_and_is_named(sample, model, told):
    """It may be what the image depends on; only the precision is changed."""
    seen = []

    def theirs(function, *arguments, **settings):
        seen.append(arguments[0].dtype)
        return function(*arguments, **settings) * theirs.factor

    theirs.factor = 1.0
    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = theirs
    assert torch.equal(sample(patched), sample(exact(patched)))
    assert {HALF, torch.float32} == set(seen)
    assert "the attention of another node" in told()[0] and "theirs), which has to stay" in told()[0]
    theirs.factor = float("nan")
    with pytest.raises(ValueError, match="float32 with the attention of another node .*theirs.* try without"):
        sample(exact(patched))


# What can't be retried


def test_input_that_is_not_finite_is_named(pack, sample, positive, told):
    model = pack.bridge.model.load_model(NANO, torch.float32)
    bad = [[positive[0][0] * float("nan"), positive[0][1]]]
    with pytest.raises(ValueError, match="`positive` holds values that are not finite"):
        sample(model, positive=bad)
    with pytest.raises(ValueError, match="`negative` holds values that are not finite"):
        sample(model, negative=bad, guidance_scale=2.0, positive=positive)
    latent = {"samples": torch.full((1, 16, 8, 8), float("nan"))}
    with pytest.raises(ValueError, match="`latent_image` holds values that are not finite"):
        sample(model, latent_image=latent, denoise=0.5)
    assert not told()


def test_damage_is_named_without_a_second_run(sample, model, told):
    bias = model.model.diffusion_model.x_embedder.bias
    bias.data = torch.full_like(bias, float("nan"))
    with pytest.raises(ValueError, match="^step 1 of 3 .* x_embedder.bias of the transformer .* download it again"):
        sample(model)
    assert not told()


def test_damage_in_quantized_weights_is_named(pack, comfy):
    layer = pack.bridge.quantized.GGUFOperations.Linear(32, 2, bias=False, device="meta")
    parts = [SimpleNamespace(shape=(2, 32), format="Q8_0", tensors={"weight": torch.zeros(68, dtype=torch.uint8)})]
    parts[0].tensors["weight"].view(2, 34)[1, :2] = torch.tensor([0x00, 0x7E])  # the scale of a block: NaN
    weight = pack.bridge.quantized._gguf_tensor(parts, (2, 32), torch.float32)
    layer.load_state_dict({"weight": weight}, assign=True)
    assert "weight of the transformer has values" in str(pack.bridge.sampler.finite.damaged(transformer=layer))


# Text features


def test_a_text_encoder_in_float16_computes_in_float32(pack, user):
    """As ComfyUI has it do: nothing overflows, so there is nothing to retry."""
    clip = pack.bridge.clip.load_clip(NANO, HALF)
    for name in ("up_proj", "gate_proj"):
        enlarge(getattr(clip.cond_stage_model.encoder.model.layers[0].mlp, name).weight)
    ((features, _),) = pack.conditioning.ZImageTextEncode.execute(clip, "a red circle").args[0]
    assert features.isfinite().all() and features.dtype == torch.float32


def test_text_features_that_are_not_finite_are_told_and_never_kept(pack, user):
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    layer = clip.cond_stage_model.encoder.model.layers[0]
    layer.mlp.forward = lambda x: x * float("inf")  # as a patch of another node
    with pytest.raises(ValueError, match="^the text encoder gave .* in float32 with plain attention, though"):
        pack.conditioning.ZImageTextEncode.execute(clip, "a red circle")
    assert not list(user.glob("*"))


def test_features_that_float16_can_not_hold_begin_in_a_wider_dtype(pack, sample, positive, told):
    model = pack.bridge.model.load_model(NANO, HALF)
    model.model.manual_cast_dtype = None
    wide = [[positive[0][0] * 1e6, positive[0][1]]]
    assert torch.equal(sample(model, positive=wide), sample(exact(model), positive=wide))
    assert [message.split(" gave")[0] for message in told()] == ["text features for step 1"]


# Images


@pytest.fixture(params=["ours", "native"])
def vae(request, pack, comfy, monkeypatch):
    """A VAE in float16, whose first convolutions overflow there."""
    monkeypatch.setattr(comfy.model_management, "vae_dtype", lambda *_, **__: HALF)
    vae = pack.bridge.vae.ZImageVAE(NANO)
    if request.param == "native":
        vae = native_vae(comfy)
        assert type(vae.first_stage_model).__module__.startswith("comfy.")
    for half in (vae.first_stage_model.encoder, vae.first_stage_model.decoder):
        enlarge(half.conv_in.weight)
    assert vae.vae_dtype == HALF
    return vae


def native_vae(comfy) -> Any:
    """ComfyUI's own with random weights, narrow."""
    config = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    config |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    parameters = {"ddconfig": config, "embed_dim": 16}
    module = importlib.import_module("comfy.ldm.models.autoencoder").AutoencoderKL(**parameters)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        plain = torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
        scale = 1 / max(1, parameter[0].numel()) ** 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator) if parameter.ndim > 1 else plain
    vae = comfy.sd.VAE(sd=module.state_dict(), config={"params": parameters})
    vae.latent_channels = 16
    return vae


@pytest.mark.parametrize("low_memory", ["off", "on"])
def test_a_vae_that_overflows_runs_in_float32(pack, vae, told, low_memory):
    if low_memory == "on" and not isinstance(vae, pack.bridge.vae.ZImageVAE):
        pytest.skip("ComfyUI's own has no bands")
    samples = {"samples": torch.randn(2, 16, 2, 4, generator=torch.Generator().manual_seed(0))}
    (images,) = pack.vae.ZImageVAEDecode.execute(vae, samples, low_memory).args
    (latents,) = pack.vae.ZImageVAEEncode.execute(vae, images).args
    decoding, encoding = told()
    assert "decoding (VAE) gave values that are not finite (NaN or infinite) in float16" in decoding
    assert "encoding (VAE)" in encoding and "computed again, in float32" in encoding
    assert images.isfinite().all() and latents["samples"].isfinite().all()
    module = vae.first_stage_model
    assert vae.vae_dtype == HALF and {weight.dtype for weight in module.parameters()} == {HALF}
    # it is as it was for the next run
    pack.vae.ZImageVAEDecode.execute(vae, samples, low_memory)
    assert len(told()) == 3
    vae.patcher.detach()
    assert not hasattr(module, "manual_cast_dtype") and (module := module.float())
    vae.vae_dtype = torch.float32
    assert torch.allclose(pack.vae.ZImageVAEDecode.execute(vae, samples, low_memory).args[0], images, atol=1e-5)
    assert relative(pack.vae.ZImageVAEEncode.execute(vae, images).args[0]["samples"], latents["samples"]) <= 1e-4
    assert len(told()) == 3


def test_an_infinity_that_clamping_would_hide_is_seen(pack, comfy, told, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "vae_dtype", lambda *_, **__: HALF)
    vae = pack.bridge.vae.ZImageVAE(NANO)
    enlarge(vae.first_stage_model.decoder.conv_out.weight)
    assert vae.decode(torch.ones(1, 16, 4, 4)).isfinite().all()  # white and black
    pack.vae.ZImageVAEDecode.execute(vae, {"samples": torch.ones(1, 16, 4, 4)})
    assert len(told()) == 1


def test_a_vae_without_the_retry_and_with_bad_input(pack, vae, told):
    samples = torch.ones(1, 16, 4, 4)
    with pytest.raises(ValueError, match="decoding .* in float16, .* in float32 may help, but safe_retry is off"):
        pack.vae.ZImageVAEDecode.execute(vae, {"samples": samples}, safe_retry=False)
    with pytest.raises(ValueError, match="encoding .* in float16, .* in float32 may help, but safe_retry is off"):
        pack.vae.ZImageVAEEncode.execute(vae, torch.ones(1, 32, 32, 3), safe_retry=False)
    with pytest.raises(ValueError, match="The latents in `samples` hold values that are not finite"):
        pack.vae.ZImageVAEDecode.execute(vae, {"samples": samples * float("nan")})
    with pytest.raises(ValueError, match="The images in .* hold values that are not finite"):
        pack.vae.ZImageVAEEncode.execute(vae, torch.full((1, 32, 32, 3), float("nan")))
    assert not told()
