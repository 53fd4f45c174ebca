"""What the commands share: options, the model that they name, the device, a progress bar."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .hub import download
from .hub.download import Progress, Repository
from .model.tokenizer import without_halves

NANO = Path(__file__).resolve().parent.parent / "nano" / "snapshot"  # ships beside this package in a checkout


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model draws, where its parts come from, and on what it runs."""
    add = parser.add_argument
    add(
        "-m",
        "--model",
        help="snapshot folder, all-in-one file, or repository of the Hugging Face hub (Org/Name, Org/Name@revision); "
        "else the built-in nano model",
    )
    add("--download", action="store_true", help="fetch what is missing of the repository; nothing is fetched without")
    add("--transformer", type=Path, help="single file or snapshot to take the transformer from, instead of --model")
    add("--text-encoder", type=Path, help="single file or snapshot to take the text encoder from")
    add("--vae", type=Path, help="single file or snapshot to take the VAE from")
    add("--tokenizer", type=Path, help="snapshot or tokenizer folder; needed where the text encoder is a single file")
    add(
        "--prompt-cache",
        type=Path,
        metavar="FOLDER",
        help="keep encoded prompts there (512 MB at most): for a known one the text encoder is not read",
    )
    add(
        "--no-safe-retry",
        action="store_true",
        help="fail where values are not finite (a black image), instead of computing that stage again with more room",
    )
    add("--cpu", action="store_true", help="use the processor even if there is a GPU")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """What each image is to be."""
    add = parser.add_argument
    add(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to add, strength 1 if not given; repeatable",
    )
    add("--width", type=size, help="pixels, divisible by 16; default: the model's own size")
    add("--height", type=size, help="pixels, divisible by 16; default: the model's own size")
    add("-s", "--steps", type=positive, default=8, help="model evaluations: 8 for Turbo, 28-50 for Base")
    add("-g", "--guidance-scale", type=guidance, default=0.0, help="0 = off (Turbo), 3-5 for Base (= CFG - 1)")
    add("--negative-prompt", type=without_halves, help="what to avoid; needs guidance")


def model_folder(args: argparse.Namespace) -> Path:
    if args.model is not None:
        return Path(args.model) if os.path.exists(args.model) else _downloaded(args)
    if not os.path.isdir(NANO):
        raise CheckpointError(
            f"no --model given, and the built-in nano model is not at {NANO} (it comes with a checkout of the "
            "repository, not with the installed package); name the folder of a Z-Image snapshot"
        )
    return NANO


def _downloaded(args: argparse.Namespace) -> Path:
    """The snapshot of the repository that --model names, downloaded if --download says so."""
    try:
        repository = Repository.parse(args.model)
    except ValueError:
        raise CheckpointError(
            "there is no such file or folder, and it is no repository (Org/Name or Org/Name@revision)", args.model
        ) from None
    needed = [kind for kind in ("transformer", "text_encoder", "vae") if getattr(args, kind) is None]
    root = _models_folder() / "zimage"
    found = download.find(repository, [root])
    if found is not None and download.is_complete(found, needed):
        return found
    folder = root / repository.folder_name
    if not args.download:
        raise download.missing(repository, folder, needed, "Add --download to fetch it into that folder.")
    with bar(unit="B", unit_scale=True) as shown:

        def tell(progress: Progress) -> None:
            shown.total = progress.total
            shown.set_description(progress.file, refresh=False)
            shown.update(progress.done - shown.n)

        download.fetch(repository, folder, needed, tell)
    return folder


def _models_folder() -> Path:
    """ComfyUI's, if this is a pack in its custom_nodes, else `models` in the working directory."""
    nodes = NANO.parents[2]
    return nodes.parent / "models" if nodes.name == "custom_nodes" else Path("models")


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def model_name(folder: Path) -> str:
    """What images say made them."""
    return "Z-Image-Nano" if folder == NANO else folder.name


def device(args: argparse.Namespace, own: torch.device | None = None) -> tuple[torch.device, torch.dtype]:
    """Where it runs, and in what. own: the device that this process was given."""
    return precision(own or ("cpu" if args.cpu else best_device()))


def precision(device: str | torch.device) -> tuple[torch.device, torch.dtype]:
    """A device, and in what it computes."""
    found = torch.device(device)
    return found, torch.float32 if found.type == "cpu" else torch.bfloat16


def bar(**settings: Any) -> Any:
    from tqdm import tqdm

    return tqdm(dynamic_ncols=True, **settings)


def lora(text: str) -> tuple[Path, float]:
    path, strength = lora_parts(text)
    try:
        return Path(path), 1.0 if strength is None else float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: strength {strength!r} is not a number") from None


def lora_parts(text: str) -> tuple[str, str | None]:
    """File and strength, which stands behind the last colon; None without one."""
    path, colon, strength = text.rpartition(":")
    if not colon or "/" in strength or "\\" in strength or strength.endswith(".safetensors"):
        return text, None
    return path, strength


def size(text: str) -> int:
    value = positive(text)
    if value % 16:
        raise argparse.ArgumentTypeError(
            f"{value} is not divisible by 16; the nearest is {max(16, round(value / 16) * 16)}"
        )
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^64 - 1")
    return int(text)


def guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 (off) up")
    return value
