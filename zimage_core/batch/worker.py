"""One ComfyUI server at work: a thread that keeps two prompts in its queue, and fetches what they give."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .graph import Nodes
from .offers import Info
from .pool import Job, Pool
from .servers import Ended, Gone, Missing, Refused, Server
from .uploads import Uploads

DEPTH = 2  # own prompts in a queue: one runs, one waits, so that the server never does
LONGEST_PAUSE = 30.0  # seconds between two tries to reach a server that is away
POLL = 0.15, 1.0  # seconds between two looks, at first and at most
TRIES = 2  # calls that fail before a server counts as away; one that refuses to talk does at once
CRASHES, VANISHED = 4, 10  # of a prompt, before it is given up
MARK = "zimage_batch"  # under which a prompt tells in its extra_data which image it is


@dataclass
class Said:
    """What a worker tells: images of a job, or why it has none, or a note."""

    job: Job | None = None
    images: Sequence[bytes] = ()
    seconds: float = 0.0
    error: str | None = None
    note: str | None = None


@dataclass
class Orders:
    """What all workers of a run have in common."""

    client: str  # who queues, by which own prompts are told from other people's
    nodes: Callable[[Job], Nodes]
    uploads: Uploads
    title: Callable[[str], str]
    lacks: Callable[[Info], list[str]]
    say: Callable[[Said], None]


@dataclass
class Flight:
    """A job in a server's queue."""

    job: Job
    since: float = field(default_factory=time.monotonic)
    running: bool = False


class Unreadable(Exception):
    """An image that is to be sent can't be read here any more."""


