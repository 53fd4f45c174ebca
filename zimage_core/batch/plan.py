"""From rows to images: seeds, sizes, names and keys, all known before anything is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import image_files
from .identity import Fingerprints, digest
from .names import Template, same
from .rows import Row

SHOWN = 10  # of a list in an error
FILES = ("image", "mask", "control", "control_image")  # columns that name one
NOT_IN_THE_IMAGE = {
    "number",
    "name",
    "images",
    "seed",
}  # fields of a row that it doesn't depend on, or else by the seed


@dataclass(frozen=True)
class Task:
    """One image to be made. image: its number in the row, from 1. file: below the output folder, parts apart by "/"."""

    row: Row
    image: int
    seed: int
    width: int
    height: int
    file: str
    key: str
    parameters: str

    @property
    def place(self) -> tuple[int, int]:
        """By what the journal knows it."""
        return self.row.number, self.image


@dataclass(frozen=True)
class Model:
    """What the plan needs to know of it. side: of its images, in pixels, where a row gives no size."""

    name: str
    identity: str
    side: int


def tasks(
    rows: Sequence[Row],
    template: Template,
    seed: int,
    model: Model,
    prints: Fingerprints,
    counts: Mapping[int, int] | None = None,
) -> list[Task]:
    """All images of the rows, in their order.

    seed: that of the first image; each image of a row without its own gets the next.
    counts: row number -> images of rows that are left out, whose seeds stay theirs (1 each if not told).
    Raises ValueError where two images would have one name.
    """
    made: list[Task] = []
    for row, seeds in numbered(rows, seed, counts):
        made += _of_row(row, seeds, template, model, prints)
    check_names(made)
    return made


def numbered(
    rows: Sequence[Row], seed: int, counts: Mapping[int, int] | None = None
) -> Iterator[tuple[Row, list[int]]]:
    """Each row with the seeds of its images: see `tasks`."""
    running, number = 0, 1
    for row in rows:
        for skipped in range(number, row.number):
            running += (counts or {}).get(skipped, 1)
        number = row.number + 1
        begin = seed + running if row.seed is None else row.seed
        yield row, [(begin + image) % 2**64 for image in range(row.images)]
        running += row.images


def named(row: Row, seeds: Sequence[int], size: tuple[int, int], template: Template) -> list[str]:
    """The files of the images of a row."""
    told = {**dataclasses.asdict(row), "width": size[0], "height": size[1], "name": row.name or f"{row.number:06}"}
    values = [{**told, "row": row.number, "image": image, "seed": seed} for image, seed in enumerate(seeds, 1)]
    names = [template.name(one) for one in values]
    if len({*map(same, names)}) < len(names):
        names = [template.name(one, f"_{one['image']}") for one in values]
    return names


def _of_row(row: Row, seeds: list[int], template: Template, model: Model, prints: Fingerprints) -> list[Task]:
    own = (model.side, model.side)
    if row.image is not None and (row.width is None or row.height is None):
        width, height = image_files.size_of(Path(row.image))
        own = (max(16, width // 16 * 16), max(16, height // 16 * 16))  # as `sampling.request.size`
    width, height = row.width or own[0], row.height or own[1]
    names = named(row, seeds, (width, height), template)
    told = {name: value for name, value in dataclasses.asdict(row).items() if name not in NOT_IN_THE_IMAGE}
    told |= {name: prints.of(value) for name in FILES if (value := told[name]) is not None}
    told["references"] = [prints.of(path) for path in row.references]
    told["loras"] = [(prints.of(path), strength) for path, strength in row.loras]
    told |= {"model": model.identity, "width": width, "height": height}
    strength = None
    if row.image is not None:  # as `sampling.request.strength_of`, without what that imports
        strength = (0.6 if row.mask is None else 1.0) if row.strength is None else row.strength
    made = []
    for image, (seed, file) in enumerate(zip(seeds, names, strict=True), 1):
        key = digest({**told, "seed": seed})
        parameters = image_files.parameters(
            row.prompt,
            row.negative_prompt,
            steps=row.steps,
            guidance_scale=row.guidance_scale,
            seed=seed,
            size=(width, height),
            model=model.name,
            loras=[(Path(path), weight) for path, weight in row.loras],
            strength=strength,
            control=[] if row.control is None else [(Path(row.control), row.control_strength)],
            references=[Path(path) for path in row.references],
            key=key,
        )
        made.append(Task(row, image, seed, width, height, file, key, parameters))
    return made


def check_names(made: Sequence[Task]) -> None:
    """Raises ValueError where two images would have one name."""
    owners: dict[str, list[Task]] = {}
    for task in made:
        owners.setdefault(same(task.file), []).append(task)
    twice = [shared for shared in owners.values() if len(shared) > 1]
    if not twice:
        return
    shown = [f"  {shared[0].file}: rows {', '.join(str(task.row.number) for task in shared)}" for shared in twice]
    more = [f"  and {len(twice) - SHOWN} more"] if len(twice) > SHOWN else []
    raise ValueError(
        "\n".join(
            [f"{len(twice)} {'name' if len(twice) == 1 else 'names'} would be that of several images"]
            + shown[:SHOWN]
            + more
            + ["Put {row}, {seed} or {name} into --name, or give these rows other names."]
        )
    )
