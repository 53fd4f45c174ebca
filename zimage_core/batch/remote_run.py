"""A batch across ComfyUI servers: checked with all of them, fanned out by a worker for each, saved here."""

from __future__ import annotations

import argparse
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from .. import image_files
from .folder import Lost, NoRoom, Store
from .given import HELP, SHARED, Read, check_faults, counts
from .graph import Nodes, Workflow
from .names import Template, same
from .offers import Info, lacks
from .plan import Task
from .pool import Job, Pool
from .progress import Progress
from .reading import Fault
from .remote_plan import Plan
from .remote_rows import checked, resolved
from .results import Outcome
from .servers import Gone, Server
from .uploads import Uploads
from .worker import Orders, Said, Worker

Stop = Callable[[], bool]  # whether nothing more is wanted
PATIENCE = 600  # seconds
CLIENT = ".comfyui-client"  # holds who this folder is to the servers
WAITING = 16  # prompts whose images wait to be saved at most, before servers wait for them
NOT_HERE = {  # options of the local run -> what to do instead
    "model": "the workflow names the model",
    "download": "the workflow's loaders download",
    **{part: "the workflow names its files" for part in ("transformer", "text_encoder", "vae", "tokenizer")},
    "prompt_cache": "a server keeps its own",
    "no_safe_retry": "it is an input of the workflow's nodes",
    "cpu": "the servers choose",
    "lora": "put LoRA nodes into the workflow",
    "batch_size": "it is an input of the workflow's nodes",
    "max_prompt_tokens": "the workflow's nodes decide",
    "image": "put a LoadImage node into the workflow, and its image into a column such as 'Load Image.image'",
    "mask": "put a mask into the workflow",
    "references": "put TextEncodeZImageOmni into the workflow",
    "strength": "name the sampler's denoise as a column, such as 'Sampler.denoise'",
    **{name: "put a control node into the workflow" for name in ("control", "control_image", "control_strength")},
}


def prepared(args: argparse.Namespace, template: Template, read: Read) -> tuple[Remote, list[Fault]]:
    """The run, all of it checked, and the rows that are left out. Raises ValueError before anything is queued."""
    for name, instead in NOT_HERE.items():
        if getattr(args, name) not in (None, False, []):
            raise ValueError(f"--{name.replace('_', '-')} is not for ComfyUI servers: {instead}; leave it out")
    if args.workflow is None:
        raise ValueError("--comfyui needs the workflow that the servers run; add --workflow FILE_api.json")
    workflow = Workflow.read(args.workflow)
    servers = [Server(address) for address in dict.fromkeys(args.comfyui)]
    twice = len({server.url for server in servers}) < len(servers)
    if twice:
        raise ValueError("--comfyui names a server twice; leave one of them out")
    infos = _infos(servers)
    found, source, base = read
    uploads = Uploads(base)
    defaults = {name: value for name in (*SHARED, *HELP) if (value := getattr(args, name)) is not None}
    info = next(info for info in infos if not isinstance(info, Gone))
    columns = resolved(
        [*dict.fromkeys(name for record in found for name in record.values)], [*defaults], args.map, workflow, info
    )
    rows, faults = checked(found, columns, defaults, info, uploads)
    check_faults(rows, faults, source, args.skip_bad)
    plan = Plan(rows, columns, template, args.seed, counts(found, args.images or 1))
    values = plan.values()
    wrong = [
        f"{server.url}: {fault}"
        for server, one in zip(servers, infos, strict=True)
        if not isinstance(one, Gone)
        for fault in lacks(one, workflow, values)
    ]
    if wrong:
        raise ValueError("\n".join(["some servers can't run this workflow; put that right, or leave them out", *wrong]))
    remote = Remote(
        plan, uploads, servers, infos, args.comfyui_patience or PATIENCE, lambda info: lacks(info, workflow, values)
    )
    return remote, faults


def _infos(servers: Sequence[Server]) -> list[Info | Gone]:
    """What each server offers, or why it doesn't answer. Raises ValueError if none does."""

    def ask(server: Server) -> Info | Gone:
        try:
            return server.info()
        except Gone as error:
            return error

    with ThreadPoolExecutor(len(servers)) as threads:
        found = [*threads.map(ask, servers)]
    if all(isinstance(one, Gone) for one in found):
        told = [f"  {server.url}: {one}" for server, one in zip(servers, found, strict=True)]
        raise ValueError(
            "\n".join(["no ComfyUI server answers; start one, or put its address right in --comfyui", *told])
        )
    return found


