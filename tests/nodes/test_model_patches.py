"""Patches of other nodes do to our MODEL what they do to ComfyUI's own."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..helpers import NANO, relative
from . import test_model
from .test_model import conditioning, predict, sample

inputs = test_model.inputs
native = test_model.native
patcher = test_model.patcher


def test_patches_are_called_as_the_native_model_calls_them(comfy, patcher, native, inputs):
    """Same calls in the same order with the same shapes; what they write takes effect."""
    comfy.model_management.load_models_gpu([patcher, native])

    def trace(model):
        calls = []

        def patch(arguments):
            shapes = {key: tuple(arguments[key].shape) for key in ("img", "img_input", "txt", "vec", "x")}
            pe = tuple(arguments["pe"].shape[-3:])
            calls.append((arguments.get("block_type"), arguments["block_index"], shapes, pe))
            arguments["img"] += 0.05  # in place, as stock ControlNet patches do
            return {"img": arguments["img"]}

        patched = model.clone()
        patched.set_model_patch(patch, "noise_refiner")
        patched.set_model_double_block_patch(patch)
        return calls, predict(patcher, inputs, patched, patched.model_options["transformer_options"])

    ours, moved = trace(patcher)
    theirs, native_moved = trace(native)
    assert ours == theirs and len(ours) > 2
    assert relative(moved, predict(patcher, inputs)) > 1e-3
    assert relative(native_moved, moved) <= 1e-3


PLACES = ["attention", "feed_forward", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"]
PLACES += ["attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_object_patches_inside_blocks_do_what_they_do_natively(comfy, patcher, native, inputs, compiled, monkeypatch):
    comfy.model_management.load_models_gpu([patcher, native])
    monkeypatch.setattr(patcher.model.diffusion_model, "compiled", compiled)
    plain = predict(patcher, inputs)
    for place in PLACES:
        found = []
        for model in (patcher, native):
            patched = model.clone()
            for index in range(len(patched.model.diffusion_model.layers)):
                key = f"diffusion_model.layers.{index}.{place}.forward"
                forward = patched.get_model_object(key)
                patched.add_object_patch(key, lambda *given, _as=forward, **more: _as(*given, **more).roll(1, -1))
            patched.patch_model()
            found.append(predict(patcher, inputs, patched))
            patched.unpatch_model()
        assert relative(found[0], found[1]) <= 1e-4, place
        assert relative(found[0], plain) > 1e-3, place
    assert torch.equal(predict(patcher, inputs), plain)


def test_weights_that_are_patched_on_the_way_are_the_native_ones(comfy, patcher, native, inputs):
    """As ComfyUI patches those that stay behind when memory is short, and those of norms as well."""
    comfy.model_management.load_models_gpu([patcher, native])
    plain = predict(patcher, inputs)
    for place in (*PLACES[2:], "attention.q_norm", "attention.k_norm"):
        found = []
        for model in (patcher, native):
            layers = [block.get_submodule(place) for block in model.model.diffusion_model.layers]
            for layer in layers:
                layer.weight_function = [lambda weight: weight.roll(1, -1)]
            found.append(predict(patcher, inputs, model))
            for layer in layers:
                layer.weight_function = []
        assert relative(found[0], found[1]) <= 1e-4, place
        assert relative(found[0], plain) > 1e-3, place


def test_what_others_put_into_the_context_refiner_is_called_at_every_step(pack, comfy, patcher):
    text, calls = conditioning(pack, "a red circle on a blue background"), []
    patched = patcher.clone()
    key = "diffusion_model.context_refiner.0.attention_norm1.forward"
    forward = patched.get_model_object(key)

    def counted(*given):
        calls.append(given[0].shape)
        return forward(*given)

    patched.add_object_patch(key, counted)
    found = sample(pack, patched, text)
    assert len(calls) == 4
    assert relative(found, sample(pack, patcher, text)) <= 1e-5


def test_attention_of_other_nodes_is_used(comfy, patcher, inputs):
    comfy.model_management.load_models_gpu([patcher])
    seen = []

    def override(function, *args, **kwargs):
        seen.append(args[0].shape)
        return function(*args, **kwargs)

    plain = predict(patcher, inputs)
    overridden = predict(patcher, inputs, options={"optimized_attention_override": override})
    config = patcher.model.diffusion_model.config
    assert len(seen) == config.n_layers + 2 * config.n_refiner_layers
    assert relative(overridden, plain) <= 1e-6


def test_attention_of_other_nodes_finds_tokens_in_the_native_order(comfy, patcher, native, inputs):
    """Captions first, in every block: what reads the place of a token does what it does natively."""
    comfy.model_management.load_models_gpu([patcher, native])
    latents, context = inputs
    wide = torch.cat((latents, latents.flip(-1)), dim=-1)[:, :, :-1], context

    def louder_captions(function, q, k, v, *args, **kwargs):
        v = v.clone()
        v[:, :, : context.shape[1]] *= 1.5
        q = torch.cat((q[:, :, :3].roll(1, 2), q[:, :, 3:]), dim=2)
        return function(q, k, v, *args, **kwargs)

    options = {"optimized_attention_override": louder_captions}
    ours = predict(patcher, wide, options=options)
    assert relative(ours, predict(patcher, wide)) > 1e-3
    assert relative(predict(patcher, wide, native, options), ours) <= 1e-5


def test_rotations_of_other_nodes_are_used(comfy, patcher, native, inputs):
    """Those that stretch positions by putting their own module at `rope_embedder`."""
    comfy.model_management.load_models_gpu([patcher, native])
    embedder = type(native.model.diffusion_model.rope_embedder)
    found = []
    for model in (patcher, native):
        own = model.get_model_object("diffusion_model.rope_embedder")
        assert (own.theta, own.axes_dim) == (256.0, [16, 16, 16])
        model.model.diffusion_model.rope_embedder = embedder(own.dim, 1000.0, own.axes_dim)
        found.append(predict(patcher, inputs, model))
        model.model.diffusion_model.rope_embedder = own
    assert relative(*found) <= 1e-5
    assert relative(found[0], predict(patcher, inputs)) > 1e-3


# what packs read, beside the weights
ATTRIBUTES = "in_channels out_channels patch_size dim n_heads axes_dims axes_lens time_scale pad_tokens_multiple"
NOTHING = "siglip_embedder siglip_refiner siglip_pad_token clip_text_pooled_proj"


def test_the_network_has_the_attributes_of_the_native_one(patcher, native):
    ours, theirs = patcher.model.diffusion_model, native.model.diffusion_model
    for name in ATTRIBUTES.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert all(getattr(ours, name) is None for name in NOTHING.split())
    assert "NextDiT" in type(ours).__name__
    needed = theirs_config = native.model.model_config.unet_config
    assert {name: patcher.model.model_config.unet_config.get(name) for name in needed} == theirs_config
    for name in ("dim", "head_dim", "modulation"):
        assert getattr(ours.layers[0], name) == getattr(theirs.layers[0], name), name
    for name in ("n_local_heads", "n_local_kv_heads", "n_kv_heads", "n_rep", "head_dim", "qk_norm"):
        assert getattr(ours.layers[0].attention, name) == getattr(theirs.layers[0].attention, name), name


def test_parameters_and_modules_come_in_the_native_order(patcher, native):
    """In which training draws its random numbers."""
    ours, theirs = patcher.model.diffusion_model, native.model.diffusion_model
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    kinds = [
        [name for name, part in network.named_modules() if list(part.parameters(recurse=False))]
        for network in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]


def test_options_and_wrappers_are_what_nodes_find_on_the_native_model(comfy, patcher, native, inputs):
    """Attention overrides read the place in the model from the options; wrappers get the native call's arguments."""
    comfy.model_management.load_models_gpu([patcher, native])
    extension = importlib.import_module("comfy.patcher_extension")

    def trace(model):
        places, calls = [], []

        def override(function, *args, **kwargs):
            options = kwargs["transformer_options"]
            places.append([options.get(key) for key in ("block_type", "block_index", "total_blocks")])
            return function(*args, **kwargs)

        def wrapper(executor, *args, **kwargs):
            calls.append([getattr(value, "shape", value) for value in args])
            return 2 * executor(*args, **kwargs)

        wrapped = model.clone()
        kind = extension.WrappersMP.DIFFUSION_MODEL
        wrapped.add_wrapper(kind, wrapper)
        wrapped.model_options["transformer_options"]["optimized_attention_override"] = override
        options = {**wrapped.model_options["transformer_options"], "wrappers": wrapped.wrappers}
        return places, calls, predict(patcher, inputs, wrapped, options)

    *ours, doubled = trace(patcher)
    *theirs, native_doubled = trace(native)
    assert ours == theirs and len(ours[1]) == 1
    layers = patcher.model.diffusion_model.config.n_layers
    assert ours[0][-layers:] == [["double", index, layers] for index in range(layers)]
    assert relative(native_doubled, doubled) <= 1e-4
    assert relative(doubled, predict(patcher, inputs)) > 0.1


