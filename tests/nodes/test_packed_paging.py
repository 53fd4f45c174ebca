"""Quantized models where ComfyUI pages weights: they are paged as they are stored, as ComfyUI's own are."""

from __future__ import annotations

import importlib

import pytest

SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in ("gguf", "marked")]


@pytest.fixture(scope="module")
def report(pack, scripts, request) -> dict:
    if not hasattr(importlib.import_module("comfy.memory_management"), "read_tensor_file_slice_into"):
        pytest.skip("this ComfyUI's dynamic patcher is another")
    return {"form": request.param, **scripts("paged", request.param)}


@pytest.mark.parametrize("report", ["plain", *SLOW], indirect=True)
def test_models_are_paged_and_patched_exactly(report):
    form = report["form"]
    for room in ("resident", "sent"):
        found = report[f"{form}, {room}"]
        assert found["dynamic"]
        assert max(found["differences"]) <= 1e-5  # plain, patched, plain again
        assert found["without paging"] == ("ModelPatcher" if form == "plain" else "PackedModelPatcher")
        if form != "gguf":  # as ComfyUI reads those that it has mapped itself, past the memory of the process
            assert found["from files"] >= 180 and found["from files"] >= 9 * found["through memory"]
    resident, sent = report[f"{form}, resident"], report[f"{form}, sent"]
    assert resident["paged"] >= 0.95 * resident["size"]
    assert resident["moved"] < 0.01 * resident["size"]  # a step's inputs
    assert 0.95 * sent["size"] <= sent["moved"] <= 1.05 * sent["size"]  # bytes of the file, not expanded


@pytest.mark.parametrize("report", ["plain"], indirect=True)
def test_text_encoders_are_paged(report):
    assert report["encoder"]["dynamic"]
    assert report["encoder"]["difference"] <= 1e-5
