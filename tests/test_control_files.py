"""Which control network a file holds, from what is in it; and what is said of files that are something else."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.config import ControlConfig
from zimage_core.errors import CheckpointError
from zimage_core.model.control import ControlNetwork
from zimage_core.weights.snapshot import open_component
from zimage_core.weights.specs import SPECS

from .helpers import NANO

# how its makers call it -> (channels of its input, layers, whether its refiner gives hints, the places of its layers)
PUBLISHED = {
    "Union 1.0": (16, 6, None, (0, 5, 10, 15, 20, 25)),
    "Union 2.0": (33, 15, False, tuple(range(0, 30, 2))),
    "Union 2.1": (33, 15, True, tuple(range(0, 30, 2))),
    "Union 2.1 lite": (33, 3, True, (0, 10, 20)),
}


def published_shapes(channels: int, layers: int, hints: bool | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file, of 1.5 to 6.7 GB."""
    refined = "blocks" if hints is None else "hints"  # in 2.0 they are there, too, and do nothing
    config = ControlConfig(3840, 30, 1e-5, channels, tuple(range(layers)), 2, refined)
    names = {
        "x_embedder": "all_x_embedder.2-1",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
        "out.weight": "to_out.0.weight",
    }
    shapes = {}
    for name, parameter in ControlNetwork(config, device="meta").named_parameters():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        rows, *rest = parameter.shape
        for part in ("to_q", "to_k", "to_v") if "qkv" in name else ("",):
            shape = (rows // 3, *rest) if part else (rows, *rest)
            shapes[f"control_{name}".replace("qkv", part)] = shape
    return shapes


@pytest.mark.parametrize("version", PUBLISHED)
def test_published_files_are_recognized_by_what_they_hold(version):
    channels, layers, hints, places = PUBLISHED[version]
    shapes = published_shapes(channels, layers, hints)
    assert len(shapes) == {6: 136, 15: 295, 3: 91}[layers]  # as in the files
    after = torch.full((2, 2), float(hints or 0.0))
    config = SPECS["control"].config_of(shapes, {}, "m.safetensors", lambda key: {AFTER: after}[key])
    assert config.version == version
    assert (config.in_channels, config.places, config.n_refiner_layers) == (channels, places, 2)
    assert (config.dim, config.n_heads, config.norm_eps) == (3840, 30, 1e-5)
    assert config.inpaints == (channels == 33)


AFTER = "control_noise_refiner.0.after_proj.weight"


def test_others_are_named(tmp_path):
    """Control files in the loaders of other networks, and theirs where a control network is wanted."""
    path = tmp_path / "control.safetensors"
    save_file({"control_all_x_embedder.2-1.weight": torch.zeros(8, 64)}, path)
    for kind in ("transformer", "text_encoder", "vae"):
        with pytest.raises(CheckpointError, match="this is a Z-Image control network"):
            open_component(path, kind)
    with pytest.raises(CheckpointError, match="this is a Z-Image transformer, not a Z-Image control network"):
        open_component(NANO / "transformer" / "diffusion_pytorch_model.safetensors", "control")
    save_file({"input_hint_block.0.weight": torch.zeros(8, 64)}, path)
    with pytest.raises(CheckpointError, match="this is a ControlNet"):
        open_component(path, "control")


def test_sizes_that_nobody_published_are_told_with_their_numbers(tmp_path):
    path = tmp_path / "control.safetensors"
    config = ControlConfig(64, 2, 1e-5, 20, (0, 1), 2, "hints")
    state = ControlNetwork(config).state_dict()
    save_file({f"control_{name}".replace("x_embed", "all_x_embed").replace("der.", "der.2-1."): value.contiguous()
               for name, value in state.items()}, path)  # fmt: skip
    with pytest.raises(CheckpointError, match="width 64 with 20 input channels and 2 layers"):
        open_component(path, "control")


def test_a_damaged_config_names_the_key(tmp_path):
    path = tmp_path / "control.safetensors"
    config = {"_class_name": "ZImageControlNetModel", "all_patch_size": [2], "dim": 64, "n_heads": 2}
    for places, words in (([1, 2], r"control_layers_places is \[1, 2\]"), (None, "control_layers_places is None")):
        stored = {**config, "norm_eps": 1e-5, "control_in_dim": 33, "control_layers_places": places}
        metadata = {"zimage.control.config": json.dumps(stored)}
        save_file({"control_all_x_embedder.2-1.weight": torch.zeros(64, 132)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=words):
            open_component(path, "control")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dim": 128}, "the width of this control network is 128, of the transformer 192"),
        ({"n_heads": 8}, "the number of heads of this control network is 8"),
        ({"n_refiner_layers": 2}, "the number of refiner blocks of this control network is 2"),
        ({"places": (0, 6)}, "steers layer 6, and the transformer has 6 layers"),
    ],
)
def test_networks_for_other_transformers_are_refused(change, words):
    numbers = {"dim": 192, "n_heads": 4, "n_refiner_layers": 1, "places": (0,), **change}
    config = ControlConfig(norm_eps=1e-5, in_channels=16, refined="blocks", **numbers)
    transformer = open_component(NANO, "transformer").config
    with pytest.raises(ValueError, match=words):
        ControlNetwork(config, device="meta").check(transformer)
