"""Single files of every published shape give the weights of the snapshot; files of other models are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_core.errors import CheckpointError
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights.snapshot import Snapshot, open_component, open_tokenizer, schedule_of, snapshot_folder
from zimage_core.weights.specs import SPECS

from .helpers import NANO, PUBLISHED

KINDS = ("transformer", "text_encoder", "vae")


def metadata(*kinds: str) -> dict[str, str]:
    """The nano model is of no published size, so its files carry their configs."""
    return {f"zimage.{kind}.config": (NANO / kind / "config.json").read_text() for kind in kinds}


def diffusers(kind: str) -> dict[str, Tensor]:
    (path,) = (NANO / kind).glob("*.safetensors")
    return load_file(path)


def native(kind: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in Snapshot(NANO).component(kind).build().state_dict().items()}


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def same(kind: str, path: Path) -> None:
    expected = Snapshot(NANO).component(kind).build().state_dict()
    found = open_component(path, kind).build().state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", [native, diffusers])
@pytest.mark.parametrize("kind, prefix", [(kind, prefix) for kind in KINDS for prefix in SPECS[kind].prefixes])
def test_each_layout_and_prefix(tmp_path, kind, layout, prefix):
    save_file(with_prefix(prefix, layout(kind)), tmp_path / "m.safetensors", metadata(kind))
    same(kind, tmp_path / "m.safetensors")


def test_pad_tokens_without_batch_and_leftovers(tmp_path):
    tensors = native("transformer")
    for name in ("x_pad_token", "cap_pad_token"):
        tensors[name] = tensors[name][0].clone()
    tensors["norm_final.weight"] = torch.ones(192)
    save_file(tensors, tmp_path / "m.safetensors", metadata("transformer"))
    same("transformer", tmp_path / "m.safetensors")


def test_text_encoder_with_an_explicit_head_and_without_what_is_unused(tmp_path):
    tensors = {key: value for key, value in diffusers("text_encoder").items() if not key.startswith("model.layers.3.")}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "m.safetensors", metadata("text_encoder"))
    same("text_encoder", tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_files_dtype_is_kept(tmp_path, dtype):
    save_file(
        {key: value.to(dtype) for key, value in diffusers("text_encoder").items()},
        tmp_path / "m.safetensors",
        metadata("text_encoder"),
    )
    component = open_component(tmp_path / "m.safetensors", "text_encoder")
    assert component.dtype() == dtype
    assert {parameter.dtype for parameter in component.build().parameters()} == {dtype}


def test_all_in_one(tmp_path):
    tensors = {
        **with_prefix("model.diffusion_model.", native("transformer")),
        **with_prefix("text_encoders.qwen3_4b.transformer.", native("text_encoder")),
        **with_prefix("vae.", native("vae")),
    }
    save_file(tensors, tmp_path / "aio.safetensors", metadata(*KINDS))
    for kind in KINDS:
        same(kind, tmp_path / "aio.safetensors")


def cached(root: Path, *revisions: str) -> Path:
    """The nano model as a Hugging Face cache holds it: links to blobs, which have no suffix."""
    folder = root / "models--Org--Name"
    for revision in revisions:
        for number, path in enumerate(path for path in NANO.rglob("*") if path.is_file()):
            link = folder / "snapshots" / revision / path.relative_to(NANO)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = folder / "blobs" / f"{number:040x}"
            blob.parent.mkdir(exist_ok=True)
            if not blob.exists():
                blob.write_bytes(path.read_bytes())
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def test_a_hugging_face_cache(tmp_path):
    folder = cached(tmp_path, "aaaa", "bbbb")
    with pytest.raises(CheckpointError, match=r"expected one revision, found aaaa, bbbb;.*snapshots\)$"):
        open_component(folder, "vae")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbbb\n")
    assert snapshot_folder(folder) == folder / "snapshots" / "bbbb"
    for kind in KINDS:
        same(kind, folder)
    assert open_tokenizer(folder)("a") == open_tokenizer(NANO)("a")


def test_a_storage_folder_with_one_revision(tmp_path):
    folder = cached(tmp_path, "main").rename(tmp_path / "Org--Name")
    same("vae", folder)


def test_a_pipeline_of_single_files_draws_the_same_image(tmp_path):
    settings = {"width": 64, "height": 64, "steps": 2, "seed": 3}
    expected = ZImagePipeline.from_pretrained(NANO).generate("a red circle", **settings)
    for kind in KINDS:
        save_file(native(kind), tmp_path / f"{kind}.safetensors", metadata(kind))
    files = {kind: tmp_path / f"{kind}.safetensors" for kind in KINDS}
    pipe = ZImagePipeline.from_pretrained(None, **files, tokenizer=NANO)
    assert torch.equal(pipe.generate("a red circle", **settings), expected)
    mixed = ZImagePipeline.from_pretrained(NANO, transformer=files["transformer"], tokenizer=NANO / "tokenizer")
    assert torch.equal(mixed.generate("a red circle", **settings), expected)
    with pytest.raises(CheckpointError, match="no model given for text_encoder and vae"):
        ZImagePipeline.from_pretrained(None, transformer=files["transformer"])


def test_one_unknown_key_is_an_error_that_names_it(tmp_path):
    save_file({**native("vae"), "decoder.extra.weight": torch.ones(1)}, tmp_path / "m.safetensors", metadata("vae"))
    with pytest.raises(CheckpointError, match=r"unknown decoder\.extra\.weight.*m\.safetensors\)$"):
        open_component(tmp_path / "m.safetensors", "vae").build()


def test_a_single_file_has_turbos_schedule_and_no_tokenizer(tmp_path):
    save_file(native("vae"), tmp_path / "m.safetensors", metadata("vae"))
    assert schedule_of(tmp_path / "m.safetensors").shift == 3.0
    with pytest.raises(CheckpointError, match=r"a single file holds no tokenizer; name a snapshot.*m\.safetensors\)$"):
        open_tokenizer(tmp_path / "m.safetensors")
    assert schedule_of(NANO / "transformer") == schedule_of(NANO)


def test_one_folder_of_a_snapshot_is_enough(tmp_path):
    expected = Snapshot(NANO).vae().state_dict()
    found = open_component(NANO / "vae", "vae").build().state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(CheckpointError, match="this is the vae of a snapshot, expected its transformer"):
        open_component(NANO / "vae", "transformer")


# Published sizes: the numbers that a file's shapes give are those of the published config.json


def published_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    spec = SPECS[kind]
    model = spec.network(spec.config.from_dict(PUBLISHED[kind], "config.json"), device="meta")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_give_the_published_config(kind):
    expected = SPECS[kind].config.from_dict(PUBLISHED[kind], "config.json")
    shapes = published_shapes(kind)
    assert SPECS[kind].config_of(shapes, {}, "m.safetensors", lambda key: torch.zeros(shapes[key])) == expected


# Files of other models


def refusal(tmp_path: Path, kind: str, tensors: dict[str, tuple[int, ...]]) -> str:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, path)
    with pytest.raises(CheckpointError) as error:
        open_component(path, kind)
    message = str(error.value)
    assert message.endswith(f" ({path})")
    return message


@pytest.mark.parametrize(
    "keys, words",
    [
        (["diffusion_model.layers.0.attention.qkv.lora_A.weight"], ("a LoRA", "LoRA loader")),
        (["lora_unet_layers_0_attention_qkv.lora_down.weight"], ("a LoRA",)),
        (["control_all_x_embedder.2-1.weight", "control_layers.0.after_proj.weight"], ("control network", "loader")),
        (["layers.0.attention.to_q.qweight", "layers.0.attention.to_q.wscales"], ("nunchaku",)),
        (["layers.0.w.weight.quant_state.bitsandbytes__nf4"], ("bitsandbytes",)),
        (["x_embedder.weight", "dec_net.cond_embed.weight"], ("pixel-space",)),
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], ("Flux",)),
        (["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"], ("Flux",)),
        (["transformer_blocks.0.img_mod.1.weight", "transformer_blocks.0.txt_mod.1.weight"], ("Qwen-Image",)),
        (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"], ("Stable Diffusion 3",)),
        (["blocks.0.cross_attn.norm_k.weight", "patch_embedding.weight"], ("Wan",)),
        (["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"], ("SDXL",)),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.output_blocks.0.0.weight"],
            ("Stable Diffusion 1 or 2",),
        ),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], ("CLIP", "Qwen3-4B")),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], ("T5", "Qwen3-4B")),
        (["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"], ("Qwen2.5", "Qwen3-4B")),
        (["nonsense.weight"], ("neither", "nonsense.weight")),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_models_are_named(tmp_path, kind, keys, words):
    message = refusal(tmp_path, kind, dict.fromkeys(keys, (1,)))
    for word in (*words, "Z-Image" if kind == "transformer" else SPECS[kind].noun):
        assert word in message


@pytest.mark.parametrize(
    "keys, name",
    [
        (("qweight", "wscales", "smooth_factor"), "nunchaku (SVDQuant)"),
        (("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
        (("weight", "scale", "zero_point", "svd_up", "svd_down"), "SDNQ"),
        (("weight", "scales", "biases"), "MLX"),
        (("qweight", "qzeros", "scales"), "GPTQ or AWQ"),
    ],
)
def test_families_that_are_not_supported_are_named(tmp_path, keys, name):
    """In a file that is Z-Image's otherwise."""
    tensors = {key: tuple(value.shape) for key, value in native("transformer").items() if ".qkv." not in key}
    tensors |= {f"layers.{layer}.attention.to_{x}.{key}": (1,) for layer in range(2) for x in "qkv" for key in keys}
    message = refusal(tmp_path, "transformer", tensors)
    assert f"quantized by {name}" in message and "load the bf16 or fp16 version of the same model instead" in message


