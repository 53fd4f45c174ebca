"""Rows for ComfyUI servers: which input each column fills, and every value checked before anything is queued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .graph import Target, Workflow
from .offers import Info, known, reader, takes_images
from .reading import Fault, Record
from .rows import COLUMNS, Row
from .uploads import Uploads

OURS = ("name", "images")  # columns that no node takes
CHECKED = (  # columns whose values mean the same here as locally, and are checked as they are there
    *("prompt", "negative_prompt", "width", "height", "steps"),
    *("guidance_scale", "cfg_normalization", "cfg_truncation", "seed"),
)


@dataclass(frozen=True)
class Filled:
    """A row, and what it puts into the workflow but its seed."""

    row: Row
    values: Mapping[Target, Any]


@dataclass(frozen=True)
class Columns:
    """What each column fills."""

    workflow: Workflow
    targets: Mapping[str, Sequence[Target]]  # column -> inputs
    names: Mapping[str, str] = field(default_factory=dict)  # as the file has it -> as `targets` has it

    @property
    def seeds(self) -> Sequence[Target]:
        return self.targets.get("seed", ())


def resolved(
    names: Sequence[str], options: Iterable[str], maps: Sequence[str], workflow: Workflow, info: Info
) -> Columns:
    """What the columns of a file and the options fill.

    maps: "column=title.input" for what isn't clear by itself, repeated where a column fills several inputs.
    Raises ValueError that tells all that is unclear, and the inputs there are.
    """
    wrong: list[str] = []
    usual = workflow.usual()
    takes = known(info)
    targets: dict[str, list[Target]] = {}
    for text in maps:
        column, equals, place = text.partition("=")
        try:
            if not equals or not column.strip() or not place.strip():
                raise ValueError(f"--map {text!r}: write column=title.input, such as seed=Sampler.seed")
            targets.setdefault(column.strip(), []).append(workflow.find(place.strip(), takes))
        except ValueError as error:
            wrong.append(str(error))
    mapped = {*targets}
    renamed: dict[str, str] = {}
    for name in names:
        if name in mapped or name in usual or name in OURS or "." not in name:
            continue
        try:
            target = workflow.find(name, takes)
        except ValueError as error:
            wrong.append(f"column {error}")
            continue
        # `Prompt.text` is the prompt and `6.seed` the seed of the row, unless a column says so itself
        free = [one for one, places in usual.items() if target in places and one not in (*names, *targets)]
        same = next((one for one in free if one in CHECKED and target.name != "cfg"), name)
        renamed[name] = same
        targets[same] = [target]
    for name in dict.fromkeys([*names, *options, "seed"]):
        if name in targets or name in renamed or name in OURS or "." in name:
            continue
        found = usual.get(name, [])
        if len(found) == 1:
            targets[name] = found
        elif found:
            shown = [f"--map {name}={workflow.shown(one)!r}" for one in found]
            wrong.append(
                f"{name!r} could be the input of several nodes; say which by {' or '.join(shown)}, or by several"
            )
        elif name != "seed" or name in names:
            what = f"this workflow has no clear input for {name!r}" if name in COLUMNS else f"unknown column {name!r}"
            wrong.append(f"{what}; name an input as title.input or id.input, or add --map {name}=title.input")
    for name in mapped - {*names, *options, "seed"}:
        wrong.append(f"--map {name}=...: the file has no column {name!r}; add it, or leave the --map out")
    owners: dict[Target, list[str]] = {}
    for name, places in targets.items():
        for one in places:
            owners.setdefault(one, []).append(name)
    for one, several in owners.items():
        if len(several) > 1:
            wrong.append(f"{' and '.join(map(repr, several))} both fill {workflow.shown(one)}; leave one of them out")
    if "images" in (*names, *options) and not targets.get("seed"):
        wrong.append("'images' needs a seed, and this workflow has no input for it; add --map seed=title.input")
    if wrong:
        raise ValueError("\n".join([*(f"{one}" for one in wrong), workflow.listed()]))
    return Columns(workflow, targets, renamed)


def checked(
    found: Sequence[Record], columns: Columns, defaults: Mapping[str, Any], info: Info, uploads: Uploads
) -> tuple[list[Filled], list[Fault]]:
    """The rows that can be made, and what is wrong with the others. defaults: by column, for what a row leaves out."""
    readers = {
        name: [_reader(name, target, columns.workflow, info, uploads) for target in targets]
        for name, targets in columns.targets.items()
    }
    needed = any(columns.names.get(name, name) == "prompt" for record in found for name in record.values)
    rows: list[Filled] = []
    faults: list[Fault] = []
    for record in found:
        if record.fault is not None:
            faults.append(record.fault)
            continue
        wrong: list[Fault] = []
        given = dict(defaults)
        for name, value in record.values.items():
            if value is None:
                continue
            column = columns.names.get(name, name)
            try:
                given[column] = (
                    COLUMNS[column](value, Path())
                    if column in OURS
                    else _value(column, value, readers[column])
                )  # fmt: skip
            except (ValueError, OSError) as error:
                wrong.append(Fault(record.number, record.line, name, value, str(error)))
        if needed and "prompt" not in given and not wrong:
            wrong.append(Fault(record.number, record.line, "prompt", "", "there is none; every row needs one"))
        faults += wrong
        if not wrong:
            rows.append(_filled(record.number, given, columns))
    return rows, faults


def effective(column: str, columns: Columns, values: Mapping[Target, Any]) -> Any:
    """What of a usual column is in the filled workflow; None if that isn't clear."""
    targets = columns.targets.get(column) or columns.workflow.usual().get(column, [])
    if len(targets) != 1:
        return None
    value = values.get(targets[0], columns.workflow.value(targets[0]))
    if targets[0].name == "cfg" and column == "guidance_scale" and isinstance(value, int | float):
        return value - 1
    return value


def _filled(number: int, given: Mapping[str, Any], columns: Columns) -> Filled:
    values: dict[Target, Any] = {}
    for name, value in given.items():
        if name in (*OURS, "seed"):
            continue
        for target in columns.targets[name]:
            cfg = name == "guidance_scale" and target.name == "cfg"
            values[target] = value + 1 if cfg else value
    told = {name: effective(name, columns, values) for name in ("prompt", "negative_prompt", "steps", "guidance_scale")}
    row = Row(
        number=number,
        prompt=str(told["prompt"] or ""),
        negative_prompt=told["negative_prompt"] or None,
        width=effective("width", columns, values),
        height=effective("height", columns, values),
        steps=told["steps"] or 0,
        guidance_scale=told["guidance_scale"] or 0.0,
        seed=given.get("seed"),
        images=given.get("images", 1),
        name=given.get("name"),
    )
    return Filled(row, values)


def _reader(column: str, target: Target, workflow: Workflow, info: Info, uploads: Uploads) -> Callable[[Any], Any]:
    """Of an input, but for CFG, which is guidance_scale + 1. An image that is here goes before one of the server's."""
    read = reader(info, workflow, target)
    if takes_images(info, workflow, target):
        return lambda value: (uploads.place(value) if isinstance(value, str) else None) or read(value)
    if column == "guidance_scale" and target.name == "cfg":
        return lambda value: read(value + 1) - 1
    return read


def _value(column: str, value: Any, readers: Sequence[Callable[[Any], Any]]) -> Any:
    if column in CHECKED:
        value = COLUMNS[column](value, Path())
    for read in readers:
        value = read(value)
    return value
