"""A real ComfyUI with this pack in it: the server as a process of its own, and a client of its HTTP and websocket API.

with Server(provision.newest(), packs={"comfyui-zimage": ROOT}) as server, server.connect() as client:
    entry = client.run(prompt)
    images = client.images(entry)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import websocket

PREVIEW = (1, 4)  # the websocket's binary messages that carry a preview image


class HostError(RuntimeError):
    """The server could not be started, died or did not answer. The message ends with the last lines of its log."""


class PromptRejected(ValueError):
    """HTTP 400: the prompt did not pass ComfyUI's checks. `answer` is the body, `node_errors` its part by node id."""

    def __init__(self, answer: dict[str, Any]):
        self.answer = answer
        self.node_errors: dict[str, Any] = answer.get("node_errors") or {}
        top = answer.get("error", {})
        lines = [f"{top.get('message')} {top.get('details', '')}".strip() if isinstance(top, dict) else str(top)]
        for node, found in self.node_errors.items():
            for error in found["errors"]:
                lines.append(f"node {node} ({found['class_type']}): {error['message']}: {error['details']}")
        super().__init__("\n".join(lines))


class ExecutionFailed(RuntimeError):
    """A node raised, or the run was interrupted. `entry` is the history entry, `details` ComfyUI's last message."""

    def __init__(self, entry: dict[str, Any]):
        self.entry = entry
        kind, self.details = entry["status"]["messages"][-1]
        self.interrupted = kind == "execution_interrupted"
        where = f"node {self.details.get('node_id')} ({self.details.get('node_type')})"
        super().__init__(f"{where}: {'interrupted' if self.interrupted else self.details.get('exception_message')}")


# The server


class Server:
    """ComfyUI on a free port of this machine, with a base directory of its own; a context manager.

    `comfyui`: folder of the ComfyUI to run. `packs`: folder name in custom_nodes -> folder to link there.
    `base`: where models/, input/, output/ and custom_nodes/ are; a temporary folder if left out. `args` are added to
    the command line, `environment` to the process's. The log is in `log`, by default `comfyui.log` in `base`.
    """

    def __init__(
        self,
        comfyui: Path,
        *,
        packs: Mapping[str, Path] | None = None,
        base: Path | None = None,
        port: int | None = None,
        args: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        start_timeout: float = 300.0,
        stop_patience: float = 10.0,
    ):
        self.comfyui = comfyui
        self.packs = dict(packs or {})
        self.port = port
        self.args = list(args)
        self.environment = dict(environment or {})
        self.start_timeout = start_timeout
        self.stop_patience = stop_patience
        self._temporary = None if base else tempfile.TemporaryDirectory(prefix="comfyui-", ignore_cleanup_errors=True)
        self.base = Path(base or self._temporary.name)
        self.log = log or self.base / "comfyui.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, on_wait: Callable[[float], None] | None = None) -> Server:
        """Returns when the server answers. `on_wait` is called with the seconds so far, several times a second."""
        try:
            self._prepare()
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    self._command(),
                    cwd=self.base,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"} | self.environment,
                    start_new_session=True,  # a process group to end as a whole
                )
            self._wait_until_ready(on_wait)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends the process group: asked first, killed when `stop_patience` seconds are over."""
        if self.process is not None:
            self._signal_group(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(self.stop_patience)
            self._signal_group(signal.SIGKILL)  # what ignored the request, and children that outlived their parent
            self.process.wait()
            self.process = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def _signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def connect(self) -> Client:
        return Client(self)

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def check_alive(self) -> None:
        """Raises HostError if the process is gone."""
        if self.process is None or self.process.poll() is not None:
            status = None if self.process is None else self.process.returncode
            raise HostError(f"ComfyUI ended with status {status}; its log ends with\n{self._tail()}")

    def _prepare(self) -> None:
        for name in ("models", "input", "output", "custom_nodes"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():
            link = self.base / "custom_nodes" / name
            link.unlink(missing_ok=True)
            link.symlink_to(folder.resolve(), target_is_directory=True)
        self.port = _free_port(self.port or 0)

    def _command(self) -> list[str]:
        flags = {
            "--base-directory": [str(self.base)],
            "--port": [str(self.port)],
            "--database-url": [f"sqlite:///{self.base / 'comfyui.db'}"],  # 0.16.3 logs errors with one in memory
            "--disable-api-nodes": [],
            "--disable-auto-launch": [],
            "--preview-method": ["latent2rgb"],
        }
        if not _has_accelerator():
            flags["--cpu"] = []
        known = (self.comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        command = [sys.executable, str(self.comfyui / "main.py")]
        for flag, values in flags.items():
            if f'"{flag}"' in known and flag not in self.args:
                command += [flag, *values]
        return command + self.args

    def _wait_until_ready(self, on_wait: Callable[[float], None] | None) -> None:
        started = time.monotonic()
        while (waited := time.monotonic() - started) < self.start_timeout:
            self.check_alive()
            try:
                _request(f"{self.url}/system_stats", timeout=5)
                self.check_alive()  # else another program answered on this port
                return
            except (urllib.error.URLError, OSError):
                if on_wait:
                    on_wait(waited)
                time.sleep(0.2)
        raise HostError(f"ComfyUI did not answer within {self.start_timeout:.0f} s; its log ends with\n{self._tail()}")

    def _tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])


def _free_port(wanted: int) -> int:
    """The wanted port, or any for 0. Raises HostError if another program has it: that one would answer for ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that just ended does not count
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise HostError(f"port {wanted} can't be used ({error.strerror}); name another one") from error
        return probe.getsockname()[1]


