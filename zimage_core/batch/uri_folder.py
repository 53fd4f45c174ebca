"""An output folder in another file system, by its URI: s3://, gs://, file://, and what fsspec knows.

What differs from a local one. *Images*: where a file shows only once it is complete (S3, Google, Azure), it is
written at once; elsewhere under another name and then moved. *Journal*: such stores can't append, so lines go to a
spool, a file on this machine, and every few seconds the whole journal is written anew. A run that is killed has its
last lines in the spool alone. The next one on the same machine takes them from there; on another, images without a
line are known by their own text. *Lock*: a file with owner and time, kept fresh while the run goes on. It keeps two
runs apart that begin some seconds after each other, not in the same moment, and trusts the machines' clocks within
half a minute.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import image_files
from .folder import HALF, LOCK, Busy, Folder, Journal, Store

ATOMIC = {"s3", "gcs", "abfs"}  # pyarrow's names of stores where a file shows only once it is complete
REWRITE = 5.0  # seconds between two writes of the journal, or ten times what one takes
FRESH = 10.0  # seconds between two signs of life in the lock
STALE = 60.0  # seconds without one after which a lock is nobody's
MISSING = "{} is needed for this output folder; pip install 'comfyui-zimage[ray]'"


def opened(place: str) -> Store:
    """A folder by its path, or by a URI such as s3://bucket/folder. Nothing is made there yet. Raises ValueError."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place):
        return RemoteFolder(place)
    return Folder(place)


def file_system(uri: str) -> tuple[Any, str]:
    """pyarrow's file system and the path in it. Raises ValueError for a URI that nothing here knows."""
    try:
        from pyarrow import fs
    except ImportError:
        raise ValueError(MISSING.format("pyarrow")) from None
    try:
        return fs.FileSystem.from_uri(uri)
    except ValueError as error:
        try:
            import fsspec

            system, path = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as second:
            raise ValueError(f"--output {uri}: {error}; {second}") from None
        return fs.PyFileSystem(fs.FSSpecHandler(system)), path


