"""GGUF files: read, kept packed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_core.config import TransformerConfig
from zimage_core.errors import CheckpointError
from zimage_core.lora import apply, files
from zimage_core.model.transformer import ZImageTransformer
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights import packed
from zimage_core.weights.quantized import Weights
from zimage_core.weights.snapshot import Snapshot, open_component
from zimage_core.weights.tensor_files import TensorFiles

from . import gguf_writing, process_memory
from .helpers import NANO
from .test_gguf import CONFIGS, LLAMA_CPP, PROMPT, STRINGS


@pytest.fixture(scope="module")
def nano_transformer() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in Snapshot(NANO).transformer().state_dict().items()}


def diffusers_transformer() -> dict[str, Tensor]:
    return load_file(NANO / "transformer" / "diffusion_pytorch_model.safetensors")


def numbers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Name -> float32 weight, packed ones expanded."""
    found = {name: parameter.float() for name, parameter in model.named_parameters()}
    return found | {name: layer.expanded() for name, layer in packed.layers(model).items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_native_transformers_mean_what_the_package_says(tmp_path, nano_transformer, kind, prefix):
    stored = {prefix + name: value for name, value in nano_transformer.items()}
    meant = gguf_writing.write(tmp_path / "m.gguf", stored, gguf_writing.linear_weights(kind), strings=STRINGS)
    component = open_component(tmp_path / "m.gguf", "transformer")
    assert component.dtype() == torch.bfloat16
    model = component.build(dtype=torch.float32)
    found = numbers(model)
    assert found.keys() == nano_transformer.keys()
    for name, value in gguf_writing.as_tensors(meant).items():
        assert torch.equal(found[name.removeprefix(prefix)], value), name
    assert len(packed.layers(model)) > 50 and not any(name.endswith("qkv.weight") for name in model.state_dict())


def test_diffusers_names_with_mixed_types(tmp_path, nano_transformer):
    """q, k and v of a fused weight may be of different types; they stay apart and packed."""
    stored = diffusers_transformer()

    def choose(name: str, tensor: Tensor) -> str:
        plain = gguf_writing.linear_weights("Q8_0")(name, tensor)
        return "Q4_1" if "to_v" in name and plain == "Q8_0" else plain

    meant = gguf_writing.as_tensors(gguf_writing.write(tmp_path / "m.gguf", stored, choose, strings=STRINGS))
    model = open_component(tmp_path / "m.gguf", "transformer").build(dtype=torch.float32)
    layer = packed.layers(model)["layers.0.attention.qkv.weight"]
    assert [name for name, _ in layer.parts] == ["Q8_0", "Q8_0", "Q4_1"]
    parts = [meant[f"layers.0.attention.to_{letter}.weight"] for letter in "qkv"]
    assert torch.equal(layer.weight, torch.cat(parts))
    assert numbers(model).keys() == nano_transformer.keys()


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ3_S"])
def test_k_types_and_the_forward(tmp_path, kind):
    """A transformer of published proportions, two heads wide; the same image as with the expanded weights."""
    numbers_ = {**json.loads(CONFIGS["transformer"]), "dim": 256, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1}
    numbers_ |= {"cap_feat_dim": 256, "axes_dims": [32, 48, 48]}
    config = TransformerConfig.from_dict(numbers_, "")
    torch.manual_seed(0)
    model = ZImageTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    stored = {name: value.detach() for name, value in model.state_dict().items()}
    meant = gguf_writing.write(tmp_path / "m.gguf", stored, gguf_writing.linear_weights(kind))
    assert any(not np.array_equal(meant[name], stored[name].numpy()) for name in stored)
    built = open_component(tmp_path / "m.gguf", "transformer").build(dtype=torch.float32)  # numbers from the shapes
    assert built.config.dim == 256 and len(packed.layers(built)) > 10
    model.load_state_dict(gguf_writing.as_tensors(meant))
    inputs = (torch.randn(1, 16, 8, 8), torch.tensor([0.3]), [torch.randn(7, 256)])
    with torch.inference_mode():
        torch.testing.assert_close(built(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_llama_cpp_text_encoders(tmp_path):
    plain = load_file(NANO / "text_encoder" / "model.safetensors")
    stored = {}
    for name, value in plain.items():
        for theirs, ours in LLAMA_CPP.items():
            name = name.replace(theirs, ours)
        stored[name.replace("model.layers.", "blk.")] = value
    assert {"token_embd.weight", "blk.0.attn_q_norm.weight"} <= stored.keys()
    gguf_writing.write(
        tmp_path / "q.gguf", stored, gguf_writing.linear_weights("Q8_0"), strings=STRINGS, architecture="qwen3"
    )
    model = open_component(tmp_path / "q.gguf", "text_encoder").build(dtype=torch.float32)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, packed.PackedEmbedding)
    ids = torch.tensor([[5, 0, 17], [3, 3, 639]])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    whole = Snapshot(NANO).text_encoder(dtype=torch.float32)
    assert torch.nn.functional.cosine_similarity(model(ids), whole(ids), dim=-1).min() > 0.999


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory, nano_transformer) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    encoder = load_file(NANO / "text_encoder" / "model.safetensors")
    choose = gguf_writing.linear_weights("Q8_0")
    gguf_writing.write(folder / "transformer.gguf", nano_transformer, choose, strings=STRINGS)
    gguf_writing.write(folder / "text_encoder.gguf", encoder, choose, strings=STRINGS, architecture="qwen3")
    return {kind: folder / f"{kind}.gguf" for kind in ("transformer", "text_encoder")}


def test_the_image_is_nearly_that_of_the_whole_weights(gguf_files):
    settings = {"width": 128, "height": 128, "seed": 1}
    whole = ZImagePipeline.from_pretrained(NANO).generate(PROMPT, **settings)
    pipe = ZImagePipeline.from_pretrained(NANO, **gguf_files)
    assert 0 < (pipe.generate(PROMPT, **settings) - whole).abs().mean() < 0.01
    assert len(packed.layers(pipe.transformer)) > 50 and len(packed.layers(pipe.text_encoder)) > 20


def test_lora_on_packed_weights(gguf_files, tmp_path):
    """The same numbers as the LoRA on the expanded weights; taking it off leaves every byte as it was."""
    torch.manual_seed(0)
    packed_model = open_component(gguf_files["transformer"], "transformer").build(dtype=torch.float32)
    tensors = {}
    for module, (rows, columns) in {
        "diffusion_model.layers.0.attention.to_k": (192, 192),
        "diffusion_model.layers.1.feed_forward.w1": (512, 192),
        "diffusion_model.layers.2.attention.qkv": (576, 192),
    }.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, columns)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4)
    save_file(tensors, tmp_path / "l.safetensors")
    opened = files.open_lora(tmp_path / "l.safetensors", files.shapes_of(transformer=packed_model))
    assert opened.matched == len(tensors)
    before = {name: layer.weight for name, layer in packed.layers(packed_model).items()}
    raw = {name: buffer.clone() for name, buffer in packed_model.named_buffers()}
    plain = ZImageTransformer(packed_model.config)
    plain.load_state_dict(numbers(packed_model))

    kept = [apply.add(model, "transformer", [(opened, 0.7)]) for model in (packed_model, plain)]
    for name, layer in packed.layers(packed_model).items():
        torch.testing.assert_close(layer.weight, plain.get_parameter(name), rtol=1e-6, atol=1e-6)
    name = "layers.0.attention.qkv.weight"
    change = packed.layers(packed_model)[name].weight - before[name]
    assert change[:192].count_nonzero() == change[384:].count_nonzero() == 0 and change[192:384].count_nonzero()
    apply.remove(packed_model, kept[0])
    for name, layer in packed.layers(packed_model).items():
        assert torch.equal(layer.weight, before[name])
    assert all(torch.equal(buffer, raw[name]) for name, buffer in packed_model.named_buffers())


