"""A prompt, a real ComfyUI with this pack, an image: queues the nano text-to-image workflow over the server's API."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import provision
import workflow
from host import Client, ExecutionFailed, HostError, PromptRejected, Server
from provision import ROOT, SetupError

PROMPT = "a large red star on a blue background"

DONE, TO_DO = "\N{FULL BLOCK}", "\N{LIGHT SHADE}"


def main() -> int:
    args = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    try:
        seconds = make(args)
    except (HostError, PromptRejected, ExecutionFailed, SetupError, ValueError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; ComfyUI is stopped", file=sys.stderr)
        return 130
    path = args.output.relative_to(Path.cwd()) if args.output.is_relative_to(Path.cwd()) else args.output
    print(f"{path}  {seconds[1]:.1f} s for the image, {sum(seconds):.1f} s with the start of ComfyUI")
    return 0


def make(args: argparse.Namespace) -> tuple[float, float]:
    """Writes the image; returns the seconds that the server's start and the image took."""
    prompt = workflow.load("zimage_nano_txt2img")
    workflow.set_text(prompt, args.prompt)
    if args.negative is not None:
        workflow.set_text(prompt, args.negative, "negative")
    chosen = {"seed": args.seed, "steps": args.steps, "guidance_scale": args.guidance}
    workflow.set_sampler(prompt, **{name: value for name, value in chosen.items() if value is not None})
    if args.width or args.height:
        workflow.set_size(prompt, args.width or args.height, args.height or args.width)

    print(f"Prompt   {args.prompt}\nModel    Z-Image-Nano, a tiny model for demonstration and tests")
    started = time.perf_counter()
    server = Server(provision.newest(), packs={"comfyui-zimage": ROOT})
    try:
        server.start(lambda waited: _show(f"ComfyUI  starting, {waited:.0f} s"))
        ready = time.perf_counter()
        _show(f"ComfyUI  {provision.release(server.comfyui)}, started in {ready - started:.1f} s", last=True)
        with server.connect() as client:
            image = _draw(client, prompt)
        done = time.perf_counter()
    finally:
        server.stop()
    _write(args.output, image)
    return ready - started, done - ready


def _draw(client: Client, prompt: dict) -> bytes:
    sampler = workflow.only(prompt, workflow.SAMPLER)

    def progress(node: str, value: int, total: int) -> None:
        if node == sampler:
            _show(f"Sampling {DONE * (24 * value // total):{TO_DO}<24} {value}/{total}", last=value == total)

    _show("Loading the model")
    images = client.images(client.run(prompt, progress))
    if not images:
        raise ValueError("the workflow ran and saved no image; does it end in a Save Image node?")
    return images[0]


def _write(path: Path, image: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(image)
    os.replace(partial, path)


def _show(text: str, last: bool = False) -> None:
    """One line that is written over on a terminal; elsewhere only its last state is printed."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{text}", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--prompt", default=PROMPT, help="what to show; the nano model knows colors, shapes, places and counts")
    add("--negative", help="what to avoid; needs guidance")
    add("--seed", type=int, help="the workflow's own if left out, like all of the following")
    add("--steps", type=int)
    add("--guidance", type=float, help="0 = off")
    add("--width", type=int, help="pixels, divisible by 16; 64 to 256 are what the model has seen")
    add("--height", type=int)
    add("--output", type=lambda text: Path(text).resolve(), default=ROOT / "output" / "demo.png")
    return parser


if __name__ == "__main__":
    sys.exit(main())
