"""Images of a batch: those of `generate`, whatever else is made, in batches that fit."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_core.__main__ import main
from zimage_core.batch import features, maker
from zimage_core.batch.folder import Folder
from zimage_core.batch.identity import Fingerprints
from zimage_core.batch.maker import Maker, Settings
from zimage_core.batch.names import Template
from zimage_core.batch.plan import Model, Task, tasks
from zimage_core.batch.results import Outcome
from zimage_core.batch.rows import Row
from zimage_core.batch.run import save
from zimage_core.batch.sizes import MOST, Sizes, fitting
from zimage_core.model.tokenizer import Tokenizer
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights.unread import UnreadEncoder

from ..helpers import NANO, ROOT, relative
from .making import SMALL, Run

MOON = ROOT / "nano" / "zimage_nano_moon.safetensors"


@pytest.fixture
def encoder_lora(tmp_path) -> Path:
    """A LoRA that changes the text encoder alone."""
    path = tmp_path / "encoder.safetensors"
    name = "text_encoder.model.layers.1.self_attn.q_proj"
    weights = {f"{name}.lora_A.weight": torch.ones(2, 128), f"{name}.lora_B.weight": 0.05 * torch.ones(128, 2)}
    save_file(weights, path)
    return path


@pytest.fixture
def transformer_lora(tmp_path) -> Path:
    """A LoRA that changes the transformer alone."""
    path = tmp_path / "transformer.safetensors"
    name = "diffusion_model.layers.1.attention.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 192), f"{name}.lora_B.weight": torch.ones(192, 2)}, path)
    return path


def planned(*rows: Row) -> list[Task]:
    return tasks(rows, Template("{row}_{seed}.png"), 0, Model("nano", "0", 32), Fingerprints())


@pytest.fixture
def builds(monkeypatch) -> list[UnreadEncoder]:
    """The text encoders that were read."""
    found: list[UnreadEncoder] = []
    build = UnreadEncoder.build

    def counted(self: UnreadEncoder):
        found.append(self)
        return build(self)

    monkeypatch.setattr(UnreadEncoder, "build", counted)
    return found


@pytest.mark.slow
def test_an_image_is_that_of_generate_bit_for_bit(tmp_path, control_file, encoder_lora):
    """With --batch-size 1, whatever the other rows are, and resumed or not."""
    begun = tmp_path / "begun.png"
    Image.effect_noise((48, 32), 80).convert("RGB").save(begun)
    Image.linear_gradient("L").resize((48, 32)).save(tmp_path / "mask.png")
    rows = [
        ({"prompt": "a red circle"}, []),
        ({"prompt": "two blue stars on a white background", "seed": 5}, ["--seed", "5"]),
        ({"prompt": "a red circle", "steps": 3, "guidance_scale": 2, "negative_prompt": "a star"},
         ["-s", "3", "-g", "2", "--negative-prompt", "a star"]),
        ({"prompt": "a moon", "loras": f"{MOON}:0.5|{encoder_lora}", "guidance_scale": 1.5},
         ["--lora", f"{MOON}:0.5", "--lora", str(encoder_lora), "-g", "1.5"]),
        ({"prompt": "a red ring", "width": 48, "height": 64}, ["--width", "48", "--height", "64"]),
        ({"prompt": "a red ring", "image": "begun.png", "strength": 0.5, "width": 48},
         ["--image", str(begun), "--strength", "0.5", "--width", "48"]),
        ({"prompt": "a red ring", "image": "begun.png", "mask": "mask.png"},
         ["--image", str(begun), "--mask", str(tmp_path / "mask.png")]),
        ({"prompt": "a star", "control": str(control_file), "control_image": "begun.png", "control_strength": 0.7},
         ["--control", str(control_file), "--control-image", str(begun), "--control-strength", "0.7"]),
    ]  # fmt: skip
    run = Run(tmp_path, [row for row, _ in rows], *SMALL, "--batch-size", "1", "--name", "{row}.png")
    assert run() == 0, run.lines()
    for number, (_, options) in enumerate(rows):
        alone = tmp_path / f"alone{number}.png"
        own = options if "--seed" in options else [*options, "--seed", str(number)]
        assert main(["generate", rows[number][0]["prompt"], *SMALL[:-1], *own, "-o", str(alone)]) == 0
        ours = Image.open(run.out / f"{number + 1}.png")
        assert ours.tobytes() == Image.open(alone).tobytes(), rows[number]
        told = Image.open(alone).text["parameters"]
        assert ours.text["parameters"] == f"{told}, Key: {run.lines()[0]['key']}" or number, told
        assert ours.text["parameters"].startswith(f"{told}, Key: ")
    made = run.images()
    for name in ("1.png", "3.png", "4.png"):
        (run.out / name).unlink()
    assert run() == 0 and run.images() == made


@pytest.mark.parametrize(
    "size", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(None, marks=pytest.mark.slow)]
)
def test_larger_batches_give_the_same_latents(size, monkeypatch):
    rows = [
        Row(1, "a red circle", guidance_scale=1.5, cfg_normalization=1.0),
        Row(2, "two blue stars on a white background, and a ring", "a dog", guidance_scale=1.5, cfg_normalization=1.0),
        Row(3, "a star", guidance_scale=1.5, cfg_normalization=1.0, images=3),
    ]
    made = []
    for most in (1, size):
        one = Maker(Settings(str(NANO), batch_size=most))
        seen: dict[int, torch.Tensor] = {}
        batches: list[int] = []
        decode, generate = one.pipe.decode, one.pipe.generate
        latents: list[torch.Tensor] = []
        monkeypatch.setattr(
            one.pipe, "decode", lambda x, decode=decode, latents=latents: latents.append(x) or decode(x)
        )

        def counted(prompts, *args, generate=generate, batches=batches, **options):
            batches.append(len(prompts))
            return generate(prompts, *args, **options)

        monkeypatch.setattr(one.pipe, "generate", counted)
        for done in one.make(planned(*rows)):
            assert done.error is None and done.image.shape == (3, 32, 32)
            seen[done.task.seed] = latents[len(seen)]
        made.append((seen, batches))
    (alone, ones), (together, batches) = made
    assert ones == [1] * 5 and batches == {2: [2, 2, 1], 5: [5], None: [5]}[size]
    assert alone.keys() == together.keys() == {*range(5)}
    assert max(relative(together[seed], alone[seed]) for seed in alone) < 1e-5


@pytest.mark.slow
def test_the_order_of_the_file_does_not_matter(tmp_path):
    rows = [
        {
            "prompt": prompt,
            "seed": seed,
            "name": str(seed),
            "steps": 1 + seed % 2,
            "loras": str(MOON) if seed > 2 else "",
        }
        for seed, prompt in enumerate(("a red circle", "a star", "two stars", "a moon", "a blue moon"))
    ]
    made = []
    for name, order in (("out", rows), ("turned", rows[::-1])):
        run = Run(tmp_path, order, *SMALL, "--batch-size", "1", "--name", "{name}.png", name=name)
        assert run() == 0
        made.append(run.images())
    assert made[0] == made[1] and len({*made[0].values()}) == 5


def test_prompts_are_encoded_once_and_together_and_the_encoder_leaves(builds, monkeypatch, transformer_lora):
    one = Maker(Settings(str(NANO), batch_size=4))
    encoded: list[int] = []
    computed = one.pipe._encoded
    monkeypatch.setattr(one.pipe, "_encoded", lambda ids, lengths: encoded.append(len(ids)) or computed(ids, lengths))
    rows = [
        Row(n, f"a star {n % 20}", guidance_scale=1.0, steps=1, loras=((str(transformer_lora), n % 2 / 50),))
        for n in range(40)
    ]
    for made in one.make(planned(*rows)):
        assert made.error is None and one.pipe._text_encoder is None
    assert sum(encoded) == 21 and len(encoded) == 2 and len(builds) == 1  # 20 prompts and the empty negative one


def test_a_text_encoder_that_loras_change_is_read_for_each(builds, encoder_lora):
    one = Maker(Settings(str(NANO), batch_size=1))
    lora = (str(encoder_lora), 1.0)
    rows = [Row(n, "a star", steps=1, seed=1, loras=(lora,) if n % 2 else ()) for n in range(4)]
    images = {made.task.row.number: made.image for made in one.make(planned(*rows))}
    assert len(builds) == 2
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[3])
    assert not torch.equal(images[0], images[1])


def test_features_that_do_not_fit_are_made_in_windows(builds, monkeypatch):
    rows = [Row(n, f"a star {n}", steps=1) for n in range(6)]
    settings = Settings(str(NANO), batch_size=1)
    whole = [made.image for made in Maker(settings).make(planned(*rows))]
    monkeypatch.setattr(features, "MEMORY", 2 * 128 * 4 * 16)  # of two prompts, or a little more
    one = Maker(settings)
    parts = []
    for made in one.make(planned(*rows)):
        parts.append(made.image)
        assert sum(held.nbytes for held in one.features._all.values()) <= features.MEMORY
    assert all(map(torch.equal, parts, whole)) and len(builds) > 3


def test_known_prompts_come_from_the_cache_of_the_disk(tmp_path, builds):
    run = Run(tmp_path, ["a star", "a ring"], *SMALL, "--prompt-cache", str(tmp_path / "prompts"))
    assert run() == 0 and len(builds) == 1
    made = run.images()
    for path in run.out.glob("*.png"):
        path.unlink()
    assert run() == 0 and len(builds) == 1 and run.images() == made


def test_the_released_encoder_is_read_again(builds, encoder_lora):
    pipe = ZImagePipeline.from_pretrained(NANO)
    pipe.set_loras((encoder_lora, 1.0))
    (before,) = pipe.encode_prompts(["a star"])
    pipe.release_text_encoder()
    assert pipe._text_encoder is None
    assert torch.equal(pipe.encode_prompts(["a star"])[0], before) and len(builds) == 2
    pipe.release_text_encoder()
    pipe.set_loras()
    assert not torch.equal(pipe.encode_prompts(["a star"])[0], before)
    pipe.text_encoder = pipe.text_encoder  # one that has no files
    pipe.release_text_encoder()
    assert pipe._text_encoder is not None


# What goes wrong with an image


@pytest.fixture
def poisoned(tmp_path) -> Path:
    """The nano model, in which the word "star" gives features that are not finite."""
    model = Path(shutil.copytree(NANO, tmp_path / "poisoned"))
    file = model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    tokenizer = Tokenizer(model / "tokenizer")
    star = {*tokenizer("a star")} - {*tokenizer("a ring")}
    weights["model.embed_tokens.weight"][list(star)] = float("nan")
    save_file(weights, file)
    return model


@pytest.mark.slow
def test_a_row_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, capsys, poisoned):
    broken = tmp_path / "broken.jpg"
    Image.effect_noise((64, 64), 80).convert("RGB").save(broken)
    broken.write_bytes(broken.read_bytes()[:2000])  # its head is whole, so that it passes the check
    save_file({"nothing.of.ours": torch.ones(2)}, tmp_path / "bad.safetensors")
    prompts = ["a ring", "a circle", "a star", "a square", "a heart"]
    rows = [{"prompt": prompt} for prompt in prompts]
    rows += [
        {"prompt": "a ring", "image": "broken.jpg"},
        {"prompt": "a ring", "loras": "bad.safetensors"},
        {"prompt": "a ring", "width": 2**20, "height": 2**20},
        {"prompt": "a circle"},
    ]
    run = Run(tmp_path, rows, *SMALL, "--batch-size", "8", "-m", str(poisoned), "--name", "{row}.png")
    assert run("--retry-failed") == 1
    said = capsys.readouterr()
    assert said.out.startswith("5 of 9 images done (5 of 9 rows), 4 failed, ")
    lines = run.lines()
    failed = {line["row"]: line["error"] for line in lines if line["status"] == "failed"}
    assert failed.keys() == {3, 6, 7, 8} and {line["file"] for line in lines if line["row"] in failed} == {None}
    assert "not finite" in failed[3] and "broken.jpg" not in failed[3]
    assert "OSError" in failed[6] and "CheckpointError" in failed[7] and "bad.safetensors" in failed[7]
    assert "out of memory with this image alone" in failed[8] and "make it smaller" in failed[8]
    assert sorted(line["row"] for line in lines) == [1, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9]  # each failure twice
    assert "row 3, image 1 failed: " in said.err
    assert {*run.images()} == {f"{row}.png" for row in (1, 2, 4, 5, 9)}


def test_rows_that_failed_are_made_by_the_next_run(tmp_path):
    broken = tmp_path / "broken.jpg"
    Image.effect_noise((64, 64), 80).convert("RGB").save(broken)
    whole = broken.read_bytes()
    broken.write_bytes(whole[:2000])
    run = Run(tmp_path, [{"prompt": "a ring", "image": "broken.jpg"}, {"prompt": "a star"}], *SMALL)
    assert run() == 1
    broken.write_bytes(whole)
    assert run() == 0
    assert sorted((line["row"], line["status"]) for line in run.lines()) == [(1, "done"), (1, "failed"), (2, "done")]


def test_batches_that_do_not_fit_are_halved_and_no_row_is_lost(monkeypatch, caplog):
    one = Maker(Settings(str(NANO), batch_size=8))
    generate, tried = one.pipe.generate, []

    def short(prompts, *args, **options):
        tried.append(len(prompts))
        if len(prompts) > 2:
            torch.empty(2**50)  # the allocator's own words
        return generate(prompts, *args, **options)

    monkeypatch.setattr(one.pipe, "generate", short)
    rows = planned(*(Row(n, "a star", steps=1) for n in range(7)))
    made = list(one.make(rows))
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1] and [one.error for one in made] == [None] * 7
    assert {done.task.place for done in made} == {task.place for task in rows}
    assert "7 images of this size don't fit in memory together; 3 are tried" in caplog.text


@pytest.mark.slow
def test_a_process_with_little_memory_loses_no_row(tmp_path):
    """A batch of 48 does not fit into a bound of the system, and what libraries keep of it may be missed later."""
    code = (
        "import sys, resource, json\n"
        "from zimage_core.batch.maker import Maker, Settings\n"
        "from tests.batch.test_making import planned, Row, NANO\n"
        "one = Maker(Settings(str(NANO), batch_size=48))\n"
        "rows = planned(*(Row(n, 'a star', steps=1, width=256, height=256) for n in range(48)))\n"
        "list(one.make(rows[:1]))\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 70 * 2**20,) * 2)\n"
        "print(json.dumps([made.error for made in one.make(rows)]))\n"
        "print(one.sizes._limits)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors, limits = done.stdout.splitlines()
    told = [error for error in json.loads(errors) if error is not None]
    assert len(json.loads(errors)) == 48 and "{256: " in limits, done.stdout + done.stderr
    assert all(error.startswith("out of memory with this image alone") for error in told), told
    assert "48 images of this size don't fit in memory together; 24 are tried" in done.stderr


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert maker.is_out_of_memory(error.value) and maker.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not maker.is_out_of_memory(RuntimeError("shape mismatch")) and not maker.is_out_of_memory(
        ValueError("can't")
    )


def test_how_many_images_are_sampled_together():
    sizes = Sizes(None, torch.device("cpu"))
    assert [sizes.next(tokens) for tokens in (16, 64, 256, 1024, 4096)] == [8, 8, 4, 1, 1]
    assert Sizes(3, torch.device("cpu")).next(4096) == 3
    sizes.lower(64, 2)
    assert [sizes.next(tokens) for tokens in (16, 64)] == [8, 2]
    gib = 2**30
    assert fitting(20 * gib, 3 * gib, 5 * gib) == 8 == MOST  # (18 - 3) / 2 and the first, at most
    assert fitting(10 * gib, 3 * gib, 5 * gib) == 4
    assert fitting(1 * gib, 3 * gib, 5 * gib) == 1


def test_what_a_worker_is_told_and_tells_can_be_sent(tmp_path):
    (task,) = planned(Row(1, "a star", steps=1))
    settings = pickle.loads(pickle.dumps(Settings(str(NANO), batch_size=1)))
    (made,) = Maker(settings).make(pickle.loads(pickle.dumps([task])))
    assert made.task == task
    outcome = save(Folder(tmp_path), made)
    assert pickle.loads(pickle.dumps(outcome)) == outcome == Outcome.done(task, made.seconds)
    assert Folder(tmp_path).holds(task.file, task.parameters)
