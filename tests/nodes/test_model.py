"""MODEL, CLIP and VAE as ComfyUI sees them: castable, partially loadable, equal to its native Z-Image."""

from __future__ import annotations

import gc
import importlib

import pytest
import torch

from .. import process_memory
from ..helpers import NANO, relative
from . import native_model

# parameters of a module that is no leaf are moved in the forward; everything else must be castable
ROOT_PARAMETERS = {"x_pad_token", "cap_pad_token"}
CPU = torch.device("cpu")


@pytest.fixture
def patcher(pack):
    return pack.bridge.model.load_model(NANO, torch.float32)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 16, 16, 16, generator=generator), torch.randn(1, 21, 128, generator=generator)


def predict(patcher, inputs, model=None, options=None) -> torch.Tensor:
    """The image that `model` (by default the patcher itself) foresees, through ComfyUI's own call."""
    latents, context = inputs
    width = patcher.model.diffusion_model.config.cap_feat_dim
    context = context[..., :1] * torch.linspace(-1, 1, width)
    return (model or patcher).model.apply_model(
        latents,
        torch.tensor([0.7]),
        c_crossattn=context,
        num_tokens=context.shape[1],
        transformer_options=dict(options or {}),
    )


# Memory


def test_every_parameter_can_be_offloaded_and_cast(pack, patcher):
    modules = [
        patcher.model.diffusion_model,
        pack.bridge.clip.load_clip(NANO).cond_stage_model,
        pack.bridge.vae.ZImageVAE(NANO).first_stage_model,
    ]
    for module in modules:
        for name, part in module.named_modules():
            own = {parameter for parameter, _ in part.named_parameters(recurse=False)}
            if not hasattr(part, "comfy_cast_weights"):
                assert own <= ROOT_PARAMETERS, f"{name} ({type(part).__name__}) holds {own}"


