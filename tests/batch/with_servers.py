"""What tests of batches across servers share: servers that stand in, and runs that use them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from zimage_core.batch import worker

from ..helpers import ROOT
from .making import Run
from .stand_in import StandIn

WORKFLOW = ROOT / "workflows" / "api" / "zimage_nano_txt2img_api.json"


@pytest.fixture(autouse=True)
def hasty(monkeypatch) -> None:
    monkeypatch.setattr(worker, "POLL", (0.01, 0.05))


@pytest.fixture
def one() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@pytest.fixture
def two() -> Iterator[tuple[StandIn, StandIn]]:
    with StandIn() as first, StandIn() as second:
        yield first, second


def run_of(folder, rows, *servers: StandIn, options=()) -> Run:
    urls = [word for server in servers for word in ("--comfyui", server.url)]
    return Run(folder, rows, *urls, "--workflow", str(WORKFLOW), "--width", "64", "--height", "48", "--quiet", *options)


def texts(server: StandIn) -> list[str]:
    return [nodes["4"]["inputs"]["text"] for nodes in server.ran]


def soon(true, seconds=10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def held(run: Run, server: StandIn) -> threading.Thread:
    """The run, begun in a thread, with two prompts in the server's queue, where they stay."""
    server.held = True
    thread = threading.Thread(target=run)
    thread.start()
    soon(lambda: len(server.pending) == 2)
    return thread
