"""LoRA files of every format and family: each key lands where it should, each change is the formula's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage_core.lora import apply
from zimage_core.lora import files as lora
from zimage_core.weights.snapshot import Snapshot

from .helpers import NANO

BLOCK = "layers.1.attention"
WIDTH = 192


@pytest.fixture(scope="module")
def transformer():
    return Snapshot(NANO).transformer(dtype=torch.float32)


@pytest.fixture(scope="module")
def text_encoder():
    return Snapshot(NANO).text_encoder(dtype=torch.float32)


@pytest.fixture
def shapes(transformer, text_encoder):
    return lora.shapes_of(transformer=transformer, text_encoder=text_encoder)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = tmp_path / "style.safetensors"
    save_file(tensors, path, metadata)
    return path


def changes(model, component: str, *loras) -> dict[str, Tensor]:
    """Parameter -> what the LoRAs add; the model is left as it was, bit for bit."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    kept = apply.add(model, component, loras)
    found = {name: parameter - before[name] for name, parameter in model.named_parameters() if name in kept}
    apply.remove(model, kept)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found.double() - expected).norm() <= 1e-5 * expected.norm())


# Formats: names as trainers write them


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "start",
    [
        "",
        "transformer.",
        "diffusion_model.",
        "model.diffusion_model.",
        "base_model.model.",
        "base_model.model.transformer.",
        "_orig_mod.",
        "base_model.model._orig_mod.",
    ],
)
@pytest.mark.parametrize(
    "down, up",
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora_down.weight", ".lora_up.weight"),
        (".lora.down.weight", ".lora.up.weight"),
    ],
)
@pytest.mark.parametrize(
    "module, target, part",
    [
        ("attention.to_q", "attention.qkv", 0),
        ("attention.to_v", "attention.qkv", 2),
        ("attention.to.k", "attention.qkv", 1),
        ("attention.qkv", "attention.qkv", None),
        ("attention.to_out.0", "attention.out", None),
        ("attention.to_out", "attention.out", None),
        ("attention.out", "attention.out", None),
    ],
)
def test_dotted_formats(tmp_path, transformer, shapes, start, down, up, module, target, part):
    out = 3 * WIDTH if module == "attention.qkv" else WIDTH
    a, b = random(4, WIDTH), random(out, 4, seed=1)
    name = f"{start}layers.1.{module}"
    opened = lora.open_lora(saved(tmp_path, {name + down: a, name + up: b, name + ".alpha": torch.tensor(8.0)}), shapes)
    assert (opened.matched, opened.total, opened.left) == (3, 3, ())
    found = changes(transformer, "transformer", (opened, 0.5))[f"layers.1.{target}.weight"]
    expected = torch.zeros(found.shape, dtype=torch.float64)
    rows = slice(None) if part is None else slice(part * WIDTH, (part + 1) * WIDTH)
    expected[rows] = 0.5 * 8 / 4 * (b.double() @ a.double())
    assert close(found, expected)


@pytest.mark.parametrize(
    "start", ["lora_unet_", "lora_transformer_", "lycoris_", "", "lora_unet__orig_mod_", "lora_prior_unet_"]
)
@pytest.mark.parametrize(
    "module, parameter",
    [
        ("layers_1_attention_qkv", "layers.1.attention.qkv.weight"),
        ("layers_1_attention_out", "layers.1.attention.out.weight"),
        ("layers_1_attention_to_q", "layers.1.attention.qkv.weight"),
        ("layers_1_attention_to_out_0", "layers.1.attention.out.weight"),
        ("layers_1_feed_forward_w2", "layers.1.feed_forward.w2.weight"),
        ("noise_refiner_0_adaLN_modulation_0", "noise_refiner.0.adaLN_modulation.0.weight"),
        ("context_refiner_0_feed_forward_w1", "context_refiner.0.feed_forward.w1.weight"),
        ("all_x_embedder_2-1", "x_embedder.weight"),
        ("all_final_layer_2-1_linear", "final_layer.linear.weight"),
        ("cap_embedder_1", "cap_embedder.1.weight"),
        ("t_embedder_mlp_0", "t_embedder.mlp.0.weight"),
    ],
)
def test_underscored_formats(tmp_path, shapes, start, module, parameter):
    out, width = shapes["transformer"][parameter]
    out = WIDTH if "to_q" in module else out
    tensors = {f"{start}{module}.lora_down.weight": random(2, width), f"{start}{module}.lora_up.weight": random(out, 2)}
    opened = lora.open_lora(saved(tmp_path, tensors), shapes)
    assert [target.name for target in opened.adapters] == [parameter]
    assert opened.left == ()


