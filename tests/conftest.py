"""What all tests share. Tiny models and their factories are in the folders that use them."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import quick_worker
from .helpers import NANO, ROOT

# Before torch is imported: tiny tensors on many threads spend their time on waking threads. Processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same for processes that compile: each imports torch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Nothing here may reach for a model hub; a test that tries fails at once, the same way everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
# Said here, before workers are started, so that one run has one, midnight or not.
os.environ.setdefault("FUZZ_SEED", datetime.date.today().isoformat())

# Where Python may not leave bytecode beside the sources, it goes here: else each process, a server or a worker that
# compiles, would take 10 to 20 seconds to compile torch, transformers and ComfyUI anew.
if sys.dont_write_bytecode and sys.pycache_prefix is None:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(ROOT / "build" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

sys.path.append(str(ROOT / ".ci"))  # setup, provision, host, browser and workflow are scripts, not a package


def pytest_report_header() -> str:
    return f"fuzz seed: {os.environ['FUZZ_SEED']}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def quick_workers() -> Iterator[str]:
    """Their address: see quick_worker.py."""
    with quick_worker.ready() as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running Chromium, or a skip where there is none; not in continuous integration, where that is an error.

    It leaves with the file that asked for it: until then playwright's event loop runs, and asyncio.run refuses to.
    """
    import browser

    if browser.program() is None and not os.environ.get("CI"):
        pytest.skip(browser.MISSING)
    with browser.start() as running:
        yield running


@pytest.fixture(scope="session")
def control_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control network for the nano model that steers at random: it was not trained."""
    import torch
    from safetensors.torch import save_file

    from nano import train_control
    from zimage_core.weights.snapshot import Snapshot

    torch.manual_seed(0)
    network = train_control.build(Snapshot(NANO).transformer(dtype=torch.float32))
    for block in (network.noise_refiner[0], network.layers[0]):
        torch.nn.init.normal_(block.after_proj.weight, std=0.05)
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    config = json.dumps(train_control.published(network.config))
    save_file(train_control.file_of(network), path, metadata={"zimage.control.config": config})
    return path


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far of numbers that are not finite."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]


# What takes longest, before the many small files, with which the processes come to their ends together.
LONGEST = [
    "tests/nodes/test_gpu_work.py",  # not long: after compiled tests in its process it counts more launches
    "tests/nano/test_model.py",
    "tests/browser/",
    "tests/host/",
    "tests/test_benchmarks.py",
    "tests/nodes/test_memory.py",
    "tests/nodes/test_attention.py",
    "tests/nodes/test_flags.py",
    "tests/nodes/test_packed",
    "tests/nodes/test_vae.py",
    "tests/test_blocks.py",
    "tests/nodes/test_compile.py",
    "tests/nodes/test_unread_encoder.py",
    "tests/test_download.py",
]

SCRIPTED = [f"tests/nodes/test_{name}.py" for name in ("memory", "packed_paging", "vae")]


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` says
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("one_in") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for those in cases.values():
        (n,) = those[0].get_closest_marker("one_in").args
        those.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))  # any order that is none of the parameters'
        for item in those[math.ceil(len(those) / n) :]:
            item.add_marker("slow")

    def place(item: pytest.Item) -> int:
        return next((n for n, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))

    items.sort(key=place)


OWN_SERVERS = ("tests/host/test_memory.py", "tests/host/test_versions.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """In several processes, each file goes to one, for its fixtures; files that share a dearer one go together.

    That is a server (one for each version of ComfyUI), or the process in which scripts of tests/nodes run.
    Each of the nano model's tests goes alone: with all prompts they are the longest, and they share nothing dear.
    """
    import browser
    import provision
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file.startswith("tests/browser/"):
                return next((f"browser {one}" for one in browser.FRONTENDS if one in nodeid), "browser default")
            if file.startswith("tests/host/") and file not in OWN_SERVERS:
                return f"host {provision.OLDEST if provision.OLDEST in nodeid else provision.NEWEST}"
            if file in SCRIPTED:
                return "scripts"
            return nodeid if file == "tests/nano/test_model.py" else file

    return Scheduling(config, log)
