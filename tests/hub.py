"""A Hugging Face hub for tests: the API that `huggingface_hub` speaks, over real HTTP, well-behaved or not."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000  # bytes from which a file is listed with its SHA-256


class Hub:
    """Serves folders as repositories. The attributes make it misbehave; `asked` keeps what was requested."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.revisions = {"main", COMMIT}
        self.asked: list[tuple[str, str, str]] = []  # method, path, Range
        self.tokens: list[str | None] = []
        self.speed: float | None = None  # bytes a second
        self.served = 0  # bytes of files
        self.status: dict[str, tuple[int, str | None]] = {}  # repository -> error answer, X-Error-Code
        self.cut: dict[str, int] = {}  # file -> bytes after which its connection is closed, once
        self.short: set[str] = set()  # files whose second half is never sent, whatever the range
        self.corrupt: set[str] = set()  # files of which one byte is changed on the way
        self.stall: set[str] = set()  # files that send nothing
        self.elsewhere = False  # large files are answered with a signed address under another host's name
        self.expiring = False  # such an address ends with the first connection to it
        self.signed: list[str] = []  # addresses that were given out and have not ended
        self.leaked: list[str] = []  # tokens that came with them
        self.endpoint = ""

    def files(self, repository: str) -> dict[str, bytes]:
        root = self.repositories[repository]
        return {
            path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
        }

    def sent(self, name: str) -> list[str]:
        """The Range headers of the requests for a file."""
        return [ranged for method, path, ranged in self.asked if method == "GET" and path.endswith(f"/{name}")]


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            ranged = self.headers.get("Range", "")
            hub.asked.append((self.command, path, ranged))
            hub.tokens.append(self.headers.get("Authorization"))
            parts = path.strip("/").split("/")
            if parts[0] == "signed":
                return self._signed(path, ranged, body)
            if parts[:2] == ["api", "models"]:
                name, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            else:
                name, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "main"
            if name in hub.status:
                return self._error(*hub.status[name])
            if name not in hub.repositories:
                return self._error(404, "RepoNotFound")
            if revision not in hub.revisions:
                return self._error(404, "RevisionNotFound")
            if parts[0] == "api":
                return self._json(self._listing(name))
            content = hub.files(name).get("/".join(parts[4:]))
            if content is None:
                return self._error(404, "EntryNotFound")
            if hub.elsewhere and len(content) >= LARGE:
                return self._redirect(name, "/".join(parts[4:]), content)
            return self._file("/".join(parts[4:]), content, ranged, body)

        def _redirect(self, name: str, path: str, content: bytes) -> None:
            hub.signed.append(f"/signed/{len(hub.asked)}/{name}/{path}")
            self.send_response(302)
            self.send_header("Location", hub.endpoint.replace("127.0.0.1", "localhost") + hub.signed[-1])
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _signed(self, path: str, ranged: str, body: bool) -> None:
            if (token := self.headers.get("Authorization")) is not None:
                hub.leaked.append(token)
            if path not in hub.signed:
                return self._error(403, None)
            if hub.expiring:
                hub.signed.remove(path)
            parts = path.split("/")
            name, file = "/".join(parts[3:5]), "/".join(parts[5:])
            return self._file(file, hub.files(name)[file], ranged, body)

        def _listing(self, name: str) -> dict:
            siblings = []
            for path, content in hub.files(name).items():
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry = {"rfilename": path, "size": len(content), "blobId": blob}
                if len(content) >= LARGE:
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
                siblings.append(entry)
            return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

        def _file(self, path: str, content: bytes, ranged: str, body: bool) -> None:
            etag = hashlib.sha256(content).hexdigest()
            total, begin = len(content), int(ranged.removeprefix("bytes=").split("-")[0]) if ranged else 0
            if path in hub.corrupt:
                content = content[: total // 3] + bytes([content[total // 3] ^ 255]) + content[total // 3 + 1 :]
            if path.endswith(".json") and "gzip" in self.headers.get("Accept-Encoding", "") and not ranged:
                return self._compressed(etag, content, body)
            part = content[begin:]
            self.send_response(206 if ranged else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if ranged:
                self.send_header("Content-Range", f"bytes {begin}-{total - 1}/{total}")
            self.end_headers()
            if not body:
                return
            limit = len(part)
            if path in hub.cut:
                limit = min(limit, hub.cut.pop(path))
            if path in hub.short:
                limit = max(0, total // 2 - begin)
            if path in hub.stall:
                limit = 0
            step = len(part) if hub.speed is None else max(1, int(hub.speed / 20))
            for at in range(0, limit, step or 1):
                try:
                    self.wfile.write(part[at : min(at + step, limit)])
                    self.wfile.flush()
                    hub.served += min(at + step, limit) - at
                except OSError:
                    break  # the other side is gone
                if hub.speed is not None:
                    time.sleep(1 / 20)
            if path in hub.stall:
                time.sleep(30)
            if limit < len(part):
                self.close_connection = True
                self.connection.close()

        def _compressed(self, etag: str, content: bytes, body: bool) -> None:
            """As the hub sends text: without a length."""
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'W/"{etag}"')
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if body:
                raw = gzip.compress(content)
                self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(raw), raw))

        def _json(self, content: dict) -> None:
            raw = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def _error(self, status: int, code: str | None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def handle(self) -> None:
            with suppress(OSError):  # the other side is gone, or we closed it
                super().handle()

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    # By default it looks only twice a second whether it should end, and there is a hub for each test.
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
