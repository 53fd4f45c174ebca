"""`python -m zimage_core batch PROMPTS --output FOLDER`: its options, and one run from the file to the folder."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import options
from . import names
from .folder import Lost, NoRoom, Store
from .given import HELP, SHARED, check_faults, counts, read
from .identity import Fingerprints, of_model
from .plan import Model, Task, tasks
from .progress import Bar, Lines, Progress, Quiet
from .reading import Fault, Record
from .results import Outcome, Results
from .rows import COLUMNS, Row, checked
from .uri_folder import opened

if TYPE_CHECKING:
    from .ray_run import Cluster

Stop = Callable[[], bool]  # whether to leave off after the step that runs
ALL_DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130  # exit statuses; 2 is for what was wrong with the input


def add_to(commands: Any) -> None:
    """Adds the command to those of a parser."""
    command: argparse.ArgumentParser = commands.add_parser(
        "batch",
        help="make many images, of a file of prompts",
        description="Makes an image of each row of a file. The same command again makes what is missing. Options are "
        "for the rows that leave that column out.",
    )
    command.set_defaults(run=run, interrupted="interrupted before the first image; nothing is lost")
    add = command.add_argument
    add("prompts", metavar="PROMPTS", help=".jsonl, .csv or .txt (a prompt a line), or - for standard input")
    add(
        "-o",
        "--output",
        required=True,
        metavar="FOLDER",
        help="where images and results.jsonl go; a URI such as s3://bucket/folder, too",
    )
    add(
        "--name",
        default=names.DEFAULT,
        metavar="TEMPLATE",
        help=f"of each file, with the fields {', '.join(names.FIELDS)}; its extension (.png, .webp, .jpg) chooses the "
        f"format; default: {names.DEFAULT.replace('%', '%%')}",
    )
    add("--seed", type=options.seed, default=0, help="of the first image, each further one gets the next; default: 0")
    add(
        "--batch-size",
        type=options.positive,
        metavar="N",
        help="images sampled together at most; 1: each is bit for bit what generate makes; default: what is fastest",
    )
    for switch, told in (
        ("--skip-bad", "go on without rows that are wrong, and list them"),
        ("--redo-changed", "make images again whose row or settings have changed since"),
        ("--retry-failed", "try rows that fail once more at the end"),
        ("--quiet", "tell errors and a last line only"),
        ("--json", "tell one JSON object a line on standard output"),
    ):
        add(switch, action="store_true", help=told)
    for column, told in HELP.items():
        add(f"--{column.replace('_', '-')}", type=_of_column(column), metavar="X", help=told)
    add(
        "--comfyui",
        action="append",
        default=[],
        metavar="URL",
        help="let this running ComfyUI make the images, by --workflow; repeatable",
    )
    add("--workflow", type=Path, metavar="FILE", help="what the servers run, in API format")
    add(
        "--map",
        action="append",
        default=[],
        metavar="COLUMN=TITLE.INPUT",
        help="the node's input that a column fills, where it isn't clear; repeatable",
    )
    add(
        "--comfyui-patience",
        type=options.positive,
        metavar="SECONDS",
        help="how long to wait while no server answers; default: 600",
    )
    ray = command.add_argument_group("on a Ray cluster")
    ray.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="make the images there: at auto or host:port, or without an address on this machine alone",
    )
    ray.add_argument(
        "--ray-actors",
        type=options.positive,
        metavar="N",
        help="processes that hold the model; default: one for each GPU, or without GPUs one for each machine",
    )
    ray.add_argument(
        "--ray-gpus",
        type=_amount,
        metavar="F",
        help="GPUs of each, 0.5 for two on one; default: 1 where the cluster has GPUs, else 0",
    )
    ray.add_argument(
        "--ray-cpus",
        type=_amount,
        metavar="C",
        help="CPUs of each; default: 1 beside a GPU, else all of the smallest machine, shared by --ray-actors",
    )
    ray.add_argument(
        "--ray-tries",
        type=options.positive,
        metavar="N",
        help="an image whose worker died so often is given up; default: 3",
    )
    options.add_model(command)
    options.add_sampling(command)
    command.set_defaults(steps=None, guidance_scale=None)  # those of `Row`, for servers those of the workflow


def _of_column(column: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return COLUMNS[column](text, Path.cwd())
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return read


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1024 or (value > 1 and not value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share (0 to 1) nor a whole number")
    return value


Making = Callable[[Sequence[Task], Stop], Iterator[Outcome]]  # of tasks, what became of each, once it is saved


class Work(Protocol):
    """What makes the images of a run."""

    def tasks(self, done: Sequence[Outcome]) -> list[Task]:
        """All that there are to be. done: what the journal tells of earlier runs."""

    def start(self, folder: Store, progress: Progress) -> Making:
        """Loads what is needed."""

    @property
    def told(self) -> str:
        """What Control-C brings about."""


def run(args: argparse.Namespace) -> int:
    """0 if all images are there, 1 if some failed or there was no room, 130 if interrupted. Raises ValueError."""
    template = names.Template(args.name)
    with ExitStack() as ending:
        work, faults = _servers(args, template) if args.comfyui else _models(args, template, ending.enter_context)
        folder = opened(args.output)
        ending.enter_context(folder.lock())
        results = Results(folder)
        ending.callback(results.close)
        if results.torn:
            told = f"the last line of results.jsonl was unfinished ({results.torn} bytes) and is cut off"
            print(f"note: {told}; its image is looked for", file=sys.stderr)
        planned = work.tasks(results.latest)
        pending = results.pending(planned, args.redo_changed)
        folder.clean(task.file for task in planned)
        kind: type[Progress] = Lines if args.json else Quiet if args.quiet else Bar
        progress = kind(planned, pending)
        for fault in faults:
            progress.note(f"left out: {fault}")
        return _make(work, pending, folder, results, progress, args.retry_failed)


def _servers(args: argparse.Namespace, template: names.Template) -> tuple[Work, list[Fault]]:
    from .remote_run import prepared

    if args.ray is not None:
        raise ValueError("--comfyui and --ray can't be used together; leave one of them out")
    return prepared(args, template, read(args, needed=None))


class Local:
    """On this machine, by one maker."""

    told = "the step that runs is finished and images are saved"

    def __init__(self, settings: dict[str, Any], planned: list[Task]):
        self._settings = settings
        self._planned = planned

    def tasks(self, done: Sequence[Outcome]) -> list[Task]:
        return self._planned

    def start(self, folder: Store, progress: Progress) -> Making:
        from .maker import Maker, Settings
        from .run import outcomes

        maker = Maker(Settings(**self._settings))
        return lambda todo, stopped: outcomes(maker.make(todo, stopped), folder)


class OnCluster(Local):
    """On the machines of a Ray cluster, by a maker for each actor."""

    told = "the workers are ended, saved images stay"

    def __init__(self, settings: dict[str, Any], planned: list[Task], cluster: Cluster):
        super().__init__(settings, planned)
        self._cluster = cluster

    def start(self, folder: Store, progress: Progress) -> Making:
        from .maker import Settings

        return lambda todo, stopped: self._cluster.make(Settings(**self._settings), folder, todo, stopped)


def _models(
    args: argparse.Namespace, template: names.Template, entered: Callable[[AbstractContextManager[Cluster]], Cluster]
) -> tuple[Work, list[Fault]]:
    """Here or on a cluster, which `entered` ends with the run."""
    for name in ("workflow", "map", "comfyui_patience"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for ComfyUI servers; add --comfyui http://host:8188")
    found, rows, faults = _rows(args)
    wanted = _wanted(args)
    cluster = None if wanted is None else entered(_cluster(wanted))
    prints = Fingerprints()
    model_folder = options.model_folder(args)
    device, dtype = options.device(args) if cluster is None else options.precision(cluster.device(args.cpu))
    settings = {
        "model": str(model_folder),
        **{part: None if (place := getattr(args, part)) is None else str(place) for part in PARTS},
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "prompt_cache": None if args.prompt_cache is None else str(args.prompt_cache),
        "safe_retry": not args.no_safe_retry,
        "batch_size": args.batch_size,
    }
    model = _model(settings, options.model_name(model_folder), prints)
    planned = tasks(rows, template, args.seed, model, prints, counts(found, args.images or 1))
    return Local(settings, planned) if cluster is None else OnCluster(settings, planned, cluster), faults


PARTS = ("transformer", "text_encoder", "vae", "tokenizer")


def _wanted(args: argparse.Namespace) -> dict[str, Any] | None:
    """What is asked of a cluster, by the names of `ray_run.Wanted`; None where --ray is not given."""
    given = {name: value for name in RAY if (value := getattr(args, f"ray_{name}")) is not None}
    if args.ray is not None:
        return {"address": args.ray, **given}
    if given:
        raise ValueError(f"--ray-{next(iter(given))} is for a Ray cluster; add --ray")
    return None


RAY = ("actors", "gpus", "cpus", "tries")


def _cluster(wanted: dict[str, Any]) -> Cluster:
    from .ray_run import Cluster, Wanted

    return Cluster(Wanted(**wanted))


def _rows(args: argparse.Namespace) -> tuple[list[Record], list[Row], list[Fault]]:
    """All rows as they stand in the file, those that can be made, and what is wrong with those that are left out."""
    found, source, base = read(args)
    defaults = {name: value for name in (*SHARED, *HELP) if (value := getattr(args, name)) is not None}
    defaults["loras"] = tuple((os.path.abspath(path), strength) for path, strength in args.lora)
    missing = [path for path, _ in defaults["loras"] if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"--lora: there is no such file ({missing[0]})")
    rows, faults = checked(found, base, defaults)
    check_faults(rows, faults, source, args.skip_bad)
    return found, rows, faults


def _model(settings: dict[str, Any], name: str, prints: Fingerprints) -> Model:
    from ..weights.snapshot import open_component

    parts = {part: settings[part] for part in PARTS if part != "tokenizer"}
    identity = of_model(settings["model"], parts, settings["tokenizer"], settings["dtype"], prints)
    return Model(name, identity, open_component(settings["vae"] or settings["model"], "vae").config.sample_size)


def _make(work: Work, pending: Sequence[Task], folder: Store, results: Results, progress: Progress, retry: bool) -> int:
    status = SOME_FAILED
    try:
        with interruptible(work.told) as stopped:
            outcomes = work.start(folder, progress) if pending else None
            progress.begin()
            for attempt in range(2 if retry else 1):
                again = {(one.row, one.image) for one in progress.failed}
                todo = pending if attempt == 0 else [task for task in pending if task.place in again]
                if outcomes is None or not todo or stopped():
                    break
                for outcome in outcomes(todo, stopped):
                    results.record(outcome)
                    progress.saw(outcome)
            if stopped() and progress.done < progress.images:
                progress.end("interrupted")
                print("interrupted; run the same command again to go on", file=sys.stderr)
                return INTERRUPTED
    except NoRoom as error:
        progress.end("stopped")
        print(f"error: {error.strerror} ({error.filename})", file=sys.stderr)
        return SOME_FAILED
    except Lost as error:
        progress.end("stopped")
        print(f"error: {error}", file=sys.stderr)
        return SOME_FAILED
    except BaseException:
        progress.close()
        raise
    status = SOME_FAILED if progress.failed else ALL_DONE
    progress.end("failed" if progress.failed else "done")
    return status


@contextmanager
def interruptible(told: str) -> Iterator[Callable[[], bool]]:
    """Whether Control-C was pressed, inside of which it raises nothing; pressed again, it ends the process at once.

    told: what the first brings about.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            os._exit(INTERRUPTED)  # what is half written is removed by the next run
        pressed = True
        os.write(2, f"\ninterrupted: {told}; again ends at once\n".encode())

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # only the main thread may listen
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
