"""The process that talks to the Hugging Face hub for `download`; run as a script, with one JSON object as argument.

It is a process of its own so that it can be stopped at once, whatever the network does. Prints one JSON object a line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from contextlib import suppress
from typing import Any


def main(task: dict[str, Any]) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        _check_version()
        (_list if task["do"] == "list" else _get)(task)
    except Exception as error:
        response = getattr(error, "response", None)
        _say(
            error=[kind.__name__ for kind in type(error).__mro__],
            message=str(error).strip(),
            status=getattr(response, "status_code", None),
        )


class TooOld(Exception):
    """This huggingface_hub does not go on by itself where a connection breaks."""


def _check_version() -> None:
    from huggingface_hub import __version__

    if int(__version__.split(".")[0]) < 1:
        raise TooOld(__version__)


def _list(task: dict[str, Any]) -> None:
    from huggingface_hub import HfApi

    info = HfApi().model_info(task["repo"], revision=task["revision"], files_metadata=True)
    files = [
        {
            "path": file.rfilename,
            "size": file.size,
            "sha256": file.lfs.sha256 if file.lfs else None,
            "blob": file.blob_id,
        }
        for file in info.siblings or []
    ]
    _say(commit=info.sha, files=files)


def _get(task: dict[str, Any]) -> None:
    """Files to their places, each from where its part stopped (`hf_hub_download` starts anew in each process).

    A lock lets one process at a time into the folder; what another has fetched meanwhile is not fetched again.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # bytes; what is lost when this process is stopped
    lock = f"{task['staging']}.lock"
    with WeakFileLock(lock):
        for file in task["files"]:
            if not (os.path.isfile(file["place"]) and os.path.getsize(file["place"]) == file["size"]):
                _fetch(task, file)
                _verify(file)
                os.makedirs(os.path.dirname(file["place"]), exist_ok=True)
                os.replace(file["part"], file["place"])
            _say(done=file["path"])
        shutil.rmtree(task["staging"], ignore_errors=True)  # parts of other revisions, too
        with suppress(OSError):  # Windows removes no open file
            os.unlink(lock)  # while it is held: after that it may be another's


def _fetch(task: dict[str, Any], file: dict[str, Any]) -> None:
    from urllib.parse import urlsplit

    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import HfHubHTTPError, build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(task["repo"], file["path"], revision=task["revision"])
    os.makedirs(os.path.dirname(file["part"]), exist_ok=True)
    with open(file["part"], "ab") as part:
        while True:
            place = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT).location
            headers, elsewhere = build_hf_headers(), urlsplit(place).netloc != urlsplit(url).netloc
            if elsewhere:
                headers.pop("authorization", None)  # a signed address; the token is the hub's alone
            begin = part.tell()
            try:
                return http_get(place, part, resume_size=begin, headers=headers, expected_size=file["size"])
            except HfHubHTTPError:
                if not elsewhere or part.tell() == begin:
                    raise  # else the address has expired on the way, and there is a new one


class Damaged(Exception):
    """The file that arrived is not the one that the hub lists."""


def _verify(file: dict[str, Any]) -> None:
    """Size and hash as the hub lists them; a file that is not so is deleted."""
    size = os.path.getsize(file["part"])
    # large files are listed by their SHA-256, small ones by git's hash of a blob
    digest = hashlib.sha256() if file["sha256"] else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(file["part"], "rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    if size != file["size"] or digest.hexdigest() != (file["sha256"] or file["blob"]):
        os.unlink(file["part"])
        raise Damaged(file["path"])


def _end_with_the_parent() -> None:
    sys.stdin.read()  # ends when the other side of the pipe is closed, be it by SIGKILL
    os._exit(1)


def _say(**content: Any) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its `config` and `tokenizer` are not what others import under these names
    os.environ["HF_HUB_DISABLE_XET"] = "1"  # the plain protocol continues a file where it stopped
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    main(json.loads(sys.argv[1]))