def test_the_pipeline_takes_loras_on_gguf(gguf_files, tmp_path):
    module = "diffusion_model.layers.0.attention.qkv"
    down, up = torch.randn(4, 192), torch.randn(576, 4)
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, tmp_path / "l.safetensors")
    pipe = ZImagePipeline.from_pretrained(NANO, transformer=gguf_files["transformer"])
    settings = {"width": 64, "height": 64, "seed": 1, "steps": 2}
    plain = pipe.generate(PROMPT, **settings)
    pipe.set_loras((tmp_path / "l.safetensors", 0.5))
    assert not torch.equal(pipe.generate(PROMPT, **settings), plain)
    pipe.set_loras()
    assert torch.equal(pipe.generate(PROMPT, **settings), plain)


def test_weights_stay_mapped_and_packed(tmp_path):
    """Twenty megabytes of Q8_0 load without a copy: the process's own memory hardly grows."""
    value = torch.randn(4096, 4096)
    gguf_writing.write(tmp_path / "m.gguf", {"w.weight": value}, lambda *_: "Q8_0")
    weights = Weights(TensorFiles([tmp_path / "m.gguf"]), ["w.weight"])
    before = process_memory.anonymous()
    stored = weights.packed("w.weight")
    assert stored is not None and stored.shape == (4096, 4096)
    layer = packed.PackedLinear([stored], torch.float32)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 4096 * 4096 // 32 * 34
    assert process_memory.anonymous() - before < 2e6