class Worker(threading.Thread):
    """worker = Worker(server, pool, orders)
    worker.start()
    It ends when the pool is closed, and then takes its own prompts out of the server's queue.
    """

    def __init__(self, server: Server, pool: Pool, orders: Orders, checked: bool):
        """checked: whether this server is known to be there, and to have all that the workflow needs."""
        super().__init__(daemon=True, name=server.url)
        self.server = server
        self.useless = False  # it lacks something
        self._pool = pool
        self._orders = orders
        self._flights: dict[str, Flight] = {}  # prompt id ->
        self._failures = 0
        self._sent: set[str] = set()  # images of ours that it has
        self._known = checked
        self._told = not checked  # that it is away
        self._again = True  # whether its queue may hold prompts of ours that aren't in flight
        self.seen = time.monotonic()  # when it last answered

    @property
    def away(self) -> bool:
        return self.useless or self._told

    def greet(self) -> None:
        """`meet`, before the thread starts, if the server is there."""
        if self._known:
            with contextlib.suppress(Gone):
                self.meet()

    def run(self) -> None:
        pause = POLL[0]
        while not self._pool.closed.wait(pause) and not self.useless:
            try:
                if self._again:
                    self.meet()
                    if self.useless:
                        break
                pause = POLL[0] if self._work() else min(pause * 1.3, POLL[1])
                self.seen = time.monotonic()
                self._failures = 0
            except Gone as error:
                pause = self._lost(error)
            except Exception as error:  # a fault of ours must not leave its rows without anybody
                self._orders.say(Said(note=f"{self.server.url}: {type(error).__name__}: {error}"))
                pause = self._lost(Gone(str(error), refused=True))
        with contextlib.suppress(Gone):
            self.server.timeout = min(self.server.timeout, 5.0)
            self.server.delete([*self._flights])

    def meet(self) -> None:
        """Takes up the prompts of ours that the server has: of a killed run, or of one that lost sight of it."""
        if not self._known:
            faults = self._orders.lacks(self.server.info())
            if faults:
                self.useless = True
                self._give_back()
                self._orders.say(Said(note=f"{self.server.url} is left out: {'; '.join(faults)}"))
                return
            self._known = True
        if self._told:
            self._told = False
            self._orders.say(Said(note=f"{self.server.url} is back"))
        ours = {place: prompt for prompt, place in ((p, str(f.job.mark)) for p, f in self._flights.items())}
        late = []
        for item in self.server.queue():
            mark = self._mark(item.extra)
            if mark is None or item.id in self._flights:
                continue
            if str(mark) in ours:  # queued under an id of the server's
                self._flights[item.id] = self._flights.pop(ours[str(mark)])
            elif (job := self._pool.claim(mark)) is not None:
                self._flights[item.id] = Flight(job, running=item.running)
            elif not item.running:
                late.append(item.id)
        self.server.delete(late)  # made elsewhere meanwhile, or of rows that have changed
        for ended in reversed(self.server.recent()):
            mark = self._mark(ended.extra)
            done = mark is not None and ended.id not in self._flights and not ended.error
            if done and any(ended.images.values()) and (job := self._pool.claim(mark)) is not None:
                self._flights[ended.id] = Flight(job)
        self._again = False

    def _work(self) -> bool:
        """One look at the server; whether something has come of it."""
        moved = False
        while len(self._flights) < DEPTH and not self._pool.closed.is_set():
            job = self._pool.take(self.server.url, busy=bool(self._flights))
            if job is None:
                break
            self._submit(job)
            moved = True
        if not self._flights:
            return moved
        # The queue first: what isn't in it any more has either ended, and is in the history, or is lost.
        queued = {item.id: item.running for item in self.server.queue()}
        for prompt, flight in [*self._flights.items()]:
            if prompt in queued:
                flight.running = queued[prompt]
                continue
            ended = self.server.ended(prompt)
            if ended is None:
                self._vanished(prompt, flight)
            else:
                self._fetch(ended, flight)
            moved = True
        if self._pool.wanted and len(self._flights) > 1:
            moved |= self._hand_on()
        return moved

    def _hand_on(self) -> bool:
        """Gives a prompt that waits here to a server that has none left: whether there was one."""
        prompt = next((prompt for prompt, flight in self._flights.items() if not flight.running), None)
        if prompt is None:
            return False
        self.server.delete([prompt])
        if any(item.id == prompt for item in self.server.queue()) or self.server.ended(prompt) is not None:
            return False  # it has begun meanwhile
        self._pool.give_back([self._flights.pop(prompt).job])
        return True

    def _submit(self, job: Job) -> None:
        prompt = str(uuid.uuid4())
        self._flights[prompt] = Flight(job)  # before it is sent: if no answer comes, it may be there all the same
        extra = {"client_id": self._orders.client, MARK: job.mark}
        nodes = self._orders.nodes(job)
        try:
            self._send_images(nodes, prompt)
            taken = self.server.submit(nodes, prompt, extra)
        except Unreadable as error:
            self._end(prompt, error=str(error))
        except Refused as error:
            self._end(prompt, error=f"{self.server.url} refuses it: {error.words(self._orders.title)}")
        else:
            self._flights[taken] = self._flights.pop(prompt)

    def _send_images(self, nodes: Nodes, prompt: str) -> None:
        """Those it lacks. Raises Unreadable, Refused, and Gone, with the prompt given back: it is not queued."""
        for place in self._orders.uploads.of(nodes):
            if place in self._sent:
                continue
            content = self._content(place)
            try:
                self.server.upload(place, content)
            except Gone:
                self._pool.give_back([self._flights.pop(prompt).job])
                raise
            self._sent.add(place)

    def _content(self, place: str) -> bytes:
        try:
            return self._orders.uploads.content(place)
        except OSError as error:  # not the server's fault, as `Gone` would be
            raise Unreadable(str(error)) from None

    def _fetch(self, ended: Ended, flight: Flight) -> None:
        seconds = time.monotonic() - flight.since if ended.seconds is None else ended.seconds
        if ended.error is not None:
            node, words = ended.error
            where = f"{self._orders.title(node)}: " if node else ""
            self._end(ended.id, seconds, error=f"{where}{words} ({self.server.url})")
            return
        try:
            images = [self.server.view(image) for image in _saved(ended, self._orders.nodes(flight.job))]
        except Missing:
            images = []
        if images:
            self._end(ended.id, seconds, images)
        elif not flight.job.fresh:
            # It knew this prompt already, and told no images, or has deleted them since.
            flight.job.fresh = uuid.uuid4().hex
            del self._flights[ended.id]
            self._submit(flight.job)
        else:
            self._end(ended.id, seconds, error=f"{self.server.url} ran it and gave no image")

    def _vanished(self, prompt: str, flight: Flight) -> None:
        flight.job.vanished += 1
        if flight.job.vanished >= VANISHED:
            self._end(prompt, error=f"{self.server.url} and others lost it {VANISHED} times; look into their logs")
            return
        del self._flights[prompt]
        self._pool.give_back([flight.job])

    def _lost(self, error: Gone) -> float:
        """Gives its prompts to the others, and says how long to wait before it is asked again."""
        self._again = True
        self._pool.leave(self.server.url)
        self._sent.clear()
        self._failures += 1
        if self._failures >= TRIES or error.refused:
            self._give_back()
            self._known = False  # it may come back as another
            if not self._told:
                self._told = True
                told = f"{self.server.url} doesn't answer ({error}); its rows go to others, or wait until it is back"
                self._orders.say(Said(note=told))
        return float(min(0.5 * 2 ** (self._failures - 1), LONGEST_PAUSE))

    def _give_back(self) -> None:
        back = []
        for prompt, flight in [*self._flights.items()]:
            flight.job.crashes += flight.running
            if flight.job.crashes >= CRASHES:
                self._end(prompt, error=f"{CRASHES} times a server went away while it ran this; look into their logs")
            else:
                back.append(flight.job)
        self._flights.clear()
        self._pool.give_back(back)

    def _end(self, prompt: str, seconds: float = 0.0, images: Sequence[bytes] = (), error: str | None = None) -> None:
        job = self._flights.pop(prompt).job
        self._orders.say(Said(job, images, seconds, error))

    def _mark(self, extra: Any) -> Any:
        return extra.get(MARK) if extra.get("client_id") == self._orders.client else None


def _saved(ended: Ended, nodes: Nodes) -> list[Any]:
    """What is saved, else what is shown, in the order in which the workflow has its nodes."""
    order = {node: number for number, node in enumerate(nodes)}
    images = [
        image
        for node in sorted(ended.images, key=lambda node: order.get(node.partition(".")[0], len(order)))
        for image in ended.images[node]
    ]
    fields = ("filename", "subfolder", "type")
    for kind in ("output", "temp"):
        if found := [image for image in images if image.get("type") == kind and image.get("filename")]:
            return [{name: str(image.get(name, "")) for name in fields} for image in found]
    return []