@pytest.mark.parametrize(
    "module",
    [
        "lora_te_layers_1_self_attn_q_proj",
        "lora_te1_model_layers_1_self_attn_q_proj",
        "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj",
        "text_encoder.model.layers.1.self_attn.q_proj",
        "text_encoder.layers.1.self_attn.q_proj",
        "text_encoders.transformer.model.layers.1.self_attn.q_proj",
        "text_encoders._orig_mod.model.layers.1.self_attn.q_proj",
        "qwen3_4b.transformer.model.layers.1.self_attn.q_proj",
        "lora_te3_model_layers_1_self_attn_q_proj",
        "lora_te__orig_mod_model_layers_1_self_attn_q_proj",
        "te.model.layers.1.self_attn.q_proj",
        "clip.layers.1.self_attn.q_proj",
    ],
)
def test_text_encoder_formats(tmp_path, text_encoder, shapes, module):
    parameter = "model.layers.1.self_attn.q_proj.weight"
    out, width = shapes["text_encoder"][parameter]
    a, b = random(2, width), random(out, 2, seed=1)
    opened = lora.open_lora(saved(tmp_path, {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b}), shapes)
    assert "text encoder 1" in opened.report()
    assert close(changes(text_encoder, "text_encoder", (opened, 1.0))[parameter], b.double() @ a.double())


def test_every_weight_has_a_name_of_its_own_in_every_format(shapes):
    """No two weights share a place, so nothing can land on the wrong one."""
    places = lora._places(shapes)
    thirds = {(target.name, target.part) for target in places.values()}
    blocks = 6 + 1 + 1
    parameters = [name for kind in shapes.values() for name in kind if name.endswith(".weight")]
    assert len(thirds) == len(parameters) + 3 * blocks


def test_families_in_one_file_and_leftovers_are_told(tmp_path, shapes):
    tensors = {
        f"diffusion_model.{BLOCK}.to_q.lora_A.weight": random(2, WIDTH),
        f"diffusion_model.{BLOCK}.to_q.lora_B.weight": random(WIDTH, 2),
        "lora_unet_layers_0_feed_forward_w1.lokr_w1": random(4, 4),
        "lora_unet_layers_0_feed_forward_w1.lokr_w2": random(128, 48),
        f"diffusion_model.{BLOCK}.to_k.lora_A.weight": random(2, WIDTH),  # its lora_B is missing
        "diffusion_model.layers.77.attention.to_q.lora_A.weight": random(2, WIDTH),
        "diffusion_model.layers.77.attention.to_q.lora_B.weight": random(WIDTH, 2),
        "mystery": random(1),
    }
    metadata = {"modelspec.architecture": "z-image", "modelspec.trigger_phrase": "my style"}
    opened = lora.open_lora(saved(tmp_path, tensors, metadata), shapes)
    report = opened.report()
    assert report.startswith("style.safetensors: 4 of 8 keys matched, 2 weights")
    for words in ("attention 1", "feed forward 1", "LoKr, LoRA", "rank: 2", "alpha: none", "z-image", "my style"):
        assert words in report
    assert set(opened.left) == {key for key in tensors if "77" in key or "to_k" in key or key == "mystery"}
    assert all(key in report for key in opened.left)


# Families, against float64 formulas of their papers