def test_stretched_positions_are_the_native_ones(comfy, patcher, native, inputs):
    """RopeOptions of other nodes: the same stretch and shift of the image grid."""
    comfy.model_management.load_models_gpu([patcher, native])
    options = {"rope_options": {"scale_x": 1.5, "scale_y": 0.5, "shift_x": 3.0, "shift_y": -2.0}}
    ours = predict(patcher, inputs, options=options)
    assert relative(ours, predict(patcher, inputs)) > 1e-3
    assert relative(predict(patcher, inputs, native, options), ours) <= 1e-4


def test_odd_cells_are_padded_as_natively(comfy, patcher, native, inputs):
    comfy.model_management.load_models_gpu([patcher, native])
    latents, context = inputs
    odd = latents[:, :, :13, :9], context
    ours = predict(patcher, odd)
    assert ours.shape == odd[0].shape
    assert relative(predict(patcher, odd, native), ours) <= 1e-4


def test_loading_says_nothing_alarming(pack, caplog):
    with caplog.at_level(logging.INFO):
        pack.bridge.model.load_model(NANO)
        pack.bridge.vae.ZImageVAE(NANO)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# fp8


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_files(pack, tmp_path, scaled):
    """The weights stay in fp8 and are cast layer by layer; of a fused weight whose parts have scales, only then not."""
    (weights,) = (NANO / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    for name in [name for name in tensors if ".feed_forward." in name or ".attention.to_" in name]:
        scale = tensors[name].float().abs().max() / 448 if scaled else torch.tensor(1.0)
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        if scaled:
            tensors[name.removesuffix(".weight") + ".scale_weight"] = scale
    config = {"zimage.transformer.config": (NANO / "transformer" / "config.json").read_text()}
    save_file(tensors, tmp_path / "fp8.safetensors", config)
    patcher = pack.bridge.model.load_model(tmp_path / "fp8.safetensors")
    kept = patcher.model.diffusion_model.state_dict()
    stored = kept["layers.0.feed_forward.w1.weight"].dtype
    assert stored == torch.float8_e4m3fn
    assert kept["layers.0.attention.qkv.weight"].dtype == (torch.float32 if scaled else torch.float8_e4m3fn)
    assert kept["layers.0.attention_norm1.weight"].dtype == torch.bfloat16
    text = conditioning(pack, "a red circle on a blue background")
    whole = sample(pack, pack.bridge.model.load_model(NANO, torch.float32), text)
    assert relative(sample(pack, patcher, text), whole) < 0.2