def test_weights_are_not_copied_when_they_are_loaded(pack):
    """Tensors that need no cast or fusing share the file's mapping; nothing else of the model's size is held."""
    patcher = pack.bridge.model.load_model(NANO)
    anonymous = process_memory.anonymous()
    kept = [pack.bridge.model.load_model(NANO) for _ in range(8)]
    gc.collect()
    size = patcher.model_size()
    fused = sum(p.nbytes for name, p in patcher.model.named_parameters() if name.endswith("qkv.weight"))
    assert process_memory.anonymous() - anonymous < 8 * (fused + 0.35 * size)
    assert len(kept) == 8


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4, 0.1])
def test_partly_loaded_model_predicts_the_same(comfy, patcher, inputs, share):
    comfy.model_management.load_models_gpu([patcher])
    whole = predict(patcher, inputs)
    patcher.detach()
    patcher.load(CPU, lowvram_model_memory=max(1, int(patcher.model_size() * share)))
    if share < 1:
        assert patcher.model.model_lowvram and patcher.loaded_size() < patcher.model_size()
    assert torch.allclose(predict(patcher, inputs), whole, atol=1e-6)
    patcher.detach()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_lora_on_a_partly_loaded_model_and_its_removal(comfy, patcher, inputs, share):
    before = {name: value.clone() for name, value in patcher.model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        if name.endswith(("w2.weight", "out.weight")):
            rows, columns = parameter.shape
            stem = f"diffusion_model.{name.removesuffix('.weight')}"
            lora[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(rows, 2, generator=generator)
            lora[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(2, columns, generator=generator)
    comfy.model_management.load_models_gpu([patcher])
    plain = predict(patcher, inputs)
    with_lora, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    assert len(with_lora.patches) == len(lora) // 2
    comfy.model_management.load_models_gpu([with_lora])
    whole = predict(with_lora, inputs)
    assert relative(whole, plain) > 1e-3
    with_lora.detach()
    with_lora.load(CPU, lowvram_model_memory=max(1, int(patcher.model_size() * share)))
    assert relative(predict(with_lora, inputs), whole) <= 1e-5
    with_lora.detach()
    comfy.model_management.load_models_gpu([patcher])
    assert torch.equal(predict(patcher, inputs), plain)
    after = patcher.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_that_comfyui_leaves_empty_until_they_are_loaded(pack, monkeypatch):
    """With dynamic VRAM ComfyUI's Linear and Embedding are built without weights; ours must fill every one."""
    memory = importlib.import_module("comfy.memory_management")
    if not hasattr(memory, "aimdo_enabled"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    text = "a red circle on a blue background"
    plain = sample(pack, pack.bridge.model.load_model(NANO, torch.float32), conditioning(pack, text))
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    empty = importlib.import_module("comfy.ops").disable_weight_init.Linear(4, 4)
    if empty.weight is not None and not empty.weight.is_meta:
        pytest.skip("this ComfyUI builds its layers with their weights")
    model, vae = pack.bridge.model.load_model(NANO, torch.float32), pack.bridge.vae.ZImageVAE(NANO)
    assert torch.equal(sample(pack, model, conditioning(pack, text)), plain)
    assert torch.isfinite(vae.decode(plain)).all()
    for module in (model.model, vae.first_stage_model):
        assert not any(tensor.is_meta for tensor in module.state_dict().values())


def test_comfyui_can_build_each_model_anew(pack):
    """Nodes that need another copy (compile on a dynamic host, several GPUs) call what cached_patcher_init names."""
    model = pack.bridge.model.load_model(NANO, torch.float32)
    clip = pack.bridge.clip.load_clip(NANO)
    vae = pack.bridge.vae.ZImageVAE(NANO)
    for patcher in (model, clip.patcher, vae.patcher):
        factory, arguments = patcher.cached_patcher_init[:2]
        again = factory(*arguments, disable_dynamic=True)
        ours, theirs = patcher.model.state_dict(), again.model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert (
            again.clone(force_deepcopy=True) if "force_deepcopy" in again.clone.__code__.co_varnames else again.clone()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weight_dtype_is_kept_and_computed_in_float32_on_a_cpu(pack, comfy, inputs, dtype):
    patcher = pack.bridge.model.load_model(NANO, dtype)
    assert {p.dtype for p in patcher.model.diffusion_model.parameters()} == {dtype}
    comfy.model_management.load_models_gpu([patcher])
    exact = pack.bridge.model.load_model(NANO, torch.float32)
    comfy.model_management.load_models_gpu([exact])
    assert relative(predict(patcher, inputs), predict(exact, inputs)) < 1e-3


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sums_fit_half", [False, True])
def test_float16_is_right_where_activations_exceed_it(pack, comfy, inputs, compiled, sums_fit_half):
    """Those of the nano model reach a million. Computed in float16 on a CPU, as elsewhere on a GPU without bfloat16."""
    exact, short = (
        pack.bridge.model.load_model(NANO, torch.float32),
        pack.bridge.model.load_model(NANO, compiled=compiled),
    )
    short.model.diffusion_model.sums_fit_half = sums_fit_half
    short.set_model_compute_dtype(torch.float16)
    comfy.model_management.load_models_gpu([exact, short])
    reference = predict(exact, inputs)
    assert relative(predict(short, inputs), reference) <= (3e-3 if sums_fit_half else 2e-3)


def test_loading_tells_how_float16_is_used(pack, comfy, monkeypatch, caplog):
    mm = comfy.model_management
    monkeypatch.setattr(mm, "unet_manual_cast", lambda *_: torch.float16)  # the device has no bfloat16
    with caplog.at_level("INFO"):
        patcher = pack.bridge.model.load_model(NANO)
    assert patcher.model.diffusion_model.sums_fit_half and patcher.model.manual_cast_dtype == torch.float16
    assert "computes in float16, and adds up what its blocks put out in float16 as well" in caplog.text


# Sameness with ComfyUI's native Z-Image


@pytest.fixture
def native(comfy, patcher):
    return native_model.like(comfy, patcher)


def conditioning(pack, text: str):
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(pack, model, positive, negative=None, **settings):
    settings = {"seed": 3, "steps": 4, "guidance_scale": 0.0, "cfg_normalization": 0.0, **settings}
    node = pack.sampling.ZImageSampler
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    out = node.execute(
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        cfg_truncation=1.0,
        denoise=1.0,
        **settings,
    )
    return out.args[0]["samples"]


def test_network_is_the_native_one(comfy, patcher, native, inputs):
    comfy.model_management.load_models_gpu([patcher, native])
    assert relative(predict(patcher, inputs, native), predict(patcher, inputs)) <= 1e-4


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_our_sampler_and_conditioning_on_the_native_model(pack, patcher, native, guidance):
    positive, negative = conditioning(pack, "a red circle on a blue background"), conditioning(pack, "")
    ours = sample(pack, patcher, positive, negative, guidance_scale=guidance)
    theirs = sample(pack, native, positive, negative, guidance_scale=guidance)
    assert relative(theirs, ours) <= 1e-3


def test_native_text_encoder_gives_the_same_conditioning(pack, comfy, monkeypatch):
    """ComfyUI's Qwen3 with our weights: its features are ours, so each MODEL takes either's CONDITIONING."""
    llama = importlib.import_module("comfy.text_encoders.llama")
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    (ours, extra), *_ = conditioning(pack, "two green stars on a white background")
    config = clip.cond_stage_model.encoder_config
    monkeypatch.setattr(llama.Qwen3_4BConfig, "head_dim", config.head_dim)  # no argument of the native class
    native = llama.Qwen3_4B(
        {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
        },
        torch.float32,
        CPU,
        comfy.ops.disable_weight_init,
    )
    native.load_state_dict(clip.cond_stage_model.encoder.state_dict(), strict=False)
    ids = torch.tensor([[token[0] for token in clip.tokenize("two green stars on a white background")["qwen3_4b"][0]]])
    _, theirs = native(ids, intermediate_output=config.num_hidden_layers - 2, final_layer_norm_intermediate=False)
    assert relative(ours, theirs) <= 1e-4
    assert extra["attention_mask"].shape == ours.shape[:2]


def test_sampler_refuses_a_model_of_another_family(pack, comfy):
    config = comfy.supported_models.SD15({"disable_unet_model_creation": True, "in_channels": 4})
    config.set_inference_dtype(torch.float32, None)
    other = comfy.model_patcher.ModelPatcher(config.get_model({}, ""), CPU, CPU)
    with pytest.raises(ValueError, match="This MODEL is a BaseModel, not a Z-Image model. Connect Load Z-Image"):
        sample(pack, other, conditioning(pack, "a red circle"))
