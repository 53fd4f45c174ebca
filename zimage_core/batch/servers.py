"""A ComfyUI server by its HTTP API: what is queued, what has ended, and the images. Knows nothing of rows."""

from __future__ import annotations

import http.client
import ipaddress
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .graph import Nodes

TIMEOUT = 60.0  # seconds: a server that loads a model answers late
RECENT = 100  # entries at the end of its history in which prompts of an earlier run are looked for
TAKEN_ILL = (400, 413, 415)  # statuses that say something about an image that is sent
AWAY = (401, 403, 407, 408, 429, 502, 503, 504)  # HTTP statuses that say nothing about the prompt


class Gone(OSError):
    """The server doesn't answer, or answers what is no ComfyUI's. refused: nobody listens there at all."""

    def __init__(self, words: str, refused: bool = False):
        super().__init__(words)
        self.refused = refused


class Missing(OSError):
    """It answers, and doesn't have this file."""


class Refused(ValueError):
    """The server doesn't take a prompt. answer: what it says, as JSON."""

    def __init__(self, status: int, answer: Any):
        self.status = status
        self.answer = answer if isinstance(answer, dict) else {}
        super().__init__(f"HTTP {status}")

    def words(self, shown: Callable[[str], str]) -> str:
        """In one line. shown: node id -> its title."""
        found = []
        for node, faults in (self.answer.get("node_errors") or {}).items():
            for fault in faults.get("errors", []):
                found.append(f"{shown(node)}: {fault.get('message')}: {fault.get('details')}")
        top = self.answer.get("error")
        if not found and isinstance(top, Mapping):
            found.append(": ".join(str(part) for part in (top.get("message"), top.get("details")) if part))
        return "; ".join(" ".join(one.split()) for one in found) or f"the server answers HTTP {self.status}"


@dataclass(frozen=True)
class Queued:
    """A prompt in a queue. extra: what its sender said of it."""

    id: str
    extra: Mapping[str, Any]
    running: bool


@dataclass(frozen=True)
class Ended:
    """A prompt in the history. error: (node id, words) if it failed. images: node id -> what `view` takes."""

    id: str
    extra: Mapping[str, Any]
    seconds: float | None
    error: tuple[str | None, str] | None
    images: Mapping[str, Sequence[Mapping[str, str]]]


