"""The run on a Ray cluster: chunks of tasks go to actors that hold the model, what became of each image comes back.

The driver alone writes the journal; images are written where they are made, and never travel. Ray runs the chunk of a
worker that died on another one, for ever; marks in the output folder (see `attempts`) end that for an image that kills
whoever makes it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import queue
import re
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .attempts import Attempts
from .folder import Lost, NoRoom, Store
from .maker import Settings, Stop, grouped, kind_of
from .plan import Task
from .ray_worker import Job, Worker, packed
from .results import Outcome

CHUNK = 16  # tasks that are sent together at most, unless more are sampled together
ROUNDS = 4  # chunks that each actor is to get at least, so that none waits long for the last one
WAIT = 10.0  # seconds for a thread to see that its cluster was left
LOCAL = ""  # the address of a cluster that is started and ended here
MISSING = "--ray needs Ray; pip install 'comfyui-zimage[ray]'"


@dataclass(frozen=True)
class Wanted:
    """What is asked of a cluster. address: `LOCAL`, auto or host:port. None: what fits, see `sizes`."""

    address: str = LOCAL
    actors: int | None = None
    gpus: float | None = None
    cpus: float | None = None
    tries: int = 3

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.address not in (LOCAL, "auto") and not re.fullmatch(r"\[?[\w.:%-]+\]?:\d+", self.address):
            raise ValueError(
                f"--ray {self.address!r} is no address; give auto or host:port. Where PROMPTS was meant, put it before "
                "--ray"
            )


@dataclass(frozen=True)
class Sizes:
    """Of one run: how many actors, and what each takes."""

    actors: int
    gpus: float
    cpus: float


def sizes(wanted: Wanted, machines: Sequence[Mapping[str, float]]) -> Sizes:
    """machines: what each has, as Ray tells it ({"CPU": 8, "GPU": 2}).

    One actor for each GPU; without GPUs one for each machine, on all the CPUs that the smallest has. Raises ValueError
    where not one would fit.
    """
    has_gpus = any(machine.get("GPU", 0) for machine in machines)
    gpus = wanted.gpus if wanted.gpus is not None else (1.0 if has_gpus else 0.0)
    suited = [machine for machine in machines if machine.get("GPU", 0) >= gpus and machine.get("CPU", 0) > 0]
    if wanted.cpus is not None:
        cpus = wanted.cpus
    elif gpus:
        cpus = 1.0
    else:
        cpus = min((machine["CPU"] for machine in suited), default=1.0)
        if wanted.actors is not None and suited:  # so many are to fit
            cpus = max(1.0, min(cpus, sum(machine["CPU"] for machine in suited) // wanted.actors))
    room = sum(_room(machine, gpus, cpus) for machine in suited)
    if room == 0:
        raise ValueError(
            f"no machine of the Ray cluster has {gpus:g} GPUs and {cpus:g} CPUs for one actor; see --ray-gpus"
        )
    return Sizes(wanted.actors or room, gpus, cpus)


def _room(machine: Mapping[str, float], gpus: float, cpus: float) -> int:
    by_cpu = math.inf if cpus == 0 else machine.get("CPU", 0) // cpus
    whole = machine.get("GPU", 0)
    by_gpu = math.inf if gpus == 0 else whole // gpus if gpus >= 1 else whole * (1 / gpus // 1)
    found = min(by_cpu, by_gpu)
    return 1 if math.isinf(found) else int(found)


def chunks(tasks: Sequence[Task], actors: int, batch_size: int | None = None) -> list[list[Task]]:
    """The tasks cut into what is sent together, those of one LoRA and of one kind side by side."""
    size = max(CHUNK, batch_size or 0)
    size = max(1, min(size, math.ceil(len(tasks) / (actors * ROUNDS))))
    if batch_size is not None and size > batch_size:
        size -= size % batch_size
    made = []
    for of_lora in grouped(tasks, lambda task: task.row.loras):
        alike = [task for group in grouped(of_lora, kind_of) for task in group]
        made += [alike[begin : begin + size] for begin in range(0, len(alike), size)]
    return made


class Cluster:
    """with Cluster(Wanted()) as cluster:
        for outcome in cluster.make(settings, store, tasks, stopped): ...

    Raises ValueError where Ray is missing or not reached, and where no actor fits.
    """

    worker: type[Worker] = Worker

    def __init__(self, wanted: Wanted):
        self.wanted = wanted
        self._ray = _imported()
        self._connected = False
        self._witness = Witness()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors, and the cluster if it was started here."""
        if self._connected:
            self._connected = False
            try:
                self._ray.shutdown()
            finally:
                self._witness.dismiss()

    def device(self, cpu: bool) -> str:
        """What the actors run on: "cuda" or "cpu"."""
        if cpu:
            self.wanted = replace(self.wanted, gpus=0.0)
        elif self.wanted.gpus is None and self.wanted.address == LOCAL:  # known before it is started
            self.wanted = replace(self.wanted, gpus=float(torch.cuda.is_available()))
        gpus = self._sizes().gpus if self.wanted.gpus is None else self.wanted.gpus
        return "cuda" if gpus else "cpu"

    def _sizes(self) -> Sizes:
        if not self._connected:
            self._connect()
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sizes(self.wanted, machines)

    def _connect(self) -> None:
        options: dict[str, Any] = {"address": self.wanted.address}
        if self.wanted.address == LOCAL:
            options = {"address": "local", "include_dashboard": False, "object_store_memory": 300 * 2**20}
            if self.wanted.actors is not None and self.wanted.cpus is not None:  # more than there are may be asked for
                options["num_cpus"] = max(os.cpu_count() or 1, math.ceil(self.wanted.actors * self.wanted.cpus))
        try:
            with _without_stderr():
                self._ray.init(logging_level=logging.CRITICAL, log_to_driver=False, **options)
        except Exception as error:  # of many kinds, each with pages of advice
            where = "can't be started" if self.wanted.address == LOCAL else f"at {self.wanted.address} can't be reached"
            raise ValueError(f"the Ray cluster {where} ({_told(error)})") from None
        self._connected = True
        self._witness.begin()

    def make(self, settings: Settings, store: Store, tasks: Sequence[Task], stop: Stop) -> Iterator[Outcome]:
        """What became of each image, as it becomes known. `stop` ends the actors at once; what they saved is told.

        Raises NoRoom, `Lost`, and ValueError for a model that can't be loaded.
        """
        sizes = self._sizes()
        attempts = Attempts(store, uuid.uuid4().hex[:12])
        work = chunks(tasks, sizes.actors, settings.batch_size)
        absolute: dict[str, Any] = {name: _absolute(getattr(settings, name)) for name in PATHS}
        settings = replace(settings, **absolute)
        job = Job(settings, store, attempts.run, self.wanted.tries, sizes.actors + self.wanted.tries, sizes.gpus)
        said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        attempts.begin()
        thread = threading.Thread(target=self._stream, args=(job, work, sizes, said.put), daemon=True)
        thread.start()
        missing = {task.place for task in tasks}
        finished = False
        try:
            while not finished and not stop():
                try:
                    kind, value = said.get(timeout=0.2)
                except queue.Empty:
                    continue
                if kind == "outcome":
                    missing.discard((value.row, value.image))
                    yield value
                elif kind == "no room":
                    raise NoRoom(*value)
                elif kind == "fatal":
                    raise ValueError(f"a worker can't go on: {value}")
                elif kind == "lost":
                    raise Lost(f"the Ray cluster stopped working ({value}); run the same command again to go on")
                finished = kind == "end"
            if finished and missing:
                raise Lost(f"Ray gave no answer for {len(missing)} images; run the same command again to make them")
            if not finished:
                self.close()
                thread.join(WAIT)
                yield from _saved(attempts, store, work, missing, 2 * sizes.actors)
        finally:
            if not finished:
                self.close()
                thread.join(WAIT)
            with contextlib.suppress(OSError):
                attempts.end()

    def _stream(self, job: Job, work: list[list[Task]], sizes: Sizes, say: Callable[[tuple[str, Any]], None]) -> None:
        """In a thread: the driver's own is to hear Control-C while Ray waits."""
        try:
            data = self._ray.data.from_items(
                [{"number": number, "tasks": packed(tasks)} for number, tasks in enumerate(work)],
                override_num_blocks=len(work),
            ).map_batches(
                self.worker,
                batch_size=1,
                compute=self._ray.data.ActorPoolStrategy(size=sizes.actors),
                fn_constructor_kwargs={"job": job},
                num_cpus=sizes.cpus,
                num_gpus=sizes.gpus or None,
            )
            for block in data.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
                for line in block["told"]:
                    say(pickle.loads(line))
            say(("end", None))
        except BaseException as error:
            say(("lost", _told(error)))


