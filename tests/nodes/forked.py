"""Runs scripts of this folder, each in a process of its own, with ComfyUI and the pack imported once for all.

Each registers a device with torch, or replaces ComfyUI's library for paging, and that would stay for the next.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT = 300  # seconds for a script


class Scripts:
    """Calls scripts: one process imports what they need, and forks for each."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, script: str, *arguments: str) -> dict[str, Any]:
        """What its main(*arguments) returns, which JSON can hold."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([script, *arguments]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer.startswith("{"), f"{script} {arguments} failed or took over {LIMIT} s; stderr has its traceback"
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def serve() -> None:
    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
    answers = os.dup(1)
    os.dup2(2, 1)  # for what ComfyUI prints
    importlib.import_module("tests.nodes")  # before ComfyUI, which has a folder `tests`, is on the path
    importlib.import_module("inside").load_pack("use_pytorch_cross_attention")
    gc.freeze()  # what is imported stays, and to look through it takes a third of a second each time
    for line in sys.stdin:
        child = os.fork()  # nothing has used threads yet
        if child == 0:
            signal.alarm(LIMIT)
            os._exit(answer(answers, *json.loads(line)))
        if os.waitpid(child, 0)[1]:
            os.write(answers, b"\n")


def answer(to: int, script: str, *arguments: str) -> int:
    try:
        found = json.dumps(importlib.import_module(script).main(*arguments)) + "\n"
        with os.fdopen(to, "w") as stream:
            stream.write(found)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    serve()
