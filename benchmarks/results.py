"""RESULTS.md: one section for each benchmark, rewritten by it, with the machine, the versions and the command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from datetime import date
from pathlib import Path

import torch

from zimage_core.backends import matmul

FILE = Path(__file__).with_name("RESULTS.md")
ROOT = FILE.parents[1]


def write(name: str, module: str, content: str) -> None:
    """Puts the content between this benchmark's marks, with when, where and how it was measured.

    module: of `benchmarks`, that is running; the command is told as it was given.
    """
    command = " ".join(["python -m benchmarks." + module, *(shlex.quote(word) for word in sys.argv[1:])])
    put(name, f"`{command}`, {date.today()}, {machine()}.\n\n{content}")


def put(name: str, content: str) -> None:
    """Puts the content between the marks of this name. Raises ValueError if there are none."""
    begin, end = f"<!-- {name}: written by the benchmark -->", f"<!-- end of {name} -->"
    text = FILE.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{FILE}: the marks {begin!r} and {end!r} are missing; the table belongs between them")
    head, tail = text.split(begin)[0], text.split(end)[1]
    FILE.write_text(f"{head}{begin}\n{content}\n{end}{tail}", encoding="utf-8")


def machine() -> str:
    """Processor, its instructions and memory, or the GPU; versions of what is compared."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        found = re.search(r"model name\s*: (.*)", info)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        kernels = torch.backends.cpu.get_cpu_capability()
        kernels += " with bfloat16" if matmul.multiplies(torch.bfloat16) else ""
        processor = found[1] if found else platform.processor()
        device = f"{processor} ({kernels}), {os.cpu_count()} cores, {memory:.0f} GB"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers")]
    return f"{device}; {', '.join(versions)}"