class Witness:
    """A process that says what has happened if this one ends without a word, as Ray wants where a cluster is gone."""

    MESSAGE = (
        "error: the process of this run is gone: killed, interrupted twice, or ended by Ray because its cluster "
        "stopped working; run the same command again to go on, with --ray or without"
    )
    CODE = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        command = [sys.executable, "-ES", "-c", self.CODE, self.MESSAGE]
        with contextlib.suppress(OSError):  # a run does without
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Control-C is not for it
            )

    def dismiss(self) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.communicate("this process goes on by itself", timeout=WAIT)
            self._process = None


SETTINGS = {  # read when Ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else what runs on in a thread, when a cluster was left, looks for another one
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # of this process, and of a cluster that it starts
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # what raylets have to say of workers that died
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns that this will be the default
}
PATHS = ("model", "transformer", "text_encoder", "vae", "tokenizer", "prompt_cache")


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _saved(
    attempts: Attempts, store: Store, work: list[list[Task]], missing: set[tuple[int, int]], more: int
) -> Iterator[Outcome]:
    """Images that were saved, but not told of when the actors ended: up to the last chunk that was begun, and some."""
    begun = [int(name.rpartition("-")[2]) for name in attempts.left() if name.startswith("chunk-")]
    for chunk in work[: max(begun) + 1 + more] if begun else ():
        for task in chunk:
            if task.place in missing and store.holds(task.file, task.parameters):
                yield Outcome.done(task, 0.0)


def _told(error: BaseException) -> str:
    """In one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """For what Ray's own code says there, whatever it is told: which level it has been told to tell."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _imported() -> Any:
    """Ray, quiet, and telling nobody that it is used. Raises ValueError where it is not installed."""
    os.environ.update(SETTINGS)
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError(MISSING) from None
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
    for handler in logging.getLogger("ray.data").handlers:
        own = type(handler).__module__.startswith("ray.")  # and not whoever listens there
        if own and isinstance(handler, logging.StreamHandler):  # its files are kept
            handler.setLevel(logging.CRITICAL + 1)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray
