"""Reference images against diffusers' omni mode, with the same weights; and where its positions differ."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from zimage_core.model.reference import References, refine
from zimage_core.weights.snapshot import Snapshot

from ..helpers import relative

SIGLIP = 40
REFERENCES = ((16, 8), (8, 24))  # latents' height and width, of which siglip sees every eighth row and column


@pytest.fixture(scope="module")
def make_models(make_transformer, tmp_path_factory):
    """(diffusers' model, ours) of the same random weights."""

    def make(**settings):
        folder = tmp_path_factory.mktemp("snapshot")
        reference = make_transformer("narrow", 3, **settings)
        reference.save_pretrained(folder / "transformer")
        return reference, Snapshot(folder).transformer()

    return make


@pytest.fixture(scope="module")
def omni(make_models):
    return make_models(siglip_feat_dim=SIGLIP)


@pytest.fixture(scope="module")
def plain(make_models):
    return make_models()


def given(width: int, lengths: list[int], count: int = 2):
    """(latents, t, pieces before the references, caption, pieces after the image, latents of references, features)."""
    generator = torch.Generator().manual_seed(sum(lengths))

    def numbers(*shape: int):
        return torch.randn(*shape, generator=generator)

    pieces = [3 * numbers(1, length, width) for length in lengths]
    beside = [numbers(1, 16, height, width) for height, width in REFERENCES[:count]]
    features = [2 * numbers(1, height // 8, width // 8, SIGLIP) for height, width in REFERENCES[:count]]
    return (
        numbers(1, 16, 10, 14),
        torch.tensor([0.3]),
        pieces[:count],
        pieces[count],
        pieces[count + 1 :],
        beside,
        features,
    )


@torch.no_grad()
def difference(models, inputs, sees: bool) -> float:
    reference, ours = models
    latents, t, before, caption, after, beside, features = inputs
    seen = features if sees else []
    found = ours(latents, t, refine(ours, caption, References(beside, before, after, seen), latents.dtype))
    theirs = reference(
        [[x[0].unsqueeze(1) for x in (*beside, latents)]],
        t,
        [[piece[0] for piece in (*before, caption, *after)]],
        siglip_feats=[[*(x[0] for x in features), None] if sees else None],
        image_noise_mask=[[0] * len(beside) + [1]],
        return_dict=False,
    )[0]
    return relative(found, torch.stack(list(theirs)).squeeze(2))


# Captions of which diffusers pads no positions: all lengths are multiples of 32
WHOLE = {"as the node cuts it": [32, 64, 96, 32], "nothing after": [64, 32, 32]}
OTHERS = ([5, 40, 3, 9], [3, 1, 100, 7])


@pytest.mark.parametrize("lengths", WHOLE)
def test_pieces_of_whole_lengths(plain, lengths):
    assert difference(plain, given(48, WHOLE[lengths]), sees=False) <= 1e-5


@pytest.mark.parametrize("lengths", WHOLE)
def test_features_and_pieces_of_whole_lengths(omni, lengths, monkeypatch):
    """diffusers modulates the pads in place of the made image's features by its time, ComfyUI as clean: that is 5 %."""
    assert 0.01 < difference(omni, given(48, WHOLE[lengths]), sees=True) < 0.1
    with_clean_pads(omni[0], monkeypatch)
    assert difference(omni, given(48, WHOLE[lengths]), sees=True) <= 1e-5


@pytest.mark.parametrize("lengths", OTHERS)
def test_positions_that_diffusers_pads_twice(omni, lengths, monkeypatch):
    """Every later piece is displaced, partly to (0, 0, 0): 4 to 5 % of the result, all of it by these positions."""
    with_clean_pads(omni[0], monkeypatch)
    assert 0.03 < difference(omni, given(48, lengths), sees=True) < 0.06
    kind = type(omni[0])
    pad = kind._pad_with_ids

    def once(self, feat, *arguments):
        padded, places, mask, total, noise = pad(self, feat, *arguments)
        return padded, places[:total], mask, total, noise

    monkeypatch.setattr(kind, "_pad_with_ids", once)
    assert difference(omni, given(48, lengths), sees=True) <= 1e-5


@torch.no_grad()
def test_one_piece(plain):
    """Without references its mode for them is the ordinary one, where nothing is padded."""
    reference, ours = plain
    latents, t, _, caption, *_ = given(48, [64], 0)
    theirs = reference([[latents[0].unsqueeze(1)]], t, [[caption[0]]], siglip_feats=[None], image_noise_mask=[[1]])
    assert relative(ours(latents, t, caption), theirs.sample[0].unsqueeze(0).squeeze(2)) <= 1e-5


def with_clean_pads(reference, monkeypatch):
    """diffusers' model, with the pads in place of the made image's features modulated as clean."""
    kind = type(reference)
    embed = kind.patchify_and_embed_omni

    def clean(self, *arguments):
        *others, masks = embed(self, *arguments)
        return (*others, [mask[:-32] + [0] * 32 for mask in masks])

    monkeypatch.setattr(kind, "patchify_and_embed_omni", clean)


# What has no counterpart there


def prompts(omni, lengths=(9, 9)):
    """(latents, t, captions, references) of so many items."""
    latents, t, before, _, after, beside, features = given(48, [5, 40, 3, 9])
    captions = [2 * torch.randn(n, 48, generator=torch.Generator().manual_seed(n)) for n in lengths]
    count = len(lengths)
    references = References(beside, before, after, features)
    return torch.cat([latents * (1 + i) for i in range(count)]), t.repeat(count), captions, references


@pytest.mark.parametrize("lengths", [(9, 9), (9, 40)], ids=["of one length", "of several"])
def test_a_batch_equals_its_items_run_alone(omni, lengths):
    model = omni[1]
    latents, t, captions, references = prompts(omni, lengths)
    each = references.each(lambda x: torch.cat([x, 2 * x]))
    with torch.inference_mode():
        batch = model(latents, t, refine(model, captions, each, torch.float32))
        for i, caption in enumerate(captions):
            own = refine(model, [caption], each.each(lambda x, i=i: x[i : i + 1]), torch.float32)
            assert relative(batch[i : i + 1], model(latents[i : i + 1], t[i : i + 1], own)) <= 1e-5


def test_every_way_to_run_it(omni):
    """As a module, in rows and in the order of captions first; later steps find the positions of the first."""
    model = omni[1]
    latents, t, captions, references = prompts(omni)
    as_module = model(latents, t, refine(model, captions, references, torch.float32)).detach()
    with torch.inference_mode():
        refined = refine(model, captions, references, torch.float32)
        for settings in ({}, {"captions_first": True}, {}):
            assert relative(model(latents, t, refined, **settings), as_module) <= 1e-5
        half = refine(model, captions, references, torch.bfloat16)
        rounded = copy.deepcopy(model).to(torch.bfloat16)(latents.bfloat16(), t, half)
    assert relative(rounded, as_module) <= 0.05


def test_what_can_not_work(omni):
    model = omni[1]
    latents, t, captions, references = prompts(omni)
    refined = refine(model, captions, references, torch.float32)
    with pytest.raises(ValueError, match="reference images and control networks can't be used together"):
        model(latents, t, refined, controls=[object()])
    for change, message in (
        ({"latents": []}, "there are no latents of reference images"),
        ({"latents": [torch.zeros(1, 16, 7, 8)]}, r"the shape \[1, 16, 7, 8\], expected .* divisible by 16"),
        ({"latents": [torch.zeros(1, 4, 8, 8)]}, r"the shape \[1, 4, 8, 8\], expected \[batch, 16, height/8"),
        ({"after": [torch.zeros(1, 3, 47)]}, "a piece of the prompt: a width of 47, this model expects 48"),
        (
            {"features": [torch.zeros(1, 2, 2, 8)]},
            "the siglip features of a reference image: a width of 8, this model expects 40",
        ),
        ({"latents": references.latents[:1]}, "`before` is for 2 reference images, and there are 1"),
    ):
        with pytest.raises(ValueError, match=message):
            refine(model, captions, dataclasses.replace(references, **change), torch.float32)
