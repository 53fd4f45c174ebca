"""What all tests share. Tiny models and their factories are in the folders that use them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported: tiny tensors on many threads spend their time on waking threads.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
# Nothing here may reach for a model hub; a test that tries fails at once, the same way everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"

sys.path.append(str(ROOT / ".ci"))  # setup, provision, host and workflow are scripts, not a package


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT
