"""From rows to what servers are asked for: seeds, names and keys as locally, and a filled workflow for each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .graph import Nodes, Target, Workflow, identity
from .names import Template
from .plan import Task, check_names, named, numbered
from .remote_rows import Columns, Filled
from .results import Outcome


class Plan:
    """The tasks of a file, and the workflow that makes each.

    A prompt may give several images, which is known once it has run: each further one is a task of its own then.
    """

    def __init__(
        self,
        rows: Sequence[Filled],
        columns: Columns,
        template: Template,
        seed: int,
        counts: Mapping[int, int] | None = None,
    ):
        """Raises ValueError where two images would have one name, or it needs a size that isn't known."""
        self._columns = columns
        self._filled = {one.row.number: one for one in rows}
        self.tasks: list[Task] = []
        fields = {name for name in template.fields if name in ("width", "height", "steps")}
        for row, seeds in numbered([one.row for one in rows], seed, counts):
            unknown = sorted(name for name in fields if not getattr(row, name))
            if unknown:
                raise ValueError(f"--name: {{{unknown[0]}}} of row {row.number} isn't known here; leave it out")
            size = row.width or 0, row.height or 0
            for number, (one, file) in enumerate(zip(seeds, named(row, seeds, size, template), strict=True), 1):
                key = identity(self._nodes(row.number, one))
                text = self._parameters(row.number, one, key)
                self.tasks.append(Task(row, number, one, *size, file, key, text))
        check_names(self.tasks)

    def nodes(self, task: Task) -> Nodes:
        """What is queued for it."""
        return self._nodes(task.row.number, task.seed)

    def further(self, task: Task, output: int) -> Task:
        """The task of another image that its prompt gave. output: from 2."""
        stem, dot, extension = task.file.rpartition(".")
        number = (output - 1) * task.row.images + task.image
        return dataclasses.replace(task, image=number, file=f"{stem}_{output}{dot}{extension}")

    def first(self, task: Task) -> tuple[int, int]:
        """Place of the first image of the prompt that gives this one."""
        return task.row.number, (task.image - 1) % task.row.images + 1

    def output(self, task: Task) -> int:
        """Which image of its prompt it is, from 1."""
        return (task.image - 1) // task.row.images + 1

    def with_known(self, latest: Sequence[Outcome]) -> list[Task]:
        """All tasks, with the further images that earlier runs found out: they may be deleted, or have failed."""
        tasks = {task.place: task for task in self.tasks}
        found = {place: [task] for place, task in tasks.items()}
        for outcome in latest:
            filled = self._filled.get(outcome.row)
            if filled is None or outcome.image <= filled.row.images:
                continue
            images = filled.row.images
            first = (outcome.row, (outcome.image - 1) % images + 1)
            if tasks[first].key == outcome.key:
                found[first].append(self.further(tasks[first], (outcome.image - 1) // images + 1))
        return [task for several in found.values() for task in several]

    def values(self) -> dict[Target, set[Any]]:
        """All that the rows put into each input, beside what the workflow has where a row leaves it out."""
        found: dict[Target, set[Any]] = {}
        targets = {target for one in self._filled.values() for target in one.values}
        for one in self._filled.values():
            for target in targets:
                value = one.values.get(target, self._columns.workflow.value(target))
                if value is not None:
                    found.setdefault(target, set()).add(value)
        return found

    @property
    def workflow(self) -> Workflow:
        return self._columns.workflow

    def _nodes(self, row: int, seed: int) -> Nodes:
        seeds = {target: seed for target in self._columns.seeds}
        return self.workflow.filled({**self._filled[row].values, **seeds})

    def _parameters(self, row: int, seed: int, key: str) -> str:
        return "\n".join(_lines(self._filled[row], self._columns, seed, key))


def _lines(filled: Filled, columns: Columns, seed: int, key: str) -> Iterator[str]:
    """As `image_files.parameters`, of what is known of a workflow."""
    row = filled.row
    yield row.prompt
    if row.negative_prompt:
        yield f"Negative prompt: {row.negative_prompt}"
    told = []
    if row.steps:
        told += [f"Steps: {row.steps}"]
        told += [f"CFG scale: {row.guidance_scale + 1:g}"]
    if columns.seeds:
        told += [f"Seed: {seed}"]
    if row.width and row.height:
        told += [f"Size: {row.width}x{row.height}"]
    if (model := columns.workflow.model()) is not None:
        told += [f"Model: {model}"]
    yield ", ".join([*told, f"Key: {key}"])
