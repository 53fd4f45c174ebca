"""The command line: `python -m zimage_core generate "A cat sitting on a windowsill"`."""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from . import image_files
from .errors import CheckpointError
from .hub import download
from .hub.download import Progress, Repository
from .model.tokenizer import without_halves
from .pipeline import ZImagePipeline
from .prompts.cache import PromptCache
from .sampling import request
from .sampling.control import STRENGTH, Control
from .weights.snapshot import open_component

NANO = Path(__file__).resolve().parent.parent / "nano" / "snapshot"  # ships beside this package in a checkout


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 if it succeeded, 2 if the input was wrong, 130 if it was interrupted."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in another encoding
    try:
        return generate(args)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, no image was written", file=sys.stderr)
        return 130


def generate(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    output = args.output or Path(f"zimage-{datetime.now():%Y%m%d-%H%M%S}.png")
    image_files.check_output(output)  # before the weights are read: nobody waits for an image that can't be saved
    folder = _model_folder(args)
    parts = {"transformer": args.transformer, "text_encoder": args.text_encoder, "vae": args.vae}
    size = None if args.image else open_component(args.vae or folder, "vae").config.sample_size
    image = None if args.image is None else image_files.read(args.image)
    mask = None if args.mask is None else image_files.read(args.mask, 1)
    control = _controls(args)
    width, height = (given or size for given in (args.width, args.height))
    width, height = request.size(width, height, image)
    seed = random.randrange(2**32) if args.seed is None else args.seed
    device = torch.device("cpu") if args.cpu else _best_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    print(f"Prompt    {args.prompt}")
    if args.negative_prompt:
        print(f"Negative  {args.negative_prompt}")
    print(f"Model     {folder}")
    for kind, place in (*parts.items(), ("tokenizer", args.tokenizer)):
        if place is not None:
            print(f"  {kind.replace('_', ' ')}: {place}")
    print(f"Settings  {width}x{height}, {args.steps} steps, guidance {args.guidance_scale:g}, seed {seed}, {device}")
    if args.image:
        print(f"Image     {args.image}, strength {request.strength_of(args.strength, mask):g}")
    if args.mask:
        print(f"Mask      {args.mask}")
    for one, shown in zip(control, args.control_image or [None] * len(control), strict=True):
        print(f"Control   {one.path}, strength {one.strength:g}" + (f", of {shown}" if shown else ""))
    if args.negative_prompt and args.guidance_scale <= 0:
        print("Note      the negative prompt has no effect without guidance (--guidance-scale above 0)")

    cache = None if args.prompt_cache is None else PromptCache(args.prompt_cache)
    pipe = ZImagePipeline.from_pretrained(
        folder,
        device=device,
        dtype=dtype,
        **parts,
        tokenizer=args.tokenizer,
        prompt_cache=cache,
        safe_retry=not args.no_safe_retry,
    )
    for (_, strength), file in zip(args.lora, pipe.set_loras(*args.lora), strict=True):
        print("\n  ".join([f"LoRA      strength {strength:g}", *file.report().splitlines()]))
    with _bar(total=args.steps, desc="Sampling", unit="step") as bar:

        def advance(step: int, steps: int, *_: object) -> None:
            bar.total = steps  # fewer where it begins with an image
            bar.update(step - bar.n)  # backwards, where sampling starts over

        made = pipe.generate(
            args.prompt,
            args.negative_prompt,
            width=width,
            height=height,
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            seed=seed,
            image=image,
            strength=args.strength,
            mask=mask,
            control=control,
            callback=advance,
        )  # [1, 3, H, W]
    image_files.save(made[0], output, _parameters(args, width, height, seed, folder))
    print(f"Saved     {output} ({time.perf_counter() - started:.1f} s)")
    return 0


def _parameters(args: argparse.Namespace, width: int, height: int, seed: int, folder: Path) -> str:
    lines = [args.prompt]
    if args.negative_prompt:
        lines.append(f"Negative prompt: {args.negative_prompt}")
    lines.append(
        f"Steps: {args.steps}, Sampler: Euler, CFG scale: {args.guidance_scale + 1:g}, "
        f"Seed: {seed}, Size: {width}x{height}, Model: {folder.name if folder != NANO else 'Z-Image-Nano'}"
        + "".join(f", LoRA: {path.name}:{strength:g}" for path, strength in args.lora)
        + (f", Denoising strength: {request.strength_of(args.strength, args.mask):g}" if args.image else "")
        + "".join(f", Control: {path.name}:{strength:g}" for path, strength in _with_strengths(args))
    )
    return "\n".join(lines)


def _controls(args: argparse.Namespace) -> list[Control]:
    """Raises ValueError unless each control network has its image."""
    images: list[Path | None] = args.control_image or [None] * len(args.control)
    if len(images) != len(args.control):
        raise ValueError(f"{len(images)} --control-image for {len(args.control)} --control; give each its own")
    return [
        Control(path, None if image is None else image_files.read(image), strength)
        for (path, strength), image in zip(_with_strengths(args), images, strict=True)
    ]


def _with_strengths(args: argparse.Namespace) -> list[tuple[Path, float]]:
    """Each control file with its strength, the last one given for all that follow."""
    strengths = [*args.control_strength, *(args.control_strength[-1:] or [STRENGTH]) * len(args.control)]
    return list(zip(args.control, strengths, strict=False))


def _model_folder(args: argparse.Namespace) -> Path:
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
    with _bar(unit="B", unit_scale=True) as bar:

        def tell(progress: Progress) -> None:
            bar.total = progress.total
            bar.set_description(progress.file, refresh=False)
            bar.update(progress.done - bar.n)

        download.fetch(repository, folder, needed, tell)
    return folder


def _models_folder() -> Path:
    """ComfyUI's, if this is a pack in its custom_nodes, else `models` in the working directory."""
    nodes = NANO.parents[2]
    return nodes.parent / "models" if nodes.name == "custom_nodes" else Path("models")


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _bar(**settings: Any) -> Any:
    from tqdm import tqdm

    return tqdm(dynamic_ncols=True, **settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m zimage_core", description="Z-Image from the command line.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "generate", help="make an image", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = command.add_argument
    add("prompt", type=without_halves, help="what to show")
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
        "--lora",
        type=_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to add, strength 1 if not given; repeatable",
    )
    add("-o", "--output", type=Path, help="file to write, its extension chooses the format; default: dated .png here")
    add("--width", type=_size, help="pixels, divisible by 16; default: the model's own size")
    add("--height", type=_size, help="pixels, divisible by 16; default: the model's own size")
    add("-s", "--steps", type=_positive, default=8, help="model evaluations: 8 for Turbo, 28-50 for Base")
    add("-g", "--guidance-scale", type=_guidance, default=0.0, help="0 = off (Turbo), 3-5 for Base (= CFG - 1)")
    add("--negative-prompt", type=without_halves, help="what to avoid; needs guidance")
    add("--seed", type=_seed, help="whole number from 0; random if left out")
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
    add("--image", type=Path, metavar="IMG", help="image to begin with; its size is made if none is given")
    add("--strength", type=float, metavar="S", help="share of the steps to run on --image: default 0.6, with --mask 1")
    add("--mask", type=Path, metavar="IMG", help="white where --image is repainted, black where it stays as it is")
    add(
        "--control",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="Fun-Controlnet-Union file to steer with; repeatable",
    )
    add(
        "--control-image",
        type=Path,
        action="append",
        default=[],
        metavar="IMG",
        help="what it follows (edges, depth, pose, ...), one for each --control; with --mask it may be left out",
    )
    add(
        "--control-strength",
        type=float,
        action="append",
        default=[],
        metavar="S",
        help=f"of the --control in the same place, {STRENGTH:g} if not given",
    )
    add("--cpu", action="store_true", help="use the processor even if there is a GPU")
    return parser


def _lora(text: str) -> tuple[Path, float]:
    path, colon, strength = text.rpartition(":")
    if not colon or "/" in strength or "\\" in strength or strength.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        return Path(path), float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: strength {strength!r} is not a number") from None


def _size(text: str) -> int:
    value = _positive(text)
    if value % 16:
        raise argparse.ArgumentTypeError(
            f"{value} is not divisible by 16; the nearest is {max(16, round(value / 16) * 16)}"
        )
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^64 - 1")
    return int(text)


def _guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 (off) up")
    return value


if __name__ == "__main__":
    sys.exit(main())
