"""Names of images: inside of the folder, valid everywhere, none twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from zimage_core.batch.identity import Fingerprints, of_model
from zimage_core.batch.names import LONGEST, Template
from zimage_core.batch.plan import Model, Task, tasks
from zimage_core.batch.rows import Row

from ..helpers import NANO

MODEL = Model("nano", "0", 128)
VALUES = {"row": 3, "image": 2, "seed": 7, "width": 64, "height": 32, "steps": 8, "name": "fox", "prompt": "A red fox!"}


def planned(rows: list[Row], template: str = "{row:06}_{seed}.png", seed: int = 0, **settings) -> list[Task]:
    return tasks(rows, Template(template), seed, MODEL, Fingerprints(), **settings)


@pytest.mark.parametrize(
    "template, name",
    [
        ("{row:06}_{seed}.png", "000003_7.png"),
        ("{width}x{height}/{name}-{image}-{steps}.webp", "64x32/fox-2-8.webp"),
        ("sub\\{prompt}.JPG", "sub/a-red-fox.JPG"),
        ("a?b:/{row}.png", "a_b_/3.png"),
        ("con/{row}.png", "_con/3.png"),
        ("trailing. /{row}.png", "trailing/3.png"),
        ("{{{row}}}.png", "{3}.png"),
    ],
)
def test_a_template_gives_the_name(template, name):
    assert Template(template).name(VALUES) == name


@pytest.mark.parametrize(
    "value, name",
    [
        ("../../etc/passwd", ".._.._etc_passwd.png"),
        ("/root", "_root.png"),
        ("C:\\x", "C__x.png"),
        ("..", "_.png"),
        ("", "_.png"),
        ("NUL", "_NUL.png"),
        ("com1.old", "_com1.old.png"),
        ("a\nb\x7f*", "a_b__.png"),
        ("\u00fc" * 200, "\u00fc" * 88 + ".png"),
    ],
)
def test_values_lead_nowhere_else(value, name):
    made = Template("{name}.png").name({**VALUES, "name": value})
    assert made == name and len(made.encode()) <= LONGEST


def test_a_long_name_keeps_what_tells_images_apart():
    made = [Template("{name}.png").name({**VALUES, "name": "x" * 300}, f"_{image}") for image in (1, 2)]
    assert made[0].endswith("x_1.png") and made[1].endswith("x_2.png") and len(made[0]) == LONGEST


@pytest.mark.parametrize(
    "template, words",
    [
        ("../{row}.png", "leads out of the output folder"),
        ("/tmp/{row}.png", "leads out of the output folder"),
        ("a\\..\\{row}.png", "leads out of the output folder"),
        ("C:{row}.png", "leads out of the output folder"),
        ("{row}", "end it with one of .png"),
        ("{row}.gif", "end it with one of .png"),
        (".png", "end it with one of .png"),
        ("{row.__class__}.png", "is no field; use row, image"),
        ("{0}.png", "is no field"),
        ("{sigma}.png", "{sigma} is no field"),
        ("{prompt:06d}.png", "can't be written"),
        ("{row!r}.png", "leave the ! in a field out"),
        ("{row.png", "write fields as {row}"),
    ],
)
def test_templates_that_are_refused(template, words):
    with pytest.raises(ValueError) as error:
        Template(template)
    assert words in str(error.value)


def test_seeds_follow_the_images_not_the_rows_that_are_left():
    rows = [Row(1, "a", images=2), Row(2, "b", seed=50, images=2), Row(3, "c"), Row(4, "d")]
    assert [task.seed for task in planned(rows, seed=10)] == [10, 11, 50, 51, 14, 15]
    left = planned(rows[2:], seed=10, counts={1: 2, 2: 2})
    assert [task.seed for task in left] == [14, 15]
    assert planned([Row(1, "a", seed=2**64 - 1, images=2)])[1].seed == 0


def test_images_of_a_row_are_numbered_where_the_template_does_not():
    rows = [Row(1, "a", images=2), Row(2, "b")]
    assert [task.file for task in planned(rows, "{row}.png")] == ["1_1.png", "1_2.png", "2.png"]
    assert [task.file for task in planned(rows, "{row}-{seed}.png")] == ["1-0.png", "1-1.png", "2-2.png"]


@pytest.mark.parametrize("names", [("Fox", "fox"), ("stra\u00dfe", "STRASSE"), ("\u00e9", "e\u0301"), ("a/b", "a:b")])
def test_two_rows_with_one_name_are_refused(names):
    rows = [Row(number, "a", name=name) for number, name in enumerate(names, 1)]
    with pytest.raises(ValueError, match="rows 1, 2") as error:
        planned(rows, "{name}.png")
    assert "1 name would be that of several images" in str(error.value)


def test_keys_tell_what_changes_an_image_and_nothing_else(tmp_path):
    plain = Row(1, "a")
    key = planned([plain])[0].key
    same = [Row(5, "a", name="x"), Row(1, "a", images=1, seed=0), Row(1, "a", width=128)]
    assert {planned([row], seed=0, counts={n: 0 for n in range(5)})[0].key for row in same} == {key}
    other = [Row(1, "b"), Row(1, "a", seed=1), Row(1, "a", steps=9), Row(1, "a", width=64), Row(1, "a", "b")]
    keys = {planned([row])[0].key for row in other}
    assert len(keys) == len(other) and key not in keys
    lora = tmp_path / "a.safetensors"
    seen = set()
    for content in (b"one", b"two"):  # the same name, size and perhaps time
        lora.write_bytes(content)
        seen.add(planned([Row(1, "a", loras=((str(lora), 1.0),))])[0].key)
    assert len(seen | {key}) == 3
    large = tmp_path / "large.bin"
    prints = []
    for middle in (b"\0", b"\1"):
        large.write_bytes(bytes(20 * 2**20) + middle * 2**20 + bytes(20 * 2**20))
        prints.append(Fingerprints().of(large))
    assert prints[0] != prints[1]


def test_a_model_is_known_by_its_content_wherever_it_lies(tmp_path):
    def identity(model: Path, **parts: str) -> str:
        return of_model(
            model, {**dict.fromkeys(("transformer", "text_encoder", "vae")), **parts}, None, "float32", Fingerprints()
        )

    own = identity(NANO)
    moved = Path(shutil.copytree(NANO, tmp_path / "moved"))
    assert identity(moved) == own == identity(moved, vae=str(NANO))
    for file in (
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ):
        path = moved / file
        before = path.read_bytes()
        changed = (
            before[:-1] + bytes([before[-1] ^ 1]) if path.suffix == ".safetensors" else before.replace(b"3.0", b"4.0")
        )
        path.write_bytes(changed if changed != before else before + b"\n")
        assert identity(moved) != own, file
        path.write_bytes(before)
    assert identity(moved) == own
    assert (
        of_model(moved, dict.fromkeys(("transformer", "text_encoder", "vae")), None, "bfloat16", Fingerprints()) != own
    )
