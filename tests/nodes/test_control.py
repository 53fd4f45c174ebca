"""The ControlNet node: what the core does, in ComfyUI's sampling and memory; and ComfyUI's own control on our MODEL."""

from __future__ import annotations

import importlib
import math
import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_core.pipeline import ZImagePipeline
from zimage_core.sampling.control import Control

from .. import quantizing
from ..helpers import NANO, relative
from . import test_model

patcher = test_model.patcher
native = test_model.native
inputs = test_model.inputs

PROMPT, NEGATIVE = "a red circle on a blue background", "a green square in the corner"
SIZE = 64
STEPS = 3


@pytest.fixture(scope="module")
def parts(pack) -> SimpleNamespace:
    clip = pack.bridge.clip.load_clip(NANO, torch.float32)
    model, vae = pack.bridge.model.load_model(NANO, torch.float32), pack.bridge.vae.ZImageVAE(NANO)
    encode = pack.bridge.clip.encode
    return SimpleNamespace(model=model, vae=vae, positive=encode(clip, PROMPT), negative=encode(clip, NEGATIVE))


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(NANO)


@pytest.fixture
def file(pack, control_file, tmp_path, monkeypatch) -> str:
    """A control file as users have it, by its name in the list."""
    folder_paths = importlib.import_module("folder_paths")
    before = list(folder_paths.get_folder_paths("model_patches"))
    (tmp_path / "patches").mkdir()
    shutil.copy(control_file, tmp_path / "patches" / "lines.safetensors")
    folder_paths.add_model_folder_path("model_patches", str(tmp_path / "patches"))
    yield "lines.safetensors"
    folder_paths.folder_names_and_paths["model_patches"][0][:] = before


def drawn(batch: int = 1, height: int = SIZE, width: int = SIZE) -> Tensor:
    """Images [B, H, W, 3]."""
    make = torch.Generator().manual_seed(4)
    return torch.rand(batch, height, width, 3, generator=make)


def box() -> Tensor:
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 16:48, 24:64] = 1
    return mask


@pytest.fixture
def steer(pack, parts, file):
    """The MODEL with the node on it; keyword arguments replace its inputs."""

    def run(model: Any = None, **given: Any) -> Any:
        defaults = {"strength": 0.8, "start": 0.0, "end": 1.0, "image": drawn()}
        call = pack.control.ZImageControlNet.execute
        return call(model or parts.model, parts.vae, file, **{**defaults, **given}).args[0]

    return run


@pytest.fixture
def sample(pack, parts):
    """Scaled latents by our sampler node."""

    def run(model: Any, guidance: float = 0.0, batch: int = 1, positive: Any = None, size: int = SIZE) -> Tensor:
        latents = {"samples": torch.zeros(batch, 16, size // 8, size // 8)}
        node, given = pack.sampling.ZImageSampler.execute, (positive or parts.positive, latents, 3, STEPS, guidance)
        (out,) = node(model, *given, 0.0, 1.0, 1.0, negative=parts.negative).args
        return parts.model.model.latent_format.process_in(out["samples"])

    return run


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"guidance": 2.0},
        {"start": 0.3, "end": 0.7, "guidance": 2.0},
        {"repaint": True},
        {"repaint": True, "image": None},
        {"image": drawn(2), "batch": 2},
        {"image": drawn(height=48, width=100)},
    ],
    ids=str,
)
def test_what_the_core_does(steer, sample, pipe, control_file, given):
    given = dict(given)
    guidance, batch, repaint = given.pop("guidance", 0.0), given.pop("batch", 1), given.pop("repaint", False)
    pair = {"inpaint_image": drawn().flip(1), "mask": box()} if repaint else {}
    ours = sample(steer(**given, **pair), guidance, batch)
    image = given.get("image", drawn())
    control = Control(
        control_file,
        None if image is None else image.movedim(-1, 1),
        0.8,
        given.get("start", 0.0),
        given.get("end", 1.0),
        box().unsqueeze(1) if repaint else None,
        drawn().flip(1).movedim(-1, 1) if repaint else None,
    )
    settings = {"width": SIZE, "height": SIZE, "steps": STEPS, "seed": 3, "guidance_scale": guidance}
    settings |= {"batch_size": batch, "output": "latents"}
    core = pipe.generate(PROMPT, NEGATIVE, control=[control], **settings)
    assert relative(ours, core) <= 1e-5
    assert relative(core, pipe.generate(PROMPT, NEGATIVE, **settings)) > 0.02


