"""Files of prompts as records: JSON lines, CSV or plain text, each record with the place where it stands."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMATS = (".jsonl", ".csv", ".txt")
SHOWN = 20  # faults in an error; the rest is counted
LENGTH = 60  # of a value in an error


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, and what to do. row: its number among the rows, from 1; line: in the file."""

    row: int
    line: int
    column: str | None
    value: Any
    expected: str

    def __str__(self) -> str:
        place = f"row {self.row} (line {self.line})"
        if self.column is None:
            return f"{place}: {self.expected}"
        shown = self.value if isinstance(self.value, str) else json.dumps(self.value, default=str)
        shown = shown if len(shown) <= LENGTH else f"{shown[:LENGTH]}..."
        return f"{place}, {self.column} {shown!r}: {self.expected}"


class BadRows(ValueError):
    """Rows that can't be made, all of them in one error."""

    def __init__(self, faults: list[Fault], source: str):
        self.faults = faults
        lines = [f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'} in {source}; nothing was made"]
        lines += [f"  {fault}" for fault in faults[:SHOWN]]
        if len(faults) > SHOWN:
            lines.append(f"  and {len(faults) - SHOWN} more")
        lines.append("Put them right, or go on without these rows by --skip-bad.")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Record:
    """One row as it was written: text, or what JSON said, by column; or the fault that kept it from being read."""

    number: int
    line: int
    values: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


def records(raw: bytes, source: str, extension: str | None, needed: str | None = "prompt") -> list[Record]:
    """All rows of a file. extension: ".jsonl", ".csv" or ".txt"; None: JSON lines if it begins with {, else text.
    needed: a column that a CSV must have.
    Raises ValueError, naming the source, for what is no such file.
    """
    text = _decoded(raw, source)
    if extension is None:
        extension = ".jsonl" if text.lstrip().startswith("{") else ".txt"
    if extension not in FORMATS:
        raise ValueError(f"{source}: unknown format {extension!r}; name it .jsonl, .csv or .txt (a prompt a line)")
    if extension == ".csv":
        found = list(_of_csv(text, source, needed))
    else:
        lines = ((number, line) for number, line in enumerate(_lines(text), 1) if line.strip())
        make = _of_json if extension == ".jsonl" else _of_text
        found = [make(number, line, content) for number, (line, content) in enumerate(lines, 1)]
    if not found:
        raise ValueError(f"{source} holds no prompts; write one a line")
    return found


def extension_of(path: Path) -> str:
    """Raises ValueError for what no format has."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: unknown format {path.suffix!r}; name it .jsonl, .csv or .txt (a prompt a line)")
    return path.suffix.lower()


def _decoded(raw: bytes, source: str) -> str:
    body = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        line = body[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{source}, line {line}: byte 0x{body[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{source}, line {line}: there is a NUL, which no text holds; save the file as UTF-8 text")
    return text


def _lines(text: str) -> list[str]:
    """As editors count them; `splitlines` would also break at characters that prompts may hold."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _of_text(number: int, line: int, content: str) -> Record:
    return Record(number, line, {"prompt": content})


def _of_json(number: int, line: int, content: str) -> Record:
    def fault(expected: str) -> Record:
        return Record(number, line, fault=Fault(number, line, None, None, expected))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is there twice; leave one of them out")
        return dict(pairs)

    def no_number(word: str) -> Any:
        raise ValueError(f"{word} is no number of JSON; write a finite one, or leave it out")

    try:
        values = json.loads(content, object_pairs_hook=unique, parse_constant=no_number)
    except json.JSONDecodeError as error:
        return fault(f"this is not JSON ({error.msg} at character {error.colno}); write one object a line")
    except (ValueError, RecursionError) as error:
        return fault(str(error))
    if not isinstance(values, dict):
        return fault(f'expected an object such as {{"prompt": "a red fox"}}, found {content.strip()[:LENGTH]}')
    for name, value in values.items():
        if half := next((text for text in _texts(name, value) if _has_half(text)), None):
            shown = half.encode("ascii", "backslashreplace").decode()
            return fault(f"{shown[:LENGTH]!r} holds half a character (a lone surrogate); write it whole")
        if any("\0" in text for text in _texts(name, value)):
            return fault(f"{name} holds a NUL, which no text holds; leave it out")
    return Record(number, line, values)


def _texts(*values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _texts(*value)
        elif isinstance(value, dict):
            yield from _texts(*value, *value.values())


def _has_half(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _of_csv(text: str, source: str, needed: str | None) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # a prompt is as long as it is; a quote without its end is told as such
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    head: list[str] | None = None
    number = began = 0
    try:
        for cells in reader:
            line, began = began + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if head is None:
                head = _head(cells, source, needed)
                continue
            number += 1
            if len(cells) > len(head):
                expected = f"{len(cells)} cells for {len(head)} columns; put text that holds a comma in quotes"
                yield Record(number, line, fault=Fault(number, line, None, None, expected))
                continue
            yield Record(number, line, {name: cell for name, cell in zip(head, cells, strict=False) if cell.strip()})
    except csv.Error as error:
        what = "a quote has no end" if "unexpected end" in str(error) else f"this is not CSV ({error})"
        raise ValueError(
            f'{source}, line {began + 1}: {what}; put text with commas or line breaks in "...", and a quote in it as ""'
        ) from None


def _head(cells: list[str], source: str, needed: str | None) -> list[str]:
    head = [cell.strip() for cell in cells]
    if needed not in head:
        for mark, name in ((";", "semicolons"), ("\t", "tabs")):
            if len(head) == 1 and mark in head[0]:
                raise ValueError(f"{source}: its columns are apart by {name}; save it with commas between them")
    if needed is not None and needed not in head:
        raise ValueError(
            f"{source}: its first line has no column {needed!r} (it has {', '.join(map(repr, head))[:200]}); name the "
            "columns there, or use .txt for a prompt a line"
        )
    for name in head:
        if head.count(name) > 1:
            raise ValueError(f"{source}: the column {name!r} is there twice; leave one of them out")
    if "" in head:
        raise ValueError(f"{source}: column {head.index('') + 1} has no name in the first line; give it one")
    return head
