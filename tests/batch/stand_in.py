"""Stands in for a ComfyUI server where a fault is wanted that a real one can't be made to show at will."""

from __future__ import annotations

import email
import email.policy
import io
import json
import threading
import time
import urllib.parse
import uuid
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

INFO = json.loads((Path(__file__).parent / "object_info.json").read_text())  # of a real server, shortened


class StandIn:
    """with StandIn() as server: server.url, server.ran: the workflows that it has run, in their order"""

    def __init__(self, seconds: float = 0.0, port: int = 0):
        self.info = json.loads(json.dumps(INFO))
        self.seconds = seconds  # that a prompt takes
        self.images = 1  # that each SaveImage gives
        self.remembers = False  # whether a prompt that it knows gives no outputs
        self.held = False  # nothing is run
        self.status = 200  # with which it answers an image
        self.largest = 10**6  # bytes of an image that it takes
        self.before: Callable[[str], Any] = lambda path: None  # called with each request; True: no answer
        self.after: Callable[[str], Any] = lambda path: None  # called before each answer; True: it gets lost
        self.ran: list[dict] = []
        self.posted: list[dict] = []
        self.uploaded: list[tuple[str, bytes]] = []  # place, content
        self.viewed: list[str] = []  # where the images were that it was asked for
        self.pending: list[list] = []
        self.running: list[list] = []
        self.history: dict[str, dict] = {}
        self._files: dict[str, bytes] = {}
        self._known: set[str] = set()
        self.port = port
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> StandIn:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._answer(self, None)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                form = self.headers["Content-Type"].startswith("multipart/form-data")
                outer._answer(self, _form(self.headers["Content-Type"], raw) if form else json.loads(raw))

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        self._ends = threading.Event()
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        threading.Thread(target=self._work, args=(self._ends,), daemon=True).start()

    def stop(self) -> None:
        self._ends.set()
        self._http.shutdown()
        self._http.server_close()

    def forget(self) -> None:
        """As by a restart."""
        with self.lock:
            self.pending, self.running, self.history = [], [], {}

    def queue(self, nodes: dict, extra: dict, id: str | None = None) -> str:
        id = id or str(uuid.uuid4())
        with self.lock:
            self.pending.append([len(self.posted), id, nodes, extra, []])
        return id

    def _work(self, ends: threading.Event) -> None:
        while not ends.wait(0.005):
            with self.lock:
                if self.held or not self.pending:
                    continue
                item = self.pending.pop(0)
                self.running = [item]
            time.sleep(self.seconds)
            with self.lock:
                if not ends.is_set() and self.running == [item]:
                    self.running = []
                    self.history[item[1]] = self._run(item)

    def _run(self, item: list) -> dict:
        nodes = item[2]
        self.ran.append(nodes)
        text = json.dumps(nodes)
        entry = {"prompt": item, "outputs": {}, "status": {"status_str": "success", "completed": True, "messages": []}}
        if "fails" in text:
            told = {"node_id": "7", "exception_type": "builtins.ValueError", "exception_message": "no\nsuch latent"}
            entry["status"] = {"status_str": "error", "completed": False, "messages": [["execution_error", told]]}
            return entry
        if self.remembers and text in self._known:
            return entry
        self._known.add(text)
        for node, content in nodes.items():
            if content["class_type"] in ("SaveImage", "PreviewImage"):
                kind = "output" if content["class_type"] == "SaveImage" else "temp"
                names = [f"{node}_{number}_{len(self._files)}.png" for number in range(self.images)]
                for name in names:
                    self._files[name] = self._png(nodes, name)
                entry["outputs"][node] = {"images": [{"filename": n, "subfolder": "", "type": kind} for n in names]}
        return entry

    def _png(self, nodes: dict, name: str) -> bytes:
        size = next(one["inputs"] for one in nodes.values() if "width" in one["inputs"])
        info, file = PngImagePlugin.PngInfo(), io.BytesIO()
        info.add_text("prompt", json.dumps(nodes))
        info.add_text("parameters", "somebody else's")
        color = zlib.crc32(json.dumps([nodes["4"]["inputs"], nodes["7"]["inputs"], name[:3]]).encode()) % 2**24
        pixel = tuple(color.to_bytes(3, "big"))
        Image.new("RGB", (size["width"], size["height"]), pixel).save(file, "PNG", pnginfo=info)
        return file.getvalue()

    def _answer(self, to: BaseHTTPRequestHandler, body: Any) -> None:
        path, _, query = to.path.partition("?")
        if self.before(path):
            to.close_connection = True
            to.connection.close()
            return
        with self.lock:
            status, answer = self._reply(path, dict(urllib.parse.parse_qsl(query)), body)
        if self.after(path):
            to.close_connection = True
            to.connection.close()
            return
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        to.send_response(status)
        to.send_header("Content-Length", str(len(raw)))
        to.end_headers()
        to.wfile.write(raw)

    def _reply(self, path: str, query: dict, body: Any) -> tuple[int, Any]:
        if path == "/object_info":
            return 200, self.info
        if path == "/queue" and body is None:
            return 200, {"queue_running": self.running, "queue_pending": self.pending}
        if path == "/queue":
            self.pending = [item for item in self.pending if item[1] not in body["delete"]]
            return 200, {}
        if path == "/history":
            return 200, dict([*self.history.items()][-int(query["max_items"]) :])
        if path.startswith("/history/"):
            prompt = path.rpartition("/")[2]
            return 200, {prompt: self.history[prompt]} if prompt in self.history else {}
        if path == "/view":
            self.viewed.append(query["type"])
            return (200, self._files[query["filename"]]) if query["filename"] in self._files else (404, {})
        if path == "/upload/image":
            name, content = body["image"]
            if self.status != 200 or len(content) > self.largest:
                return (413 if self.status == 200 else self.status), {}
            self.uploaded.append((f"{body['subfolder'][1].decode()}/{name}", content))
            return 200, {"name": name, "subfolder": body["subfolder"][1].decode(), "type": "input"}
        assert path == "/prompt"
        if "refused" in json.dumps(body["prompt"]):
            fault = {"message": "Value not in list", "details": "text: 'refused' not in [...]"}
            errors = {"4": {"errors": [fault], "class_type": "ZImageTextEncode"}}
            return 400, {"error": {"message": "Prompt outputs failed validation"}, "node_errors": errors}
        for value in (value for node in body["prompt"].values() for value in node["inputs"].values()):
            if str(value).startswith("zimage_batch/") and value not in dict(self.uploaded):
                return 400, {"error": {"message": "Invalid image file", "details": value}, "node_errors": {}}
        self.posted.append(body)
        self.queue(body["prompt"], {**body["extra_data"], "client_id": body["client_id"]}, body["prompt_id"])
        return 200, {"prompt_id": body["prompt_id"], "number": 1, "node_errors": {}}


def _form(kind: str, raw: bytes) -> dict[str, tuple[str | None, bytes]]:
    """field -> (file name, content) of a multipart body, read by Python's own parser of mail."""
    message = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw, policy=email.policy.HTTP)
    return {
        part.get_param("name", header="content-disposition"): (part.get_filename(), part.get_payload(decode=True))
        for part in message.iter_parts()
    }