def test_several_in_a_row_add_up(steer, sample, pipe, control_file):
    both = steer(steer(), image=drawn().flip(1), strength=0.5)
    images = [drawn().movedim(-1, 1), drawn().flip(1).movedim(-1, 1)]
    control = [Control(control_file, image, strength) for image, strength in zip(images, (0.8, 0.5), strict=True)]
    settings = {"width": SIZE, "height": SIZE, "steps": STEPS, "seed": 3, "output": "latents"}
    assert relative(sample(both), pipe.generate(PROMPT, control=control, **settings)) <= 1e-5


def test_no_strength_is_none(steer, sample, parts):
    assert torch.equal(sample(steer(strength=0.0)), sample(parts.model))


def test_stock_samplers_are_steered_as_well(steer, sample, parts):
    nodes = importlib.import_module("nodes")
    latents = {"samples": torch.zeros(1, 16, SIZE // 8, SIZE // 8)}
    given = (3, STEPS, 3.0, "euler", "simple", parts.positive, parts.negative, latents)
    (out,) = nodes.KSampler().sample(steer(), *given)
    stock = parts.model.model.latent_format.process_in(out["samples"])
    assert relative(stock, sample(steer(), 2.0)) <= 0.02  # the stock schedule is off by a thousandth at three steps


def test_the_negative_prompt_may_be_left_alone(steer, sample):
    both, alone = sample(steer(), 2.0), sample(steer(on_negative=False), 2.0)
    assert relative(alone, both) > 0.01
    assert torch.equal(sample(steer(on_negative=False)), sample(steer()))  # without guidance there is none


def count_refined(model: Any) -> list[int]:
    """Fills up with how many items the network's refiner sees at a time."""
    seen: list[int] = []
    patch = model.model_options["transformer_options"]["patches"]["zimage_control"][0]
    first = patch.model_patch.model.noise_refiner[0]
    first._forward_pre_hooks.clear()
    first.register_forward_pre_hook(lambda _block, given: seen.append(len(given[0])))
    return seen


def test_both_halves_of_guidance_share_the_refiner(steer, sample, pack, comfy, monkeypatch):
    steered = steer()
    seen = count_refined(steered)
    together = sample(steered, 2.0, batch=2)
    assert seen == [2] * STEPS
    seen.clear()
    # where memory is short, ComfyUI runs them one after the other
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_args, **_more: 1)
    apart = sample(steered, 2.0, batch=2)
    assert seen == [2] * STEPS
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-4)
    seen.clear()

    def tiles(apply, arguments):  # as nodes do that cut latents up
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    wrapped = steered.clone()
    wrapped.set_model_unet_function_wrapper(tiles)
    torch.testing.assert_close(sample(wrapped, 2.0, batch=2), together, rtol=0, atol=1e-4)
    assert sum(seen) == 4 * STEPS  # what they see may differ, so each has its own


