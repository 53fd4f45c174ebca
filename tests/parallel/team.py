"""Teams of processes that make what one process makes: `python tests/parallel/team.py FOLDER SHAPES SIZE...`.

SHAPES are names of `SHAPES`, separated by commas, or "all". What a team of each size makes lies in
FOLDER/SIZE.safetensors afterwards, by the names of its cases, and what one process makes in FOLDER/1.safetensors. That
one imports and loads everything, and the others are its forks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nano import train_control  # noqa: E402
from zimage_core.config import ControlConfig, TransformerConfig  # noqa: E402
from zimage_core.model.control import ActiveControl, ControlNetwork  # noqa: E402
from zimage_core.model.reference import References, refine  # noqa: E402
from zimage_core.model.transformer import ZImageTransformer  # noqa: E402
from zimage_core.parallel.team import Team  # noqa: E402
from zimage_core.pipeline import ZImagePipeline  # noqa: E402
from zimage_core.sampling.control import Control  # noqa: E402
from zimage_core.weights.specs import PUBLISHED_TRANSFORMER  # noqa: E402

NANO = ROOT / "nano" / "snapshot"
WIDTH = 128  # of the nano model's caption features
# 6 heads: for 2, 3 and 6 processes
NUMBERS = {"dim": 192, "n_heads": 6, "n_layers": 3, "n_refiner_layers": 2, "cap_feat_dim": WIDTH, "in_channels": 16}
# latent height and width, lengths of captions: of sequences that 2 or 3 divide, and that they don't
SHAPES = {
    "small": (2, 2, [1]),
    "odd": (14, 22, [33]),
    "mixed captions": (14, 22, [5, 70, 33]),
    "one length": (10, 6, [20, 20]),
}


LOW = {"A": (4, 192), "B": (192, 4)}  # of the LoRA


def networks() -> tuple[ZImageTransformer, ControlNetwork]:
    torch.manual_seed(0)
    config = TransformerConfig(**{**PUBLISHED_TRANSFORMER, "axes_dims": (8, 12, 12), "patch_size": 2, **NUMBERS})
    own = ControlConfig(
        config.dim, 6, config.norm_eps, in_channels=33, places=(0, 2), n_refiner_layers=2, refined="hints"
    )
    found = ZImageTransformer(config), ControlNetwork(own)
    for network in found:
        for name, parameter in network.named_parameters():
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.1)
        network.requires_grad_(False)
    return found


def cases(
    pipe: ZImagePipeline, control: ControlNetwork, shapes: list[str], team: Team | None
) -> Iterator[tuple[str, Tensor]]:
    transformer = pipe.transformer
    for guided in (False, True):
        model = transformer if team is None else team.model(transformer, guided)
        for name in shapes:
            height, width, lengths = SHAPES[name]
            torch.manual_seed(1)
            captions = [torch.randn(length, WIDTH) for length in lengths]
            latents = torch.randn(len(captions), 16, height, width)
            steering = ActiveControl(control, torch.randn(1, 33, height, width), 0.7)
            images = list(range(len(captions)))
            if guided:
                captions += [torch.randn(length + 7, WIDTH) for length in lengths]
                latents, images = latents.repeat(2, 1, 1, 1), images * 2
            t = torch.full((len(latents),), 0.3)
            own = captions if team is None else model.refined(list, captions)
            case = f"{name}{' guided' if guided else ''}"
            yield case, model(latents, t, own)
            yield f"{case}, control", model(latents, t, own, controls=[steering], images=images)

            def beside(own, height=height, width=width):
                torch.manual_seed(2)
                shown = [torch.randn(1, 16, height + 2, width), torch.randn(1, 16, 4, 6)]
                return refine(transformer, own, References(shown), torch.float32)

            yield (
                f"{case}, references",
                model(latents, t, beside(captions) if team is None else model.refined(beside, captions)),
            )
    pipe.team = team
    with tempfile.TemporaryDirectory() as folder:
        lora, controls = files(Path(folder), control)
        red = torch.tensor([1.0, 0.2, 0.2]).view(1, 3, 1, 1).expand(1, 3, 64, 80)
        for name, settings in {
            "generate": {},
            "guidance": {"guidance_scale": 3.0, "negative_prompt": "blurry, gray", "cfg_truncation": 0.7},
            "all of it": {
                "image": red,
                "strength": 0.7,
                "guidance_scale": 2.0,
                "control": [Control(controls, red, end=0.6)],
                "batch_size": 2,
            },
        }.items():
            if name == "all of it":
                pipe.set_loras((lora, 0.8))
            prompts = ["a red circle on a blue background", "a green square"]
            yield name, pipe.generate(prompts, width=80, height=64, steps=3, seed=5, output="latents", **settings)


def files(folder: Path, control: ControlNetwork) -> tuple[Path, Path]:
    """A LoRA, and the control network."""
    generator = torch.Generator().manual_seed(3)
    name = "diffusion_model.layers.1.attention.to_q.lora_"
    low = {f"{name}{part}.weight": torch.randn(shape, generator=generator) / 4 for part, shape in LOW.items()}
    save_file(low, folder / "lora.safetensors")
    config = {"zimage.control.config": json.dumps(train_control.published(control.config))}
    save_file(train_control.file_of(control), folder / "control.safetensors", config)
    return folder / "lora.safetensors", folder / "control.safetensors"


def main(folder: Path, shapes: list[str], sizes: list[int]) -> None:
    pipe = ZImagePipeline.from_pretrained(NANO)
    pipe.transformer, control = networks()
    save(folder, pipe, control, shapes, None)
    pipe.set_loras()
    for size in sizes:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(size):
            if (child := os.fork()) == 0:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine calls itself
                team = Team.of_environment(cpu=True)
                assert team is not None
                save(folder, pipe, control, shapes, team)
                team.leave()
                os._exit(0)
            children.append(child)
        failed = [rank for rank, child in enumerate(children) if os.waitpid(child, 0)[1]]
        assert not failed, f"of {size} processes, these failed: {failed}"


@torch.inference_mode()
def save(folder: Path, pipe: ZImagePipeline, control: ControlNetwork, shapes: list[str], team: Team | None) -> None:
    made = {name: value.contiguous() for name, value in cases(pipe, control, shapes, team)}
    if team is None or team.leads:
        save_file(made, folder / f"{1 if team is None else team.size}.safetensors")


if __name__ == "__main__":
    chosen = list(SHAPES) if sys.argv[2] == "all" else sys.argv[2].split(",")
    main(Path(sys.argv[1]), chosen, [int(size) for size in sys.argv[3:]])
