"""The command line: `python -m zimage_core generate "A cat sitting on a windowsill"`."""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import time
from datetime import datetime
from pathlib import Path

from . import image_files, options
from .batch import command as batch
from .errors import CheckpointError
from .model.tokenizer import without_halves
from .parallel.team import Team
from .pipeline import ZImagePipeline
from .prompts.cache import PromptCache
from .sampling import request
from .sampling.control import STRENGTH, Control
from .weights.snapshot import open_component


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 if it succeeded, 1 if some of a batch failed, 2 for wrong input, 130 if interrupted."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in another encoding
    try:
        return int(args.run(args))
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(args.interrupted, file=sys.stderr)
        return 130


def generate(args: argparse.Namespace) -> int:
    """An image, by this process or by all that torchrun has started."""
    team = Team.of_environment(args.cpu)
    if team is None:
        return _generate(args, None)
    try:
        with contextlib.nullcontext() if team.leads else contextlib.redirect_stdout(io.StringIO()):
            status = _generate(args, team)
    except (CheckpointError, ValueError, OSError) as error:
        if team.leads:
            raise
        print(f"process {team.rank}: error: {error}", file=sys.stderr)  # perhaps of this machine alone
        return 2
    team.leave()
    return status


def _generate(args: argparse.Namespace, team: Team | None) -> int:
    leads = team is None or team.leads
    started = time.perf_counter()
    output = args.output or Path(f"zimage-{datetime.now():%Y%m%d-%H%M%S}.png")
    image_files.check_output(output)  # before the weights are read: nobody waits for an image that can't be saved
    folder = options.model_folder(args) if leads else None
    seed = random.randrange(2**32) if args.seed is None else args.seed
    if team is not None:
        seed = team.told(seed)
    folder = folder or options.model_folder(args)  # here once the first process has it: two can't download it
    parts = {"transformer": args.transformer, "text_encoder": args.text_encoder, "vae": args.vae}
    size = None if args.image else open_component(args.vae or folder, "vae").config.sample_size
    image = None if args.image is None else image_files.read(args.image)
    mask = None if args.mask is None else image_files.read(args.mask, 1)
    control = _controls(args)
    references = [image_files.read(path) for path in args.reference]
    width, height = (given or size for given in (args.width, args.height))
    width, height = request.size(width, height, image)
    device, dtype = options.device(args, None if team is None else team.device)

    print(f"Prompt    {args.prompt}")
    if args.negative_prompt:
        print(f"Negative  {args.negative_prompt}")
    print(f"Model     {folder}")
    for kind, place in (*parts.items(), ("tokenizer", args.tokenizer)):
        if place is not None:
            print(f"  {kind.replace('_', ' ')}: {place}")
    print(f"Settings  {width}x{height}, {args.steps} steps, guidance {args.guidance_scale:g}, seed {seed}, {device}")
    if team is not None:
        print(f"Together  {team.size} processes")
    if args.image:
        print(f"Image     {args.image}, strength {request.strength_of(args.strength, mask):g}")
    if args.mask:
        print(f"Mask      {args.mask}")
    for one, shown in zip(control, args.control_image or [None] * len(control), strict=True):
        print(f"Control   {one.path}, strength {one.strength:g}" + (f", of {shown}" if shown else ""))
    for path in args.reference:
        print(f"Reference {path}")
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
    pipe.team = team
    for (_, strength), file in zip(args.lora, pipe.set_loras(*args.lora), strict=True):
        print("\n  ".join([f"LoRA      strength {strength:g}", *file.report().splitlines()]))
    with options.bar(total=args.steps, desc="Sampling", unit="step", disable=not leads) as bar:

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
            references=references,
            output="image" if leads else "latents",
            callback=advance,
        )  # [1, 3, H, W]
    if not leads:
        return 0
    parameters = image_files.parameters(
        args.prompt,
        args.negative_prompt,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=seed,
        size=(width, height),
        model=options.model_name(folder),
        loras=args.lora,
        strength=request.strength_of(args.strength, mask) if args.image else None,
        control=_with_strengths(args),
        references=args.reference,
    )
    image_files.save(made[0], output, parameters)
    print(f"Saved     {output} ({time.perf_counter() - started:.1f} s)")
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m zimage_core", description="Z-Image from the command line.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "generate", help="make an image", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(run=generate, interrupted="interrupted, no image was written")
    add = command.add_argument
    add("prompt", type=without_halves, help="what to show")
    options.add_model(command)
    options.add_sampling(command)
    add("-o", "--output", type=Path, help="file to write, its extension chooses the format; default: dated .png here")
    add("--seed", type=options.seed, help="whole number from 0; random if left out")
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
    add(
        "--reference",
        type=Path,
        action="append",
        default=[],
        metavar="IMG",
        help="image that Z-Image Omni or Edit sees beside the prompt; repeatable",
    )
    batch.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
