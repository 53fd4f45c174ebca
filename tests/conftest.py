"""What all tests share. Tiny models and their factories are in the folders that use them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .helpers import ROOT

# Before torch is imported: tiny tensors on many threads spend their time on waking threads. Processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may reach for a model hub; a test that tries fails at once, the same way everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"

sys.path.append(str(ROOT / ".ci"))  # setup, provision, host and workflow are scripts, not a package


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far of numbers that are not finite."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """In several processes, each file goes to one, for its fixtures, and the host tests, for their servers.

    Each of the nano model's tests goes alone: they are the longest and share nothing that is dear.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file.startswith("tests/host/"):
                return "host"
            return nodeid if file == "tests/nano/test_model.py" else file

    return Scheduling(config, log)
