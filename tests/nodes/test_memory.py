"""Two devices: ComfyUI's real partial loading and eviction, with an accelerator that is faked on the CPU."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def report(scripts) -> dict:
    return scripts("two_devices")


@pytest.fixture(scope="module")
def peaks(scripts) -> dict:
    return scripts("peak_memory")


def test_full_and_partial_budgets_give_the_same_latents(report):
    whole, *parts = report["budgets"]
    assert whole["loaded"] == report["size"]
    assert len(parts) == 3
    loaded = [run["loaded"] for run in report["budgets"]]
    assert loaded == sorted(loaded, reverse=True) and len(set(loaded)) == 4
    moved = [run["moved"] for run in report["budgets"]]
    assert moved == sorted(moved)  # what is not loaded travels at every step
    assert all(run["difference"] <= 1e-5 for run in report["budgets"])


@pytest.mark.parametrize("share", ["1.0", "0.5", "0.2"])
def test_factors_of_a_lora_lie_beside_the_weights(report, share):
    """Within what the weights may take; a step moves nothing but weights."""
    run = report["LoRA"][share]
    assert run["difference"] <= 1e-5 and run["loaded"] <= run["allowed"]
    assert run["moved in a step"] <= run["weights left"]
    assert run["weights left"] > 0 or share == "1.0"
    assert run["near"] == ["fakegpu:0"] and run["live afterwards"] == 0


def test_encoder_transformer_and_vae_evict_each_other(report):
    loaded = report["eviction"]["loaded"]
    assert loaded["encode"] == ["clip"]
    assert "clip" not in loaded["sample"] and "model" in loaded["sample"]
    assert "clip" not in loaded["decode"] and "vae" in loaded["decode"]
    assert all(difference <= 1e-4 for difference in report["eviction"]["differences"])


def test_decode_that_runs_out_of_memory_falls_back_to_tiles(report):
    tiles = report["out of memory"]["tiles"]
    assert tiles[0] == [16, 16] and len(tiles) > 4
    assert all(height * width <= 64 for height, width in tiles[1:])
    assert report["out of memory"]["mean difference"] < 0.1


@pytest.mark.parametrize("index", range(3), ids=["room for all", "for half", "for a fifth of the transformer"])
def test_a_graph_takes_no_more_memory_than_with_comfyuis_own_model(peaks, index):
    """Beside the weights that are loaded, too, which are far more than all that a step needs."""
    run = peaks["peaks"][index]
    ours, native = run["ours"], run["native"]
    assert ours["before"] == native["before"] == 0
    assert ours["loaded"] == native["loaded"] > 0
    for stage in ("encode", "sample", "decode"):
        assert ours[stage] <= 1.001 * native[stage], stage
    assert ours["sample"] - ours["loaded"] <= 1.001 * (native["sample"] - native["loaded"])
    assert run["latents differ"] <= 1e-4 and run["images differ"] <= 1e-4


def test_the_encoder_leaves_before_the_transformer_when_room_is_needed(peaks):
    """ComfyUI asks those first that have the least weights: the VAE, of a fiftieth of the encoder's, before both."""
    sizes, order = peaks["leaving"]["sizes"], peaks["leaving"]["order"]
    assert 0 < sizes["vae"] < sizes["clip"] < sizes["model"]
    assert order == ["vae", "clip", "model"]


def test_nothing_stays_on_the_device_when_models_are_unloaded(peaks):
    assert {name: size for name, size in peaks["left over"].items() if size} == {}


@pytest.mark.parametrize(("run", "batch"), [("one", 1), ("batch", 2), ("guidance", 2), ("chosen attention", 1)])
def test_the_cpu_waits_for_nothing_inside_a_step(peaks, run, batch):
    assert peaks["waits"][run] == 2 * [{"to device": 0, "from device": 0, "values": 0, "batch": batch}]
    assert min(peaks["waits"]["calls of the chosen attention by step"]) > 5


@pytest.mark.parametrize("run", ["plain, LoRA", "gguf", "gguf, LoRA", "marked", "marked, LoRA"])
def test_the_cpu_waits_for_nothing_inside_a_step_of_a_file(peaks, run):
    """Expanding a weight needs nothing from the CPU; a LoRA is in the weights, or its factors lie beside them."""
    assert peaks["waits of files"][run] == 2 * [{"to device": 0, "from device": 0, "values": 0, "batch": 1}]


def test_a_step_that_makes_the_cpu_wait_is_noticed(peaks):
    assert peaks["waits"]["one that looks"] == 2 * [{"to device": 1, "from device": 1, "values": 1}]


def test_the_cpu_waits_for_nothing_between_steps(peaks):
    """Numbers that are not finite are looked for on the device, and asked for when the run is over."""
    found = peaks["waits"]["between steps"]
    assert found == peaks["waits"]["unwatched"]
    assert found == {"to device": 1, "from device": 0, "values": 0}  # ComfyUI brings the prompt in every step