def dense(name: str) -> dict[str, tuple[dict[str, Tensor], object]]:
    """family -> (its tensors for a square weight, W -> changed W at strength 1, in float64)."""
    w = WIDTH
    a, b, c, d = random(4, w), random(w, 4, seed=1), random(4, w, seed=2), random(w, 4, seed=3)
    ad, bd, cd, dd = a.double(), b.double(), c.double(), d.double()
    skew = random(8, 24, 24, seed=4) * 0.05
    butterfly = random(2, 12, 16, 16, seed=5) * 0.05
    scale = random(w, 1, seed=6).abs() + 0.5

    def cayley(blocks: Tensor) -> Tensor:
        q = blocks.double() - blocks.double().mT
        eye = torch.eye(q.shape[-1], dtype=torch.float64)
        return (eye + q) @ torch.linalg.inv(eye - q)

    def boft(weight: Tensor) -> Tensor:
        """Each level as one dense permuted block-diagonal matrix."""
        for level, blocks in enumerate(cayley(butterfly)):
            half = 2**level * 8
            order = torch.arange(w).view(-1, 2, half).transpose(1, 2).reshape(-1)
            turn = torch.zeros(w, w, dtype=torch.float64)
            turn[order[:, None], order[None]] = torch.block_diag(*blocks)
            weight = turn @ weight
        return weight

    def dora(weight: Tensor, merged: Tensor, magnitude: Tensor, dim: int) -> Tensor:
        return magnitude.double() * merged / merged.norm(dim=dim, keepdim=True)

    rows, columns = random(w, 1, seed=7).abs() + 1, random(1, w, seed=8).abs() + 1
    alpha = {"alpha": torch.tensor(2.0)}
    kron_1, kron_2 = random(8, 8), random(24, 24, seed=1)
    kron_a, kron_b = random(24, 4), random(4, 24, seed=1)
    cases = {
        "LoRA": ({"lora_down.weight": a, "lora_up.weight": b, **alpha}, lambda W: W + 0.5 * bd @ ad),
        "LoRA without alpha": ({"lora_down.weight": a, "lora_up.weight": b}, lambda W: W + bd @ ad),
        "LoHa": (
            {"hada_w1_a": b, "hada_w1_b": a, "hada_w2_a": d, "hada_w2_b": c, **alpha},
            lambda W: W + 0.5 * (bd @ ad) * (dd @ cd),
        ),
        "LoKr": (  # neither factor decomposed: alpha is ignored
            {"lokr_w1": kron_1, "lokr_w2": kron_2, **alpha},
            lambda W: W + torch.kron(kron_1.double(), kron_2.double()),
        ),
        "LoKr decomposed": (
            {"lokr_w1": kron_1, "lokr_w2_a": kron_a, "lokr_w2_b": kron_b, **alpha},
            lambda W: W + 0.5 * torch.kron(kron_1.double(), kron_a.double() @ kron_b.double()),
        ),
        "GLoRA": (
            {"a1.weight": b, "a2.weight": a, "b1.weight": d, "b2.weight": c, **alpha},
            lambda W: W + 0.5 * (W @ bd @ ad + dd @ cd),
        ),
        "OFT": ({"oft_blocks": skew}, lambda W: torch.block_diag(*cayley(skew).mT) @ W),
        "OFT rescaled": (
            {"oft_blocks": skew, "rescale": scale},
            lambda W: scale.double() * (torch.block_diag(*cayley(skew).mT) @ W),
        ),
        "BOFT": ({"oft_blocks": butterfly}, boft),
        "diff": ({"diff": random(w, w)}, lambda W: W + random(w, w).double()),
        "DoRA by rows": (
            {"lora_A.weight": a, "lora_B.weight": b, "dora_scale": rows},
            lambda W: dora(W, W + bd @ ad, rows, 1),
        ),
        "DoRA by columns": (
            {"lora_A.weight": a, "lora_B.weight": b, "dora_scale": columns},
            lambda W: dora(W, W + bd @ ad, columns, 0),
        ),
        "DoRA of PEFT": (
            {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": rows[:, 0].clone()},
            lambda W: dora(W, W + bd @ ad, rows, 1),
        ),
    }
    return cases[name]


FAMILIES = (
    "LoRA, LoRA without alpha, LoHa, LoKr, LoKr decomposed, GLoRA, OFT, OFT rescaled, BOFT, diff, DoRA by rows, "
    "DoRA by columns, DoRA of PEFT"
).split(", ")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("module, part", [("out", None), ("to_k", 1)])
def test_each_family_is_its_formula(tmp_path, transformer, shapes, family, module, part):
    tensors, formula = dense(family)
    path = saved(tmp_path, {f"diffusion_model.{BLOCK}.{module}.{name}": value for name, value in tensors.items()})
    opened = lora.open_lora(path, shapes)
    assert opened.left == () and opened.matched == len(tensors)
    name = f"{BLOCK}.{'out' if part is None else 'qkv'}.weight"
    rows = slice(None) if part is None else slice(part * WIDTH, (part + 1) * WIDTH)
    weight = dict(transformer.named_parameters())[name].detach()
    expected = torch.zeros(weight.shape, dtype=torch.float64)
    expected[rows] = formula(weight[rows].double()) - weight[rows].double()
    found = changes(transformer, "transformer", (opened, 1.0))[name]
    assert close(found, expected)
    nothing = changes(transformer, "transformer", (opened, 0.0))[name]
    assert nothing.abs().max() <= 1e-6 * weight.abs().max()