# What is refused


def refused(path: Path, kind: str = "transformer") -> str:
    with pytest.raises(CheckpointError) as error:
        open_component(path, kind).build(dtype=torch.float32)
    assert str(error.value).endswith(f" ({path})")
    return str(error.value)


def test_other_models_in_gguf_are_named(tmp_path, gguf_files):
    tensors = {
        "double_blocks.0.img_attn.qkv.weight": torch.randn(64, 64),
        "single_blocks.0.linear1.weight": torch.eye(64),
    }
    gguf_writing.write(tmp_path / "flux.gguf", tensors, gguf_writing.linear_weights("Q8_0"), architecture="flux")
    assert "this is a Flux model" in refused(tmp_path / "flux.gguf")
    assert "this is a Qwen3 text encoder, not a Z-Image transformer" in refused(gguf_files["text_encoder"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-100], "truncated"),
        (lambda raw: raw[:200], "truncated inside the GGUF header"),
        (lambda raw: raw + bytes(4096), "bytes follow the last tensor"),
        (lambda raw: raw[:4] + (9).to_bytes(4, "little") + raw[8:], "GGUF version 9, expected 2 or 3"),
        (lambda raw: raw[:8] + bytes([255] * 8) + raw[16:], "damaged"),
        (lambda raw: raw.replace(b"layers.1.attention.qkv.weight", b"layers.0.attention.qkv.weight", 1), "twice"),
    ],
)
def test_damaged_files(tmp_path, gguf_files, damage, words):
    (tmp_path / "m.gguf").write_bytes(damage(gguf_files["transformer"].read_bytes()))
    assert words in refused(tmp_path / "m.gguf")


def test_shapes_that_were_folded_are_restored(tmp_path):
    """ComfyUI-GGUF notes the shape of tensors that it had to fold."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "lumina2")
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    writer.add_array("comfy.gguf.orig_shape.x", [3, 2, 64])
    writer.add_tensor("x", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from zimage_core.weights.quantized import Weights
    from zimage_core.weights.tensor_files import TensorFiles

    weights = Weights(TensorFiles([tmp_path / "m.gguf"]), ["x"])
    assert weights.shapes() == {"x": (3, 2, 64)} and weights.read("x").shape == (3, 2, 64)
