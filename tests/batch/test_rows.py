"""Files of prompts: what is read, and every fault told before anything is loaded."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from zimage_core.__main__ import main
from zimage_core.batch.reading import BadRows, records
from zimage_core.batch.rows import Row, checked
from zimage_core.pipeline import ZImagePipeline

HERE = Path(__file__).parent


def rows_of(text: str | bytes, extension: str | None, folder: Path = HERE, **defaults) -> list[Row]:
    raw = text.encode() if isinstance(text, str) else text
    rows, faults = checked(records(raw, "prompts", extension), folder, defaults)
    if faults:
        raise BadRows(faults, "prompts")
    return rows


@pytest.fixture
def never_loads(monkeypatch):
    """Fails a test in which a model is opened."""

    def opened(*_: object, **__: object):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ZImagePipeline, "from_pretrained", opened)


def test_text_is_a_prompt_a_line():
    text = "\ufeffa fox\r\n\n   \n# not a comment\ra \u2028 b\n"
    rows = rows_of(text, ".txt", steps=4)
    assert [row.prompt for row in rows] == ["a fox", "# not a comment", "a \u2028 b"]
    assert [row.number for row in rows] == [1, 2, 3] and rows[0].steps == 4


def test_all_columns_by_json_and_by_csv(tmp_path):
    for name in ("one.safetensors", "two.safetensors", "control.safetensors"):
        (tmp_path / name).touch()
    Image.new("RGB", (64, 32)).save(tmp_path / "image.png")
    asked = {
        "prompt": 'a "fox", running',
        "negative_prompt": "a dog",
        "width": 512,
        "height": 256,
        "steps": 9,
        "guidance_scale": 1.5,
        "cfg_normalization": True,
        "cfg_truncation": 0.8,
        "seed": 2**64 - 1,
        "images": 3,
        "loras": "one.safetensors:0.5|two.safetensors",
        "max_prompt_tokens": 100,
        "name": "fox",
        "image": "image.png",
        "strength": 0.4,
        "mask": "image.png",
        "control": "control.safetensors",
        "control_image": "image.png",
        "control_strength": 0,
        "references": "image.png|image.png",
    }
    image = str(tmp_path / "image.png")
    loras = ((str(tmp_path / "one.safetensors"), 0.5), (str(tmp_path / "two.safetensors"), 1.0))
    expected = Row(
        **{**asked, "number": 1, "cfg_normalization": 1.0, "control_strength": 0.0, "loras": loras}
        | {
            "references": (image, image),
            "image": image,
            "mask": image,
            "control_image": image,
            "control": str(tmp_path / "control.safetensors"),
        }
    )
    assert rows_of(json.dumps(asked), ".jsonl", tmp_path) == [expected]
    listed = {**asked, "loras": [["one.safetensors", 0.5], "two.safetensors"], "width": 512.0}
    listed["references"] = ["image.png", "image.png"]
    assert rows_of(json.dumps(listed), ".jsonl", tmp_path) == [expected]
    cells = ['"' + str(value).replace('"', '""') + '"' for value in asked.values()]
    assert rows_of(",".join(asked) + "\r\n" + ",".join(cells) + "\r\n", ".csv", tmp_path) == [expected]


def test_what_a_row_leaves_out_is_the_option():
    text = 'prompt,steps,width\n"two\nlines",,\nb,3,32\n\nc\n'
    rows = rows_of(text, ".csv", steps=5, width=64)
    assert [(row.prompt, row.steps, row.width) for row in rows] == [("two\nlines", 5, 64), ("b", 3, 32), ("c", 5, 64)]
    (row,) = rows_of('{"prompt": "", "steps": null}', ".jsonl", steps=5)
    assert (row.prompt, row.steps) == ("", 5)


@pytest.mark.parametrize("text, prompts", [('\n {"prompt": "a"}\n', ["a"]), ("a fox\n{b}\n", ["a fox", "{b}"])])
def test_standard_input_is_json_if_it_begins_so(text, prompts):
    assert [row.prompt for row in rows_of(text, None)] == prompts


@pytest.mark.parametrize(
    "column, value, words",
    [
        ("width", 100, "divisible by 16; the nearest is 96"),
        ("height", "tall", "a whole number from 16"),
        ("width", True, "a whole number from 16"),
        ("width", 512.5, "a whole number from 16"),
        ("steps", 0, "a whole number from 1"),
        ("steps", "9" * 30, "a whole number from 1"),
        ("guidance_scale", -1, "a number from 0"),
        ("guidance_scale", "1,5", "a number from 0"),
        ("cfg_normalization", "yes", "true, false, or a number"),
        ("seed", 2**64, "0 to 2^64 - 1"),
        ("seed", -1, "0 to 2^64 - 1"),
        ("images", 0, "a whole number from 1"),
        ("loras", "none.safetensors:1", "there is no such file"),
        ("loras", ".:1", "that is a folder"),
        ("loras", "x" * 5000, "there is no such file"),
        ("loras", "[1", "expected \"file:strength\""),
        ("loras", {"a": 1}, "expected \"file:strength\""),
        ("loras", "test_rows.py:much", "a finite strength"),
        ("prompt", 5, "expected text"),
        ("negative_prompt", ["a"], "expected text"),
        ("image", "none.png", "there is no such file"),
        ("image", "test_rows.py", "is no image that can be read"),
        ("strength", 0, "more than 0"),
        ("mask", "none.png", "there is no such file"),
        ("strength", 0.5, "it is for an image, and the row has none"),
        ("control_strength", 0.5, "it is for a control file, and the row has none"),
        ("control", "test_rows.py", "it has nothing to follow"),
        ("max_prompt_tokens", 0, "a whole number from 1"),
        ("references", "none.png", "there is no such file"),
        ("references", {"a": 1}, "expected images, several apart by |"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_place(column, value, words):
    text = json.dumps({"prompt": "a"}) + "\n\n" + json.dumps({"prompt": "b", column: value})
    with pytest.raises(BadRows) as error:
        rows_of(text, ".jsonl", HERE)
    (fault,) = error.value.faults
    assert (fault.row, fault.line, fault.column) == (2, 3, column)
    assert f"row 2 (line 3), {column}" in str(error.value) and words in str(error.value), error.value


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        ('{"prompt": "a", "steps": NaN}', "NaN is no number of JSON"),
        ('{"prompt": "a", "guidance_scale": 1e999}', "a number from 0"),
        ('{"prompt": "\\ud83d"}', "half a character"),
        ('{"prompt": "a\\u0000b"}', "prompt holds a NUL"),
        ('{"prompt": "a', "this is not JSON (Unterminated string"),
        ('["a"]', "expected an object"),
        ("[" * 100_000, "recursion"),
        ('{"seed": ' + "9" * 5000 + "}", "limit"),
        ("{}", "every row needs one"),
    ],
)
def test_a_line_that_is_no_row(line, words):
    with pytest.raises(BadRows, match=r"row 1 \(line 1\)") as error:
        rows_of(line, ".jsonl")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "raw, extension, words",
    [
        (b"a\nb\xe9", ".txt", "line 2: byte 0xe9 is not UTF-8"),
        (b"\xef\xbb\xbfa\n\nb\xff", ".txt", "line 3: byte 0xff is not UTF-8"),
        ("a".encode("utf-16"), ".txt", "is not UTF-8"),
        (b"\xed\xa0\x80", ".txt", "is not UTF-8"),
        (b"a\nb\0c", ".txt", "line 2: there is a NUL"),
        (b" \n\n", ".txt", "holds no prompts"),
        (b"", ".jsonl", "holds no prompts"),
        (b"prompt\n", ".csv", "holds no prompts"),
        (b'prompt\na\n"b\nc\n', ".csv", "line 3: a quote has no end"),
        (b'prompt\n"a" b\n', ".csv", "line 2: this is not CSV"),
        (b"prompt;width\na;16", ".csv", "apart by semicolons"),
        (b"text\na", ".csv", "no column 'prompt' (it has 'text')"),
        (b"prompt,seed,seed\na", ".csv", "'seed' is there twice"),
        (b"prompt,\na", ".csv", "column 2 has no name"),
        (b'{"prompt": "a", "stesp": 1}', ".jsonl", "unknown column 'stesp', did you mean 'steps'?"),
        (b"prompt,Negative Prompt\na,b", ".csv", "unknown column 'Negative Prompt', did you mean 'negative_prompt'?"),
        (b'{"prompt": "a", "zzzzzz": 1}', ".jsonl", "unknown column 'zzzzzz'. Columns are: prompt, "),
        (b"a", ".docx", "unknown format '.docx'"),
    ],
)
def test_a_file_that_is_wrong(raw, extension, words):
    with pytest.raises(ValueError) as error:
        rows_of(raw, extension)
    assert words in str(error.value) and not isinstance(error.value, BadRows)


def test_too_many_cells_are_a_fault_of_their_row():
    with pytest.raises(BadRows, match=r"row 2 \(line 3\): 3 cells for 2 columns"):
        rows_of("prompt,seed\na,1\nb,c,2\n", ".csv")


def test_all_faults_come_at_once_and_before_the_model(tmp_path, capsys, never_loads):
    lines = [{"prompt": "a", "width": 100, "steps": 0}, {"prompt": "b"}, *[{"seed": -1, "prompt": "c"}] * 21]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert main(["batch", str(file), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "23 faults" in told and "row 1 (line 1), width" in told and "row 1 (line 1), steps" in told
    assert told.count("\n  row ") == 20 and "and 3 more" in told and "--skip-bad" in told
    assert not (tmp_path / "out").exists()


def test_rows_that_are_wrong_are_left_out_when_told_to(tmp_path, capsys):
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    file.write_text('{"prompt": "a", "width": 1}\n{"prompt": "a red circle"}\n{"prompt"\n{"prompt": "a star"}\n')
    options = ["--cpu", "-s", "1", "--width", "32", "--height", "32", "--quiet"]
    assert main(["batch", str(file), "--output", str(out), *options]) == 2
    assert main(["batch", str(file), "--output", str(out), *options, "--skip-bad"]) == 0
    told = capsys.readouterr().err
    assert "left out: row 1 (line 1), width" in told and "left out: row 3 (line 3)" in told
    assert sorted(path.name for path in out.glob("*.png")) == ["000002_1.png", "000004_3.png"]
    file.write_text('{"prompt"\n')
    assert main(["batch", str(file), "--output", str(out), "--skip-bad"]) == 2
    assert "in which no row is right" in capsys.readouterr().err


def test_files_of_rows_are_beside_the_prompts_and_those_of_standard_input_here(tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "there" / "image.png")
    line = '{"prompt": "a", "image": "image.png"}'
    (tmp_path / "there" / "p.jsonl").write_text(line)
    monkeypatch.chdir(tmp_path)
    options = ["--cpu", "-s", "1", "--quiet"]
    assert main(["batch", "there/p.jsonl", "--output", "out", *options]) == 0
    assert Image.open("out/000001_0.png").size == (32, 32)
    for place, code in ((tmp_path, 2), (tmp_path / "there", 0)):
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
        assert main(["batch", "-", "--output", "out2", *options]) == code
    assert f"relative names begin at {tmp_path}" in capsys.readouterr().err
