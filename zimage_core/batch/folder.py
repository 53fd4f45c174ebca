"""The output folder: all that is written goes through here, so that another file system could take its place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from .. import image_files

LOCK = ".results.lock"
HALF = ".zimage-*.half"  # images that are being written
NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class NoRoom(OSError):
    """The disk is full, or the quota used up: nothing more can be written, whichever row it is."""


class Lost(OSError):
    """Those who make the images do not answer any more."""


class Busy(ValueError):
    """Another run works in this folder."""


class Log(Protocol):
    """What `Journal` is."""

    def read(self) -> bytes: ...
    def cut(self, length: int) -> None: ...
    def append(self, line: bytes) -> None: ...
    def close(self) -> None: ...


class Store(Protocol):
    """What `Folder` is, and `uri_folder.RemoteFolder` in another file system."""

    def told(self, name: str = "") -> str: ...
    def exists(self, name: str) -> bool: ...
    def text(self, name: str) -> str | None: ...
    def holds(self, name: str, parameters: str) -> bool: ...
    def write(self, name: str, content: bytes) -> None: ...
    def touch(self, name: str) -> None: ...
    def listed(self, name: str) -> list[str]: ...
    def remove(self, name: str) -> None: ...
    def clean(self, names: Iterable[str]) -> int: ...
    def journal(self, name: str) -> Log: ...
    def lock(self) -> contextlib.AbstractContextManager[None]: ...


class Folder:
    """A folder of images and their journal. Names are paths below it, parts apart by "/"."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(os.path.abspath(path))

    def told(self, name: str = "") -> str:
        """Where a file lies, or the folder, for people."""
        return str(self._at(name) if name else self.path)

    def exists(self, name: str) -> bool:
        return os.path.lexists(self._at(name))

    def holds(self, name: str, parameters: str) -> bool:
        """Whether this file is a whole image that was made with these parameters."""
        return image_files.holds(self._at(name), parameters)

    def write(self, name: str, content: bytes) -> None:
        """The whole file or none of it, on the disk when this returns. Raises OSError, `NoRoom` where it is full."""
        place = self._at(name)
        half = place.with_name(HALF.replace("*", uuid.uuid4().hex))
        with room(place):
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with half.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(half, place)
                _sync(place.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    half.unlink(missing_ok=True)
                raise

    def text(self, name: str) -> str | None:
        """What a file says, None if there is none."""
        try:
            return self._at(name).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def touch(self, name: str) -> None:
        """Makes an empty file, and the folders that it lies in."""
        self._at(name).parent.mkdir(parents=True, exist_ok=True)
        self._at(name).touch()

    def listed(self, name: str) -> list[str]:
        """The names of what lies in a folder below this one; none if it isn't there."""
        try:
            return os.listdir(self._at(name))
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        """A file, or a folder and all in it, if it is there."""
        place = self._at(name)
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)

    def clean(self, names: Iterable[str]) -> int:
        """Removes what killed runs left half written beside these files; how many that was. Only under the lock."""
        count = 0
        for place in {self.path, *(self._at(name).parent for name in names)}:
            for left in place.glob(HALF):
                with contextlib.suppress(OSError):
                    left.unlink()
                    count += 1
        return count

    def journal(self, name: str) -> Journal:
        """Opened to be read and continued. Raises OSError."""
        with room(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            return Journal(self._at(name))

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Held while one run works here; the system lets go of it when that ends, however it does."""
        return _locked(self.path)

    def _at(self, name: str) -> Path:
        return self.path.joinpath(*name.split("/"))


class Journal:
    """A file that only grows, by whole lines that are on the disk once `append` returns."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO = path.open("a+b", buffering=0)

    def read(self) -> bytes:
        self._file.seek(0)
        return self._file.read()

    def cut(self, length: int) -> None:
        self._file.truncate(length)
        os.fsync(self._file.fileno())

    def append(self, line: bytes) -> None:
        """Raises OSError, and then nothing of the line is in the file; `NoRoom` where the disk is full."""
        end = os.fstat(self._file.fileno()).st_size
        with room(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.truncate(end)
                raise

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def room(place: Path) -> Iterator[None]:
    """Turns the errors of a full disk into `NoRoom`."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise NoRoom(
            error.errno,
            f"there is no room left to write ({error.strerror}); make room, then run the same command again: it goes "
            "on where this run stopped",
            str(place),
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a folder by --output")
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("a+b") as file:
        try:
            _take(file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise
            raise Busy(
                f"another run works in {path}; wait until it has ended, or give another folder by --output"
            ) from None
        yield


if sys.platform == "win32":
    import msvcrt

    def _take(file: BinaryIO) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

    def _sync(folder: Path) -> None:
        """Nothing: NTFS keeps its own journal of names."""
else:
    import fcntl

    def _take(file: BinaryIO) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _sync(folder: Path) -> None:
        """The name of a file, to the disk."""
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
