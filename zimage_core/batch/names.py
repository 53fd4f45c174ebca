"""Names of the files of images, from a template: inside of the folder, valid on every system."""

from __future__ import annotations

import re
import string
import unicodedata
from typing import Any

DEFAULT = "{row:06}_{seed}.png"
FIELDS = ("row", "image", "seed", "width", "height", "steps", "name", "prompt")
EXTENSIONS = (".png", ".webp", ".jpg", ".jpeg")  # those that carry what the image was made of
ILLEGAL = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])(?=\.|$)", re.IGNORECASE)
LONGEST = 180  # bytes of a part of a name; file systems hold 255, some encrypted ones 143 characters
SLUG = 60  # characters of a prompt


class Template:
    """What gives each image its name.

    Template("{name}/{seed}.png").name({"name": "a/b", "seed": 7})  # "a_b/7.png"
    Raises ValueError for a template that leads out of the folder, has no format or holds what is no field.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            pieces = list(string.Formatter().parse(text.replace("\\", "/")))
        except ValueError as error:
            raise ValueError(f"--name {text!r}: {error}; write fields as {{row}}") from None
        self._pieces = [(literal, field, spec or "") for literal, field, spec, _ in pieces]
        for _, field, spec in self._pieces:
            if field is not None and field not in FIELDS:
                raise ValueError(f"--name {text!r}: {{{field}}} is no field; use {', '.join(FIELDS)}")
            if field is not None:
                self._check(field, spec)
        if any(conversion for _, _, _, conversion in pieces):
            raise ValueError(f"--name {text!r}: leave the ! in a field out")
        outline = "".join(part + ("x" if field is not None else "") for part, field, _ in self._pieces)
        if outline.startswith("/") or re.match(r"[A-Za-z]:", outline) or ".." in outline.split("/"):
            raise ValueError(f"--name {text!r} leads out of the output folder; leave '..' and the root out")
        self.extension = next((one for one in EXTENSIONS if outline.lower().endswith(one)), "")
        if not self.extension or outline.lower() == self.extension:
            raise ValueError(f"--name {text!r}: end it with one of {', '.join(EXTENSIONS)}")

    @property
    def fields(self) -> set[str]:
        """Those that it uses."""
        return {field for _, field, _ in self._pieces if field is not None}

    def _check(self, field: str, spec: str) -> None:
        try:
            format("text" if field in ("name", "prompt") else 1, spec)
        except ValueError as error:
            raise ValueError(f"--name {self.text!r}: {{{field}:{spec}}} can't be written ({error})") from None

    def name(self, values: dict[str, Any], suffix: str = "") -> str:
        """A path below the folder, parts apart by "/". suffix: put before the extension."""
        made = []
        for literal, field, spec in self._pieces:
            made.append(literal)
            if field is not None:
                value = slug(values[field]) if field == "prompt" else values[field]
                made.append(ILLEGAL.sub("_", format(value, spec)))
        *folders, last = "".join(made).split("/")
        stem, extension = last[: -len(self.extension)], last[-len(self.extension) :]
        return "/".join([*(_safe(folder) for folder in folders if folder), _safe(stem, suffix + extension)])


def slug(prompt: str) -> str:
    """A prompt as part of a name: its words, in lower case, apart by "-"."""
    words = "-".join(re.findall(r"\w+", unicodedata.normalize("NFC", prompt).lower()))
    return words[:SLUG].rstrip("-_") or "_"


def same(name: str) -> str:
    """What two names have in common that are one file on some system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _safe(part: str, ending: str = "") -> str:
    """A part of a path that every system takes. ending: of a file's name, which is never cut."""
    room = LONGEST - len(ending.encode())
    part = ILLEGAL.sub("_", part).encode("utf-8", "replace")[:room].decode("utf-8", "ignore")
    if not ending:
        part = part.rstrip(". ")  # which Windows leaves out
    if not part.strip(". "):
        part = "_"
    return f"_{part}{ending}" if RESERVED.match(part + ending) else part + ending