class Remote:
    """The images of a plan, made by servers."""

    told = "what waits in the servers' queues is taken back, what runs there is fetched by the next run"

    def __init__(
        self,
        plan: Plan,
        uploads: Uploads,
        servers: Sequence[Server],
        infos: Sequence[Info | Gone],
        patience: float,
        lacks: Callable[[Info], list[str]],
    ):
        self._plan = plan
        self._uploads = uploads
        self._servers = servers
        self._infos = infos
        self._patience = patience
        self._lacks = lacks
        self._names = {same(task.file) for task in plan.tasks}
        self._known: set[tuple[int, int]] = set()  # images that are planned, or were made by this run
        self._owned: set[tuple[tuple[int, int], str | None]] = set()  # files of the journal
        info = next(info for info in infos if not isinstance(info, Gone))
        self._savers = {name for name, node in info.items() if node.get("output_node")}

    def tasks(self, done: Sequence[Outcome]) -> list[Task]:
        found = self._plan.with_known(done)
        self._known = {task.place for task in found}
        self._owned = {((one.row, one.image), one.file) for one in done}
        return found

    def start(self, folder: Store, progress: Progress) -> Callable[[Sequence[Task], Stop], Iterator[Outcome]]:
        client = folder.text(CLIENT)
        if not client:
            client = uuid.uuid4().hex
            folder.write(CLIENT, client.encode())
        for server, one in zip(self._servers, self._infos, strict=True):
            if isinstance(one, Gone):
                progress.note(f"{server.url} doesn't answer ({one}); the others begin without it")
        return lambda todo, stopped: self._outcomes(todo, stopped, folder, progress, client or "")

    def nodes(self, job: Job) -> Nodes:
        nodes = self._plan.nodes(job.task)
        if job.fresh:
            for content in nodes.values():
                if content["class_type"] in self._savers:
                    content["inputs"]["zimage_batch"] = job.fresh  # no input of any node: it only makes this one new
        return nodes

    def jobs(self, todo: Sequence[Task]) -> list[Job]:
        """The prompts that give these images."""
        firsts = {task.place: task for task in self._plan.tasks}
        found: dict[tuple[int, int], Job] = {}
        for task in todo:
            first = self._plan.first(task)
            job = found.setdefault(first, Job(firsts[first], {}))
            job.wanted[self._plan.output(task)] = task
        return [*found.values()]

    def _outcomes(
        self, todo: Sequence[Task], stopped: Stop, folder: Store, progress: Progress, client: str
    ) -> Iterator[Outcome]:
        pool = Pool(self.jobs(todo))
        heard: queue.Queue[Said] = queue.Queue(WAITING)
        orders = Orders(client, self.nodes, self._uploads, self._plan.workflow.title, self._lacks, heard.put)
        workers = [
            Worker(server, pool, orders, not isinstance(info, Gone))
            for server, info in zip(self._servers, self._infos, strict=True)
        ]
        try:
            for worker in workers:
                worker.greet()  # before any takes a row that sits in another's queue
            for worker in workers:
                worker.start()
            while not pool.closed.is_set():
                if stopped():
                    break
                try:
                    said = heard.get(timeout=0.1)
                except queue.Empty:
                    self._check(workers)
                    continue
                yield from self._said(said, pool, folder, progress)
        finally:
            pool.closed.set()
            left = _joined(workers, heard)
        for said in left:
            yield from self._said(said, pool, folder, progress)

    def _said(self, said: Said, pool: Pool, folder: Store, progress: Progress) -> Iterator[Outcome]:
        if said.note is not None:
            progress.note(said.note)
        if said.job is None:
            return
        for task, raw in self._images(said):
            yield self._saved(task, raw, said, folder)
        pool.end(said.job)

    def _images(self, said: Said) -> Iterator[tuple[Task, bytes | None]]:
        """What is to be saved or has failed; the first image last: once it has its line, so have the others."""
        assert said.job is not None
        wanted = dict(said.job.wanted)
        found: list[tuple[Task, bytes | None]] = []
        for number, raw in enumerate(said.images, 1):
            if number in wanted:
                found.append((wanted.pop(number), raw))
            elif number > 1 and not self._is_known(said.job, number):
                found.append((self._plan.further(said.job.task, number), raw))
        found += [(task, None) for task in wanted.values()]
        return iter(sorted(found, key=lambda one: one[0].image, reverse=True))

    def _is_known(self, job: Job, output: int) -> bool:
        return (job.task.row.number, (output - 1) * job.task.row.images + job.task.image) in self._known

    def _saved(self, task: Task, raw: bytes | None, said: Said, folder: Store) -> Outcome:
        planned = task.place in self._known
        self._known.add(task.place)
        if raw is None:
            few = f"the workflow gave {len(said.images)} images this time, this was one more"
            return Outcome.failed(task, said.seconds, said.error or few)
        try:
            if not planned and self._is_in_the_way(task, folder):
                raise FileExistsError(f"{task.file} is in the way; move it away, or choose another --name")
            content = image_files.stamped(raw, task.file[task.file.rindex(".") :], task.parameters)
            folder.write(task.file, content)
        except NoRoom:
            raise
        except Exception as error:
            return Outcome.failed(task, said.seconds, f"it can't be saved: {type(error).__name__}: {error}")
        return Outcome.done(task, said.seconds)

    def _is_in_the_way(self, task: Task, folder: Store) -> bool:
        """Whether the name of an image that nobody had planned is that of something else."""
        if same(task.file) in self._names:
            return True
        own = (task.place, task.file) in self._owned or folder.holds(task.file, task.parameters)
        return folder.exists(task.file) and not own

    def _check(self, workers: Sequence[Worker]) -> None:
        """Raises Lost once all have been away for longer than anybody waits."""
        if all(worker.useless for worker in workers):
            raise Lost("no server that is left can run this workflow; see above, then run the same command again")
        if all(worker.away for worker in workers):
            away = time.monotonic() - max(worker.seen for worker in workers)
            if away > self._patience:
                raise Lost(
                    f"no server has answered for {away:.0f} s; start one, then run the same command again: it goes on "
                    "where this run stopped"
                )


def _joined(workers: Sequence[Worker], heard: queue.Queue[Said]) -> list[Said]:
    """Waits until the workers have taken back what they had queued, and returns what they still had to say."""
    left = []
    deadline = time.monotonic() + 10  # a server that hangs is left to itself
    for worker in workers:
        while worker.is_alive() and time.monotonic() < deadline:
            try:
                left.append(heard.get(timeout=0.05))  # a full queue would hold them up
            except queue.Empty:
                continue
    while not heard.empty():
        left.append(heard.get())
    return left