def _has_accelerator() -> bool:
    import torch  # slow to import, and not needed by a client

    return torch.cuda.is_available() or torch.backends.mps.is_available()


# The client


class Client:
    """One user of a server. Every message the server sends to it is kept in `events`, previews in `previews`."""

    def __init__(self, server: Server):
        self.server = server
        self.id = uuid.uuid4().hex
        self.events: list[dict[str, Any]] = []
        self.previews: list[bytes] = []  # encoded images: JPEG or PNG
        address = f"ws://127.0.0.1:{server.port}/ws?clientId={self.id}"
        self.socket = websocket.create_connection(address, timeout=30, suppress_origin=True)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    # prompts

    def run(self, prompt: Prompt, on_progress: Progress | None = None, timeout: float = 600.0) -> Entry:
        """Queues a prompt and returns its history entry. Raises PromptRejected or ExecutionFailed if it fails."""
        entry = self.wait(self.queue(prompt), on_progress, timeout)
        if entry["status"]["status_str"] != "success":
            raise ExecutionFailed(entry)
        return entry

    def queue(self, prompt: Prompt, **extra: Any) -> str:
        """Queues an API-format prompt and returns its id; `extra` joins the request's body."""
        return self.post("/prompt", {"prompt": prompt, "client_id": self.id, **extra})["prompt_id"]

    def wait(self, prompt_id: str, on_progress: Progress | None = None, timeout: float = 600.0) -> Entry:
        """Returns the history entry of a prompt once it ended, well or not.

        `on_progress(node, value, total)` is called for every progress message of the prompt.
        """
        ends = time.monotonic() + timeout
        while time.monotonic() < ends:
            event = self.receive(0.2)
            data = (event or {}).get("data", {})
            if on_progress and event and event["type"] == "progress" and data.get("prompt_id") == prompt_id:
                on_progress(data["node"], data["value"], data["max"])
            if event is None or event["type"].startswith("execution_"):
                entry = self.history(prompt_id)
                if entry is not None:
                    self.drain()
                    return entry
        raise TimeoutError(f"prompt {prompt_id} did not end within {timeout:.0f} s")

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message, or None if there was none in time; a preview is an event of type "preview"."""
        self.socket.settimeout(timeout)
        try:
            message = self.socket.recv()
        except websocket.WebSocketTimeoutException:
            self.server.check_alive()
            return None
        except (websocket.WebSocketException, OSError) as error:
            self.server.check_alive()
            raise HostError(f"the connection to ComfyUI broke: {error}") from error
        event = self._preview(message) if isinstance(message, bytes) else json.loads(message)
        self.events.append(event)
        return event

    def drain(self) -> None:
        """Takes in what the server has sent already."""
        while self.receive(0.05) is not None:
            pass

    def history(self, prompt_id: str) -> Entry | None:
        """The entry of a prompt that ended, else None."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self, prompt_id: str | None = None) -> None:
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Asks for models to be unloaded and cached outputs to be dropped, which happens before the next prompt."""
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    # files

    def images(self, entry: Entry, node: str | None = None) -> list[bytes]:
        """The image files that a prompt (or one node of it) saved."""
        outputs = entry["outputs"]
        wanted = [outputs[node]] if node is not None else outputs.values()
        return [self.view(**image) for output in wanted for image in output.get("images", [])]

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        return _request(f"{self.server.url}/view?{query}")

    def upload(self, image: bytes, name: str) -> str:
        """Puts an image file into the input folder; returns the name that LoadImage takes."""
        boundary = uuid.uuid4().hex
        parts = [("overwrite", "", b"true"), ("image", f'; filename="{name}"', image)]
        body = b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{extra}\r\n\r\n'.encode() + value + b"\r\n"
            for field, extra, value in parts
        )
        kind = f"multipart/form-data; boundary={boundary}"
        answer = _request(f"{self.server.url}/upload/image", body + f"--{boundary}--\r\n".encode(), kind)
        return json.loads(answer)["name"]

    # the rest

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """What ComfyUI says about all nodes, or about one; a node it does not know gives {}."""
        return self.get(f"/object_info/{node}" if node else "/object_info")

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        return _request(self.server.url + path, timeout=60)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Posts JSON and returns the answer (None if empty). Raises PromptRejected for HTTP 400."""
        try:
            answer = _request(self.server.url + path, json.dumps(body).encode(), "application/json")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code == 400:
                raise PromptRejected(json.loads(text)) from None
            raise HostError(f"POST {path}: HTTP {error.code}: {text}") from error
        return json.loads(answer) if answer else None

    def _preview(self, message: bytes) -> dict[str, Any]:
        kind = int.from_bytes(message[:4], "big")
        if kind in PREVIEW:
            # type 1: format, image; type 4: length of a JSON, the JSON, image
            skip = 8 if kind == 1 else 8 + int.from_bytes(message[4:8], "big")
            self.previews.append(message[skip:])
        return {"type": "preview" if kind in PREVIEW else f"binary {kind}", "data": {}}


Prompt = dict[str, Any]  # API format: node id -> {"class_type": ..., "inputs": {...}}
Entry = dict[str, Any]  # of the history: outputs by node id, status
Progress = Callable[[str, int, int], None]

# Never through a proxy: the server is on this machine, whatever the environment says about the rest of the world.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _request(url: str, body: bytes | None = None, kind: str | None = None, timeout: float = 60.0) -> bytes:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind} if kind else {})
    with _direct.open(request, timeout=timeout) as answer:
        return answer.read()
