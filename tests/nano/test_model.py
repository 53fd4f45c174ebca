"""The shipped snapshot against its bars: prompts that training never drew, read back by the judge.

A few of them in `make test`, 500 in `make test-all`.
"""

from __future__ import annotations

import json
import random

import pytest
import torch

from nano import evaluate, scenes, train_lora, train_vae
from zimage_core.pipeline import ZImagePipeline

COUNT = 500
SCORES = json.loads((evaluate.HERE / "scores.json").read_text(encoding="utf-8"))
FEW_OR_ALL = [6, pytest.param(COUNT, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(evaluate.SNAPSHOT)


@pytest.mark.parametrize("count", FEW_OR_ALL)
@pytest.mark.parametrize(("which", "guidance"), list(evaluate.BARS))
def test_images_show_what_the_prompts_say(pipe, which, guidance, count):
    chosen = evaluate.cases(count, held_out=which == "held out")
    found = evaluate.shares(evaluate.images(pipe, chosen, guidance), chosen)
    bars = {name: bar for name, bar in evaluate.BARS[which, guidance].items() if name in found}
    assert bars and not evaluate.failures(found, bars), found
    if count == COUNT:  # what the model card says
        assert bars == evaluate.BARS[which, guidance]
        said = SCORES["sets"][f"{'held-out' if which == 'held out' else which} pairs, guidance {guidance:g}"]
        assert found == pytest.approx(said, abs=0.01)


def test_the_bars_can_fail(pipe):
    """Images of other prompts miss every bar by far."""
    chosen = evaluate.cases(12)
    found = evaluate.shares(evaluate.images(pipe, chosen[1:] + chosen[:1], 0.0), chosen)
    missed = {text.split()[0] for text in evaluate.failures(found, evaluate.BARS["seen", 0.0])}
    assert missed >= {"background", "color", "shape", "count"}


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_the_autoencoder_reconstructs(pipe, count):
    assert evaluate.reconstruction(pipe, count) >= evaluate.VAE_BAR


def test_latents_are_normalised_as_flux_latents_are(pipe):
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (0.3611, 0.1159)
    rng = random.Random("latents")
    with torch.inference_mode():
        latents = pipe.vae.scale(pipe.vae.encode(scenes.draw([scenes.sample(rng) for _ in range(32)])))
    assert abs(latents.mean()) < 0.2
    assert 0.7 < latents.std() < 1.7


def test_previews_with_flux_factors_show_the_colors(pipe):
    rng = random.Random("previews")
    image = scenes.draw([scenes.sample(rng) for _ in range(32)])
    with torch.inference_mode():
        latents = pipe.vae.scale(pipe.vae.encode(image))
    factors, bias = torch.tensor(train_vae.PREVIEW_FACTORS), torch.tensor(train_vae.PREVIEW_BIAS)
    preview = torch.einsum("bchw,ck->bkhw", latents, factors) + bias.view(1, 3, 1, 1)
    truth = train_vae.PREVIEW_CONTRAST * torch.nn.functional.avg_pool2d(image, 8)
    assert (preview - truth).square().mean().sqrt() < 0.06


def test_the_snapshot_is_small():
    assert evaluate.export.size(evaluate.SNAPSHOT) <= evaluate.SIZE_BAR


@pytest.mark.parametrize(
    ("width", "height", "shape", "count"),
    [
        (96, 128, 0.75, 6),
        pytest.param(96, 128, 0.75, 40, marks=pytest.mark.slow),
        pytest.param(192, 128, 0.85, 40, marks=pytest.mark.slow),
        pytest.param(160, 160, 0.25, 40, id="never trained", marks=pytest.mark.slow),
    ],
)
def test_other_sizes_work_too(pipe, width, height, shape, count):
    chosen = evaluate.cases(count, width=width, height=height)
    found = evaluate.shares(evaluate.images(pipe, chosen, 0.0), chosen)
    assert found["background"] >= 0.97 and found["color"] >= 0.95 and found["shape"] >= shape, found


@pytest.mark.slow
def test_a_negative_prompt_drives_its_color_away(pipe):
    """Of a prompt that names no background, the one that the negative prompt names gets rarer."""
    seeds = list(range(60))
    prompts = ["a red circle"] * len(seeds)

    def backgrounds(negative: str) -> list[str | None]:
        images = pipe.generate(
            prompts, negative, width=128, height=128, steps=evaluate.STEPS, guidance_scale=1.0, seed=seeds
        )
        return [evaluate.judge.read(image)[0] for image in images]

    plain = backgrounds("")
    usual = max((name for name in set(plain) if name), key=plain.count)
    assert backgrounds(f"{usual} background").count(usual) < plain.count(usual)


def test_the_seed_decides_what_the_prompt_leaves_open(pipe):
    seeds = list(range(12))
    images, again = (
        pipe.generate(["a blue star"] * len(seeds), width=128, height=128, steps=evaluate.STEPS, seed=seeds)
        for _ in range(2)
    )
    assert torch.equal(images, again)
    assert len({evaluate.judge.read(image)[0] for image in images}) > 3  # backgrounds


# The LoRA that ships with it


@pytest.mark.parametrize(("count", "rest"), [(6, 6), pytest.param(150, 100, marks=pytest.mark.slow)])
def test_the_lora_draws_moons_and_leaves_the_rest_alone(count, rest):
    """At strength 1; at 0, and taken off, every image is the model's own, bit for bit."""
    moons, others = train_lora.moon_cases(count), evaluate.cases(rest)
    model = ZImagePipeline.from_pretrained(evaluate.SNAPSHOT)
    plain = evaluate.images(model, moons, 0.0)
    assert evaluate.shares(plain, moons)["shape"] <= 0.02
    (opened,) = model.set_loras((train_lora.OUT, 1.0))
    found = evaluate.shares(evaluate.images(model, moons, 0.0), moons)
    assert found["shape"] >= 0.8, found
    assert all(found.get(name, 1) >= 0.97 for name in ("background", "color", "count", "place")), found
    kept = evaluate.shares(evaluate.images(model, others, 0.0), others)
    bars = {name: bar for name, bar in evaluate.BARS["seen", 0.0].items() if name in kept}
    assert bars and not evaluate.failures(kept, bars), kept
    first = moons[: evaluate.BATCH]  # one batch, as above
    model.set_loras((train_lora.OUT, 0.0))
    assert torch.equal(evaluate.images(model, first, 0.0), plain[: len(first)])
    model.set_loras()
    assert torch.equal(evaluate.images(model, first, 0.0), plain[: len(first)])
    report = opened.report()
    assert "122 of 122 keys matched, 61 weights" in report
    assert "text encoder 21" in report and "rank: 8" in report and "trigger words: moon" in report


def test_the_lora_is_small():
    assert train_lora.OUT.stat().st_size < 600e3


def test_scores_are_written_into_the_model_card(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"before\n{evaluate.BEGIN}\nold\n{evaluate.END}\nafter\n")
    evaluate.write_card({**SCORES, "prompts": 50, "vae_psnr_db": 12.34}, card)
    text = card.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 50 prompts a set (10 for other sizes), 8 steps |" in text and "12.3 dB PSNR" in text
    card.write_text("no marks")
    with pytest.raises(ValueError, match="the marks .* are missing"):
        evaluate.write_card(SCORES, card)