def test_prompts_for_areas(steer, sample, parts):
    """Their latents are parts of the image: nothing is shared between them."""
    nodes = importlib.import_module("nodes")
    (left,) = nodes.ConditioningSetArea().append(parts.positive, SIZE // 2, SIZE, 0, 0, 1.0)
    (right,) = nodes.ConditioningSetArea().append(parts.negative, SIZE // 2, SIZE, SIZE // 2, 0, 1.0)
    steered = steer()
    seen = count_refined(steered)
    assert sample(steered, positive=left + right).isfinite().all()
    assert sum(seen) == 2 * STEPS


def test_it_is_encoded_before_sampling_begins_and_once(steer, sample, parts, comfy, monkeypatch):
    """And the memory manager loads the network beside the MODEL."""
    management, helpers = comfy.model_management, importlib.import_module("comfy.sampler_helpers")
    events: list[str] = []
    encode, prepare = parts.vae.encode, helpers._prepare_sampling

    def encoding(pixels):
        events.append("encode")
        return encode(pixels)

    def preparing(*args, **more):
        events.append("prepare")
        return prepare(*args, **more)

    monkeypatch.setattr(parts.vae, "encode", encoding)
    monkeypatch.setattr(helpers, "_prepare_sampling", preparing)
    management.unload_all_models()
    steered = steer(image=drawn(height=48, width=100))
    sample(steered)
    sample(steered)
    assert events == ["encode", "prepare", "prepare"]
    (patch,) = steered.model_options["transformer_options"]["patches"]["zimage_control"]
    loaded = [model.model for model in management.loaded_models()]
    assert patch.model_patch.model in loaded and parts.model.model in loaded


def test_a_network_is_loaded_once_for_all_strengths(steer):
    def network(model):
        return model.model_options["transformer_options"]["patches"]["zimage_control"][0].model_patch

    assert network(steer()) is network(steer(strength=0.3))


def test_it_steers_tile_by_tile(steer, sample, parts):
    """As Ultimate SD Upscale does it: the image is cut, the patch made anew by ComfyUI's arguments, and put back."""
    image = drawn(height=2 * SIZE, width=2 * SIZE)
    steered = steer(image=image, start=0.0, end=0.7)
    (patch,) = steered.model_options["transformer_options"]["patches"]["zimage_control"]
    assert type(patch).__name__ == "ZImageControlPatch"
    before = patch.image.clone(), patch.encoded_image.clone(), patch.encoded_image_size
    for top in (0, SIZE):
        tile = image[:, top : top + SIZE, SIZE:]
        patch.image, patch.encoded_image_size = tile, tile.shape[1:3]
        again = {"inpaint_image": patch.inpaint_image, "mask": patch.mask}
        patch.__init__(patch.model_patch, patch.vae, tile, patch.strength, **again)
        assert torch.equal(sample(steered), sample(steer(image=tile, end=0.7)))
    patch.image, patch.encoded_image, patch.encoded_image_size = before
    assert torch.equal(sample(steered, size=2 * SIZE), sample(steer(image=image, end=0.7), size=2 * SIZE))


@pytest.mark.slow
def test_compiled(pack, steer, sample):
    model = pack.bridge.model.load_model(NANO, torch.float32, compiled=True)
    assert relative(sample(steer(model), 2.0), sample(steer(), 2.0)) <= 1e-4


def test_with_lora_and_half_of_it_elsewhere(pack, parts, steer, sample, comfy):
    """A LoRA on the MODEL, and weights of the network that stay behind when memory is short."""
    (styled, *_) = pack.lora.ZImageLoraLoader.execute(parts.model, pack.bridge.folders.NANO_LORA, 1.0).args
    assert relative(sample(steer(styled)), sample(steer())) > 1e-3
    steered = steer()
    whole = sample(steered)
    patch = steered.model_options["transformer_options"]["patches"]["zimage_control"][0]
    patch.model_patch.partially_unload(torch.device("cpu"), patch.model_patch.model_size() // 2)
    assert torch.equal(sample(steered), whole)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", ["alone", "marked", "old"])
def test_fp8_files(pack, file, steer, sample, tmp_path, layout):
    """Stored in 8 bits, with and without scales; what they mean is what steers."""
    path = tmp_path / "patches" / file
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    apart = {name.removeprefix("control_"): value for name, value in load_file(path).items()}
    plain = {name: value for name, value in apart.items() if not re.search(r"\.to_[qkv]\.", name)}
    for name in apart:  # stacked, as most tools that quantize have them
        if ".to_q." in name:
            rows = [apart[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            plain[name.replace("to_q", "qkv")] = torch.cat(rows)
    stored, meant = quantizing.quantize(plain, layout, torch.float8_e4m3fn)
    found = []
    for tensors in (stored, {name: value.float() for name, value in meant.items()}):
        named = {name if name == "scaled_fp8" else f"control_{name}": value for name, value in tensors.items()}
        save_file(named, path, metadata=metadata)
        found.append(sample(steer()))
    assert torch.float8_e4m3fn in {value.dtype for value in stored.values()}
    assert relative(found[0], found[1]) <= 1e-5


def test_files_are_listed_by_name_ours_first(pack, file, tmp_path):
    shutil.copy(NANO / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "patches" / "another.safetensors")
    folders = pack.bridge.folders
    assert folders.control_choices() == [file, folders.NANO_CONTROL, "another.safetensors"]
    assert folders.control_path(file) == tmp_path / "patches" / file
    with pytest.raises(FileNotFoundError, match="There is no control network 'gone' in models/model_patches"):
        folders.control_path("gone")


@pytest.mark.parametrize(
    "given, words",
    [
        ({"image": None}, "needs a control image"),
        ({"mask": box()}, "`mask` is connected and `inpaint_image` is not"),
        ({"inpaint_image": drawn()}, "`inpaint_image` is connected and `mask` is not"),
        ({"inpaint_image": drawn(), "mask": torch.zeros(1, 32, 32)}, "`mask` is 32x32 and `inpaint_image` 64x64"),
        ({"start": 0.5, "end": 0.5}, "acts from 0.5 to 0.5"),
        ({"strength": math.nan}, "`strength` is nan"),
        ({"image": drawn() * math.nan}, "`image` holds NaN"),
        ({"image": torch.zeros(1, 64, 64)}, r"`image` has the shape \[1, 64, 64\]"),
    ],
)
def test_bad_input_is_named(steer, sample, parts, given, words):
    with pytest.raises(ValueError, match=words):
        steer(**given)
    assert sample(parts.model).isfinite().all()


def test_a_batch_of_another_size_is_named(steer, sample):
    with pytest.raises(ValueError, match="The control image is a batch of 3, for 2 images"):
        sample(steer(image=drawn(3)), batch=2)


def test_another_network_than_ours_is_named(pack, parts, file, native):
    with pytest.raises(ValueError, match="network is a NextDiT; control needs the one of Load Z-Image Transformer"):
        pack.control.ZImageControlNet.execute(native, parts.vae, file, 0.8, 0.0, 1.0, image=drawn())


@pytest.mark.parametrize("layers", [6, 15])
def test_stock_control_nodes_do_what_they_do_natively(pack, comfy, patcher, native, inputs, layers):
    """ZImageFunControlnet and QwenImageDiffsynthControlnet, with a network that ComfyUI made."""
    stock = importlib.import_module("comfy_extras.nodes_model_patch")
    lumina = importlib.import_module("comfy.ldm.lumina.controlnet")
    config = patcher.model.diffusion_model.config
    more = {"additional_in_dim": 17, "refiner_control": True} if layers == 15 else {}
    sizes = {"dim": config.dim, "n_heads": config.n_heads, "n_kv_heads": config.n_heads, "n_control_layers": layers}
    network = lumina.ZImage_Control(**sizes, **more, dtype=torch.float32, operations=comfy.ops.manual_cast)
    make = torch.Generator().manual_seed(1)

    def linear(width_in: int, width_out: int, bias: bool = False) -> Any:
        made = comfy.ops.manual_cast.Linear(width_in, width_out, bias=bias, dtype=torch.float32)
        made.weight.data = torch.randn(made.weight.shape, generator=make) * width_in**-0.5
        if bias:
            made.bias.data.zero_()
        return made

    for name, weight in network.named_parameters():
        draw = torch.randn(weight.shape, generator=make)
        weight.data = 1 + 0.1 * draw if "norm" in name else draw * weight.shape[-1] ** -0.5
    for block in [*network.control_layers, *network.control_noise_refiner]:  # widths that ComfyUI derives from `dim`
        block.feed_forward.w1, block.feed_forward.w3 = (linear(config.dim, config.ffn_dim) for _ in "13")
        block.feed_forward.w2 = linear(config.ffn_dim, config.dim)
        block.adaLN_modulation[0] = linear(config.adaln_dim, 4 * config.dim, bias=True)
    cpu = torch.device("cpu")
    model_patch = comfy.model_patcher.ModelPatcher(network.requires_grad_(False), cpu, cpu)
    image = drawn(height=inputs[0].shape[-2] * 8, width=inputs[0].shape[-1] * 8)
    comfy.model_management.load_models_gpu([patcher, native])
    found = []
    for model in (patcher, native):
        (steered,) = stock.ZImageFunControlnet().diffsynth_controlnet(
            model, model_patch, pack.bridge.vae.ZImageVAE(NANO), image=image, strength=0.7
        )
        found.append(test_model.predict(patcher, inputs, steered, steered.model_options["transformer_options"]))
    assert relative(found[0], found[1]) <= 1e-4
    assert relative(found[0], test_model.predict(patcher, inputs)) > 1e-3
