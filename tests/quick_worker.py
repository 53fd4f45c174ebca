"""The process that talks to a hub, without its second of imports: a process that has them forks for each.

Stands in for `download.WORKER`, and runs it: what it reads, prints and is told, and how it ends, are its own. Only the
library's own modules are imported in it, since they read the environment.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOCKET = "QUICK_WORKER_SOCKET"
WORKER = Path(__file__).resolve().parents[1] / "zimage_core" / "hub" / "worker.py"


@contextmanager
def ready() -> Iterator[str]:
    """The address for `SOCKET` in the environment, while the process with the imports runs."""
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "socket")
        command = [sys.executable, __file__, "serve", address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin and process.stdout and process.stdout.readline() == b"ready\n"
            try:
                yield address
            finally:
                process.stdin.close()


def serve(address: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        import huggingface_hub.file_download
        import huggingface_hub.hf_api  # noqa: F401

        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
        print("ready", flush=True)
        # standard input ends with the tests, even if they are killed
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                run(connection)
            connection.close()


def run(connection: socket.socket) -> None:
    """One worker, on the standard streams of the process that asks for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # it ends with the one that asked, whose standard streams it holds
    threading.Thread(target=lambda: connection.recv(1) or os._exit(1), daemon=True).start()
    pause = time.sleep
    time.sleep = lambda seconds: pause(seconds / 20)  # before the library tries again
    arguments, environment, folder = json.loads(message)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(WORKER), *arguments]
    sys.path.insert(0, str(WORKER.parent))  # as Python does for a script
    runpy.run_path(str(WORKER), run_name="__main__")
    sys.stdout.flush()
    connection.send(b"0")
    os._exit(0)


def ask() -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        message = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
        socket.send_fds(connection, [message], [0, 1, 2])
        return 0 if connection.recv(1) else 1


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(ask())