class RemoteFolder:
    """As `folder.Folder`, at a URI. It can be sent to other processes."""

    def __init__(self, uri: str):
        """Raises ValueError for what is no URI of a folder."""
        self.uri = uri.rstrip("/")
        self._system, path = file_system(self.uri)
        self._path = path.rstrip("/")
        self._known: set[str] | None = None  # names of files, listed once: asking for each would take a call each

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.uri,)

    def told(self, name: str = "") -> str:
        return f"{self.uri}/{name}" if name else self.uri

    def exists(self, name: str) -> bool:
        """As of the first question since the lock was taken, and of what was written here."""
        if self._known is None:
            self._known = set(self._files(self._path, recursive=True))
        return self._at(name) in self._known

    def holds(self, name: str, parameters: str) -> bool:
        try:
            content = self.read(name)
        except OSError:
            return False
        return image_files.holds(io.BytesIO(content), parameters)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        with self._system.open_input_stream(self._at(name)) as file:
            return bytes(file.read())

    def text(self, name: str) -> str | None:
        """What a file says, None if there is none."""
        try:
            return self.read(name).decode()
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """The whole file or none of it. Raises OSError."""
        place = self._at(name)
        parent = place.rpartition("/")[0]
        half = place if self._system.type_name in ATOMIC else f"{parent}/{HALF.replace('*', uuid.uuid4().hex)}"
        if half != place:
            self._system.create_dir(parent, recursive=True)
        try:
            with self._system.open_output_stream(half) as file:
                file.write(content)
            if half != place:
                self._system.move(half, place)
        except BaseException:
            with contextlib.suppress(OSError):
                self._system.delete_file(half)
            raise
        if self._known is not None:
            self._known.add(place)

    def touch(self, name: str) -> None:
        self.write(name, b"-")  # some stores keep no empty files

    def listed(self, name: str) -> list[str]:
        return [path.rpartition("/")[2] for path in self._files(self._at(name), recursive=False)]

    def remove(self, name: str) -> None:
        from pyarrow import fs

        kind = self._system.get_file_info(self._at(name)).type
        with contextlib.suppress(FileNotFoundError):
            if kind == fs.FileType.Directory:
                self._system.delete_dir(self._at(name))
            elif kind != fs.FileType.NotFound:
                self._system.delete_file(self._at(name))

    def clean(self, names: Iterable[str]) -> int:
        folders = {self._path, *(self._at(name).rpartition("/")[0] for name in names)}
        start, _, end = HALF.partition("*")
        count = 0
        for folder in folders:
            for path in self._files(folder, recursive=False):
                name = path.rpartition("/")[2]
                if name.startswith(start) and name.endswith(end):
                    with contextlib.suppress(OSError):
                        self._system.delete_file(path)
                        count += 1
        return count

    def journal(self, name: str) -> RemoteJournal:
        return RemoteJournal(self, name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Raises Busy while another run keeps it fresh."""
        host = socket.gethostname()
        own = {"host": host, "pid": os.getpid(), "id": uuid.uuid4().hex}

        def sign() -> None:
            self.write(LOCK, json.dumps({**own, "time": time.time()}).encode())

        other = self._lock()
        if other is not None and not _is_dead(other, host):
            self._refuse(other)
        sign()
        found = self._lock()
        if found is not None and found.get("id") != own["id"]:
            self._refuse(found)
        self._known = None
        try:
            with every(lambda: FRESH, sign):
                yield
        finally:
            with contextlib.suppress(OSError):
                self.remove(LOCK)

    def _lock(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.read(LOCK))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _refuse(self, lock: dict[str, Any]) -> None:
        raise Busy(
            f"another run works in {self.uri} (process {lock.get('pid')} on {lock.get('host')}); wait until it has "
            f"ended, or give another folder by --output. If it was killed, try again in {STALE:.0f} seconds"
        )

    def _files(self, folder: str, recursive: bool) -> list[str]:
        from pyarrow import fs

        found = self._system.get_file_info(fs.FileSelector(folder, recursive=recursive, allow_not_found=True))
        return [info.path for info in found if info.type == fs.FileType.File]

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"


def _is_dead(lock: dict[str, Any], host: str) -> bool:
    """Whether nobody keeps a lock fresh any more, or its process was here and is gone."""
    if not isinstance(lock.get("time"), int | float) or time.time() - lock["time"] > STALE:
        return True
    if lock.get("host") != host or not isinstance(lock.get("pid"), int) or os.name != "posix":
        return False
    try:
        os.kill(lock["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


class RemoteJournal:
    """As `folder.Journal`: each line is in the spool once `append` returns, and in the store some seconds later."""

    def __init__(self, folder: RemoteFolder, name: str):
        self._folder, self._name = folder, name
        told = hashlib.sha256(folder.told(name).encode()).hexdigest()[:16]
        user = os.getuid() if os.name == "posix" else ""
        place = Path(tempfile.gettempdir()) / f"zimage-batch-{user}" / f"{told}.jsonl"
        place.parent.mkdir(mode=0o700, exist_ok=True)
        self.spool = Journal(place)
        self._lock = threading.Lock()
        self._took = 0.0
        stored = None
        with contextlib.suppress(FileNotFoundError):
            stored = folder.read(name)
        if stored is None:  # begun anew: what the spool holds is of a folder that was deleted
            self.spool.cut(0)
            folder.write(name, stored := b"")
        if not self.spool.read().startswith(stored):  # another machine went on since
            self.spool.cut(0)
            self.spool.append(stored)
        self._stored = len(stored)
        self._length = len(self.spool.read())
        self._ticking = contextlib.ExitStack()
        self._ticking.enter_context(every(lambda: max(REWRITE, 10 * self._took), self.store))

    def read(self) -> bytes:
        return self.spool.read()

    def cut(self, length: int) -> None:
        with self._lock:
            self.spool.cut(length)
            self._length, self._stored = length, -1

    def append(self, line: bytes) -> None:
        """Raises OSError, and then nothing of the line is there."""
        with self._lock:
            self.spool.append(line)
            self._length += len(line)

    def store(self) -> None:
        """Writes it whole to where it belongs, if there is anything new. Raises OSError."""
        with self._lock:
            content = None if self._stored == self._length else self.spool.read()
        if content is None:
            return
        began = time.monotonic()
        self._folder.write(self._name, content)
        self._took = time.monotonic() - began
        self._stored = len(content)

    def close(self) -> None:
        """Raises OSError if the last lines can't be stored; they are in the spool, from where the next run has them."""
        self._ticking.close()
        try:
            self.store()
            self.spool.path.unlink(missing_ok=True)
        finally:
            self.spool.close()


@contextlib.contextmanager
def every(seconds: Callable[[], float], action: Callable[[], None]) -> Iterator[None]:
    """Does it again and again in a thread; an error of the network is left to the next time."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds()):
            with contextlib.suppress(OSError):
                action()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