def test_one_of_our_components_in_the_wrong_loader(tmp_path):
    save_file(native("vae"), tmp_path / "m.safetensors", metadata("vae"))
    with pytest.raises(CheckpointError, match=r"is an AutoencoderKL \(VAE\), not a Z-Image transformer; choose it"):
        open_component(tmp_path / "m.safetensors", "transformer")


def test_lumina_is_told_from_z_image_by_its_width(tmp_path):
    shapes = {
        "x_embedder.weight": (2304, 64),
        "layers.0.attention.q_norm.weight": (96,),
        "cap_embedder.0.weight": (2304,),
        "cap_embedder.1.weight": (2304, 2304),
    }
    assert "Lumina 2" in refusal(tmp_path, "transformer", shapes)


@pytest.mark.parametrize(
    "width, layers, name", [(1024, 28, "Qwen3-0.6B"), (4096, 36, "Qwen3-8B"), (2560, 40, "40 layers")]
)
def test_text_encoders_of_other_sizes(tmp_path, width, layers, name):
    shapes = {"model.embed_tokens.weight": (8, width)}
    shapes |= {f"model.layers.{layer}.self_attn.q_norm.weight": (128,) for layer in range(layers)}
    message = refusal(tmp_path, "text_encoder", shapes)
    assert name in message and "needs Qwen3-4B" in message


@pytest.mark.parametrize("channels, whose", [(4, "Stable Diffusion's"), (32, "Flux 2's")])
def test_vaes_of_other_models(tmp_path, channels, whose):
    message = refusal(tmp_path, "vae", {"decoder.conv_in.weight": (8, channels, 3, 3)})
    assert whose in message and "ae.safetensors" in message


def test_quantized_weights_are_refused_by_name(tmp_path):
    tensors = native("transformer")
    name = "layers.0.feed_forward.w1.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "m.safetensors", metadata("transformer"))
    with pytest.raises(CheckpointError, match=rf"{name} is stored as I8"):
        open_component(tmp_path / "m.safetensors", "transformer").build()


def test_a_damaged_config_in_the_metadata(tmp_path):
    save_file(native("vae"), tmp_path / "m.safetensors", {"zimage.vae.config": "{"})
    with pytest.raises(CheckpointError, match="config in the metadata is not JSON"):
        open_component(tmp_path / "m.safetensors", "vae")


def test_no_such_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no such file or folder.*nowhere\.safetensors\)$"):
        open_component(tmp_path / "nowhere.safetensors", "vae")
