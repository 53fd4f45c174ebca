"""LoRA put on: what they cost, several together, what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zimage_core.errors import CheckpointError
from zimage_core.lora import apply, formulas
from zimage_core.lora import files as lora
from zimage_core.weights.snapshot import Snapshot

from . import test_lora
from .helpers import NANO
from .test_lora import BLOCK, WIDTH, changes, close, dense, random, saved
from .traffic import Traffic

shapes = test_lora.shapes
text_encoder = test_lora.text_encoder
transformer = test_lora.transformer


def large(family: str, out: int, width: int) -> dict[str, Tensor]:
    """An adapter of a published size, as CUDA tensors of a FakeTensorMode, in bf16."""

    def cuda(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16)

    low = {"down": cuda(32, width), "up": cuda(out, 32)}
    return {
        "LoRA": low,
        "LoHa": {
            f"hada_{name}": cuda(*shape)
            for name, shape in {"w1_a": (out, 16), "w1_b": (16, width), "w2_a": (out, 16), "w2_b": (16, width)}.items()
        },
        "LoKr": {"lokr_w1": cuda(16, 16), "lokr_w2": cuda(out // 16, width // 16)},
        "GLoRA": {
            "glora_a1": cuda(width, 16),
            "glora_a2": cuda(16, width),
            "glora_b1": cuda(out, 16),
            "glora_b2": cuda(16, width),
        },
        "OFT": {"oft_blocks": cuda(out // 256, 256, 256), "rescale": cuda(out, 1)},
        "BOFT": {"oft_blocks": cuda(4, out // 64, 64, 64)},
        "diff": {"diff": cuda(out, width)},
        "DoRA by rows": {**low, "magnitude": cuda(out, 1)},
        "DoRA by columns": {**low, "magnitude": cuda(1, width)},
    }[family]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "family", "LoRA, LoHa, LoKr, GLoRA, OFT, BOFT, diff, DoRA by rows, DoRA by columns".split(", ")
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_is_changed_in_its_place(family, dtype):
    """With less memory than ComfyUI reserves (numbers times 4 bytes), and without a copy over the bus or a wait."""
    out, width = 10240, 3840
    with FakeTensorMode():
        kind = family.replace("DoRA by rows", "LoRA").replace("DoRA by columns", "LoRA")
        adapter = formulas.Adapter(kind, large(family, out, width), 4.0)
        changes = [(lora.Target("transformer", "w", None, 1), adapter, strength) for strength in (0.5, 1.0)]
        weight = torch.empty(out, width, device="cuda", dtype=dtype)
        with Traffic() as seen:
            assert apply.apply(weight, changes) is weight
    assert seen.peak <= out * width * 4 and seen.copies == seen.waits == []


@pytest.mark.parametrize(
    "families", [("LoRA", "GLoRA"), ("LoRA", "OFT"), ("DoRA by columns", "LoKr"), ("OFT", "GLoRA")]
)
@pytest.mark.parametrize("module, part", [("out", None), ("to_k", 1)])
def test_pieces_are_the_whole(tmp_path, transformer, shapes, monkeypatch, families, module, part):
    """Several families on a weight, by rows, by columns, or at once where they agree on neither."""
    files = []
    for number, family in enumerate(families):
        (tmp_path / str(number)).mkdir()
        tensors = {f"diffusion_model.{BLOCK}.{module}.{name}": value for name, value in dense(family)[0].items()}
        files.append((lora.open_lora(saved(tmp_path / str(number), tensors), shapes), 0.5))
    name = f"{BLOCK}.{'out' if part is None else 'qkv'}.weight"
    monkeypatch.setattr(apply, "PIECE", 10**9)
    whole = changes(transformer, "transformer", *files)[name]
    monkeypatch.setattr(apply, "PIECE", 7 * WIDTH)
    pieces = changes(transformer, "transformer", *files)[name]
    assert whole.count_nonzero() and close(pieces, whole.double())
    weight = dict(transformer.named_parameters())[name].detach().clone()
    together = [
        (target, adapter, strength) for file, strength in files for target, adapter in file.of("transformer").items()
    ]
    before = weight.clone()
    assert close(apply.apply(weight, together) - before, whole.double())


def test_bias_changes(tmp_path, transformer, shapes):
    tensors = {
        "diffusion_model.cap_embedder.1.diff_b": random(WIDTH),
        "diffusion_model.cap_embedder.1.diff": random(WIDTH, 128),
    }
    opened = lora.open_lora(saved(tmp_path, tensors), shapes)
    found = changes(transformer, "transformer", (opened, 2.0))
    assert close(found["cap_embedder.1.bias"], 2 * random(WIDTH).double())
    assert close(found["cap_embedder.1.weight"], 2 * random(WIDTH, 128).double())


# Several together


def one(tmp_path: Path, shapes, seed: int, module: str = "to_q"):
    (tmp_path / str(seed)).mkdir(exist_ok=True)
    name = f"diffusion_model.{BLOCK}.{module}"
    tensors = {
        f"{name}.lora_A.weight": random(2, WIDTH, seed=seed),
        f"{name}.lora_B.weight": random(WIDTH, 2, seed=seed),
    }
    return lora.open_lora(saved(tmp_path / str(seed), tensors), shapes)


def test_two_loras_agree_in_either_order(tmp_path, transformer, shapes):
    a, b = one(tmp_path, shapes, 1), one(tmp_path, shapes, 2)
    ab = changes(transformer, "transformer", (a, 0.7), (b, -0.3))
    ba = changes(transformer, "transformer", (b, -0.3), (a, 0.7))
    assert ab.keys() == ba.keys() and all(torch.allclose(ab[name], ba[name], atol=1e-6) for name in ab)


def test_bfloat16_weights_come_back_bit_for_bit(tmp_path, shapes):
    changes(Snapshot(NANO).transformer(), "transformer", (one(tmp_path, shapes, 1), 1.0))


def test_overlap_tells_alike_from_apart(tmp_path, transformer, shapes):
    a, b, c = one(tmp_path, shapes, 1), one(tmp_path, shapes, 2), one(tmp_path, shapes, 1, "to_k")
    weights = dict(transformer.named_parameters())
    cosine, norm_a, norm_again = apply.overlap(a, a, weights)
    assert cosine == pytest.approx(1) and norm_a == pytest.approx(norm_again)
    weight = weights[f"{BLOCK}.qkv.weight"][:WIDTH]
    change = random(WIDTH, 2, seed=1) @ random(2, WIDTH, seed=1)
    assert norm_a == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
    assert abs(apply.overlap(a, b, weights)[0]) < 0.2
    assert apply.overlap(a, c, weights)[0] == pytest.approx(0, abs=1e-6)


def test_overlap_of_low_rank_changes_is_that_of_the_whole_matrices(tmp_path, transformer, shapes):
    """One on q alone, one on the fused q, k, v, with alphas: products of factors against products of changes."""
    weights = dict(transformer.named_parameters())
    name = f"lora_unet_{BLOCK.replace('.', '_')}"
    files = []
    for seed, module, out in ((1, "to_q", WIDTH), (2, "qkv", 3 * WIDTH)):
        a, b = random(2, WIDTH, seed=1), random(out, 2, seed=1)
        tensors = {f"{name}_{module}.lora_down.weight": a, f"{name}_{module}.lora_up.weight": b}
        tensors[f"{name}_{module}.alpha"] = torch.tensor(float(seed))
        (tmp_path / str(seed)).mkdir()
        files.append(lora.open_lora(saved(tmp_path / str(seed), tensors), shapes))
    a, b = (changes(transformer, "transformer", (file, 1.0))[f"{BLOCK}.qkv.weight"] for file in files)
    cosine, norm_a, norm_b = apply.overlap(*files, weights)
    weight = weights[f"{BLOCK}.qkv.weight"]
    assert cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-4)
    assert norm_a == pytest.approx(float(a.norm() / weight[:WIDTH].norm()), rel=1e-4)
    assert norm_b == pytest.approx(float(b.norm() / weight.norm()), rel=1e-4)
    dense = dataclasses.replace(
        files[1],
        adapters={
            target: formulas.Adapter("diff", {"diff": adapter.change(weight, 1.0)})
            for target, adapter in files[1].adapters.items()
        },
    )
    assert apply.overlap(files[0], dense, weights) == pytest.approx((cosine, norm_a, norm_b), rel=1e-4)


# What is refused


def refusal(tmp_path: Path, shapes, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    path = saved(tmp_path, tensors, metadata)
    with pytest.raises(CheckpointError) as error:
        lora.open_lora(path, shapes)
    assert str(error.value).endswith(f" ({path})")
    return str(error.value)


@pytest.mark.parametrize(
    "key, name",
    [
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight", "Qwen-Image"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "Stable Diffusion 3"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "SDXL"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "Stable Diffusion"),
    ],
)
def test_loras_for_other_models_are_named(tmp_path, shapes, key, name):
    message = refusal(tmp_path, shapes, {key: random(2, 2)}, {"ss_base_model_version": "their_v1"})
    assert f"a LoRA for {name}" in message and "their_v1" in message and "not for Z-Image" in message


def test_other_sizes_are_refused_with_both(tmp_path, shapes):
    name = f"diffusion_model.{BLOCK}.to_q"
    tensors = {f"{name}.lora_A.weight": random(2, 2304), f"{name}.lora_B.weight": random(2304, 2)}
    message = refusal(tmp_path, shapes, tensors)
    assert f"{name} has a change of shape [2304, 2304]" in message and "[192, 192]" in message
    tensors = {f"{name}.lora_A.weight": random(2, WIDTH), f"{name}.lora_B.weight": random(WIDTH, 3)}
    assert "parts that don't fit together" in refusal(tmp_path, shapes, tensors)
    square = {f"{name}.lora_A.weight": random(WIDTH, WIDTH), f"{name}.lora_B.weight": random(WIDTH, 3)}
    assert "parts that don't fit together" in refusal(tmp_path, shapes, square)  # one part has the weight's own shape
    good = {f"{name}.lora_A.weight": random(2, WIDTH), f"{name}.lora_B.weight": random(WIDTH, 2)}
    assert "alpha has shape [2]" in refusal(tmp_path, shapes, {**good, f"{name}.alpha": random(2)})
    assert "don't fit together or the weight" in refusal(tmp_path, shapes, {**good, f"{name}.dora_scale": random(7, 1)})


def test_a_model_is_no_lora(tmp_path, shapes):
    message = refusal(tmp_path, shapes, {"decoder.conv_in.weight": random(8, 16, 3, 3)})
    assert "this is an AutoencoderKL (VAE), not a LoRA" in message


def test_unknown_keys_only(tmp_path, shapes):
    assert "no key of this LoRA belongs to this model" in refusal(tmp_path, shapes, {"a.lora_A.weight": random(2, 2)})


# Values that would come back as the model's fault


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha", "diff_b"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite_are_named_when_read(tmp_path, shapes, part, value):
    tensors = {
        "layers.0.attention.to_q.lora_A.weight": torch.ones(2, 192),
        "layers.0.attention.to_q.lora_B.weight": torch.ones(192, 2),
        "layers.0.attention.to_q.alpha": torch.tensor(2.0),
        "final_layer.linear.diff_b": torch.ones(64),
    }
    key = next(key for key in tensors if key.endswith(part))
    tensors[key].view(-1)[-1] = value
    assert f"{key} of this LoRA holds values that are not finite" in refusal(tmp_path, shapes, tensors)


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_that_is_not_finite_is_refused(strength):
    with pytest.raises(ValueError, match="^strength is (nan|inf), expected a finite number"):
        lora.checked_strength(strength)


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_A.weight": (0, 192), "lora_B.weight": (192, 0)},
        {"lokr_w1": (4, 4), "lokr_w2_a": (48, 0), "lokr_w2_b": (0, 48)},
        {"hada_w1_a": (192, 0), "hada_w1_b": (0, 192), "hada_w2_a": (192, 0), "hada_w2_b": (0, 192)},
        {"a1.weight": (192, 0), "a2.weight": (0, 192), "b1.weight": (192, 0), "b2.weight": (0, 192)},
    ],
)
def test_rank_0_with_alpha_adds_nothing(tmp_path, transformer, shapes, parts):
    module = "layers.0.attention.to_q"
    tensors = {f"{module}.{part}": torch.ones(shape) for part, shape in parts.items()}
    opened = lora.open_lora(saved(tmp_path, {**tensors, f"{module}.alpha": torch.tensor(8.0)}), shapes)
    ((target, adapter),) = opened.adapters.items()
    weight = transformer.get_parameter(target.name)[:192]
    assert adapter.change(weight, 1.0).abs().max() == 0 and opened.report()