class Server:
    """server = Server("http://127.0.0.1:8188")
    server.submit(nodes, "4f0c...", {"client_id": ...})
    Every method raises `Gone` where the server isn't there.
    """

    def __init__(self, address: str):
        """Raises ValueError for what is no address."""
        text = address if "://" in address else f"http://{address}"
        parts = urllib.parse.urlsplit(text)
        try:
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            whole = False
        if not whole or parts.query or parts.fragment:
            raise ValueError(f"--comfyui {address!r} is no address of a server; write it as http://host:8188")
        self.url = text.rstrip("/")
        self.timeout = TIMEOUT
        # What is in this house is asked directly, whatever the environment says about the rest of the world.
        near = _is_near(parts.hostname or "")
        self._open = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * near).open

    def info(self) -> dict[str, Any]:
        """Class -> what a node of it takes and gives."""
        return self._json("/object_info")

    def queue(self) -> list[Queued]:
        """All that runs and waits, of whomever."""
        found = self._json("/queue")
        try:
            return [
                Queued(str(item[1]), item[3] if isinstance(item[3], dict) else {}, part == "queue_running")
                for part in ("queue_running", "queue_pending")
                for item in found[part]
            ]
        except (LookupError, TypeError) as error:
            raise Gone(f"its queue can't be read ({error!r})") from None

    def ended(self, prompt: str) -> Ended | None:
        """None for what it hasn't ended, or knows nothing of."""
        found = self._json(f"/history/{urllib.parse.quote(prompt)}")
        return _ended(prompt, found[prompt]) if prompt in found else None

    def recent(self) -> list[Ended]:
        return [_ended(prompt, entry) for prompt, entry in self._json(f"/history?max_items={RECENT}").items()]

    def submit(self, nodes: Nodes, prompt: str, extra: Mapping[str, Any]) -> str:
        """Queues a prompt and returns its id: the given one, but on old servers. Raises Refused."""
        body = {"prompt": nodes, "prompt_id": prompt, "client_id": extra["client_id"], "extra_data": extra}
        answer = self._json("/prompt", body)
        taken = str(answer.get("prompt_id", prompt))
        if answer.get("node_errors"):  # some outputs would be left out, silently
            self.delete([taken])
            raise Refused(200, answer)
        return taken

    def upload(self, place: str, content: bytes) -> None:
        """An image, to "folder/name" among its input images. Raises Refused."""
        folder, _, name = place.rpartition("/")
        edge = uuid.uuid4().hex
        head = "".join(
            f'--{edge}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'
            for field, value in {"type": "input", "subfolder": folder, "overwrite": "true"}.items()
        )
        head += f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
        self._read("/upload/image", body, f"multipart/form-data; boundary={edge}")

    def delete(self, prompts: Sequence[str]) -> None:
        """From its queue, what waits there; what runs is left alone."""
        if prompts:
            self._read("/queue", {"delete": [*prompts]})

    def view(self, image: Mapping[str, str]) -> bytes:
        """The file. Raises Missing."""
        return self._read("/view?" + urllib.parse.urlencode(dict(image)))

    def _json(self, path: str, body: Any = None) -> dict[str, Any]:
        try:
            found = json.loads(self._read(path, body))
        except ValueError as error:
            if isinstance(error, Refused):
                raise
            raise Gone("it answers what is not JSON; is this a ComfyUI?") from None
        if not isinstance(found, dict):
            raise Gone("it answers what no ComfyUI does")
        return found

    def _read(self, path: str, body: Any = None, kind: str = "application/json") -> bytes:
        """body: bytes of that kind, or anything that JSON knows."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": kind} if data else {})
        try:
            with self._open(request, timeout=self.timeout) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                if path.startswith("/view") and error.code in (400, 403, 404):
                    raise Missing(f"HTTP {error.code}") from None
                refused = path == "/prompt" and error.code not in AWAY and error.code != 404
                if refused or (path == "/upload/image" and error.code in TAKEN_ILL):
                    raise Refused(error.code, _answer(error)) from None
                raise Gone(f"HTTP {error.code} for {path.partition('?')[0]}") from None
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            words = "it doesn't answer in time" if isinstance(cause, TimeoutError) else str(cause) or repr(cause)
            raise Gone(words, isinstance(cause, ConnectionRefusedError)) from None


def _answer(error: urllib.error.HTTPError) -> Any:
    try:
        return json.loads(error.read())
    except (ValueError, OSError, http.client.HTTPException):
        return None


def _ended(prompt: str, entry: Any) -> Ended:
    try:
        status = entry.get("status") or {}
        messages = {kind: told for kind, told in status.get("messages") or []}
        error = None
        if "execution_interrupted" in messages:
            told = messages["execution_interrupted"]
            error = told.get("node_id"), "interrupted on the server"
        elif status.get("status_str") == "error" or "execution_error" in messages:
            told = messages.get("execution_error", {})
            words = " ".join(str(told.get("exception_message") or "it failed").split())
            kind = str(told.get("exception_type") or "").rpartition(".")[2]
            error = told.get("node_id"), f"{kind}: {words}" if kind else words
        images = {
            str(node): [one for one in output.get("images", []) if isinstance(one, dict)]
            for node, output in (entry.get("outputs") or {}).items()
        }
        extra = entry["prompt"][3]
        begun, done = (messages.get(kind, {}).get("timestamp") for kind in ("execution_start", "execution_success"))
        seconds = (done - begun) / 1000 if begun and done else None
    except (LookupError, TypeError, ValueError, AttributeError) as fault:
        raise Gone(f"its history can't be read ({fault!r})") from None
    return Ended(prompt, extra if isinstance(extra, dict) else {}, seconds, error, images)


def _is_near(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or "." not in host
    return address.is_private or address.is_loopback
