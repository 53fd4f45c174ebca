"""`python -m zimage_core generate`, run as a user runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zimage_core.__main__ import main

from .helpers import ROOT


def test_an_image_from_a_shell(tmp_path):
    out = tmp_path / "new folder" / "cat.png"
    command = [sys.executable, "-X", "importtime", "-m", "zimage_core", "generate", "a red circle", "--seed", "3"]
    command += ["--lora", "nano/zimage_nano_moon.safetensors"]
    done = subprocess.run([*command, "-o", out, "--cpu"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and "128x128, 8 steps, guidance 0, seed 3" in done.stdout
    assert "100%" in done.stderr and "8/8" in done.stderr  # the progress bar
    image = Image.open(out)
    assert image.size == (128, 128)
    assert image.text["parameters"].startswith("a red circle\nSteps: 8, Sampler: Euler, CFG scale: 1, Seed: 3")
    # what takes seconds to import, and an image can be made without
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"torch", "transformers"} <= imported
    assert not imported & {"torch._dynamo", "sympy", "scipy", "transformers.modeling_utils", "diffusers"}


def test_all_options(tmp_path, capsys):
    out = tmp_path / "cat.webp"
    model = str(ROOT / "nano" / "snapshot")
    options = ["-m", model, "--width", "96", "--height", "64", "-s", "3", "-g", "1.5", "--negative-prompt", "a star"]
    assert main(["generate", "a red circle", *options, "--cpu", "-o", str(out)]) == 0
    assert Image.open(out).size == (96, 64) and Image.open(out).format == "WEBP"
    assert "96x64, 3 steps, guidance 1.5" in capsys.readouterr().out


def test_loras_and_parts_from_elsewhere(tmp_path, capsys):
    name = "diffusion_model.layers.1.attention.to_q"
    up, down = 0.3 * torch.ones(192, 2), torch.ones(2, 192)
    for colon in ("a", "b"):
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / f"{colon}.safetensors")
    model = ROOT / "nano" / "snapshot"
    options = ["--seed", "1", "-s", "2", "--cpu", "--vae", str(model / "vae"), "--tokenizer", str(model)]
    images = []
    for number, files in enumerate(([], ["a.safetensors:0.5", "b.safetensors"], ["a.safetensors:0"])):
        loras = [word for file in files for word in ("--lora", str(tmp_path / file))]
        out = tmp_path / f"{number}.png"
        assert main(["generate", "a red circle", *options, *loras, "-o", str(out)]) == 0
        images.append(Image.open(out))
    told = capsys.readouterr().out
    assert "LoRA      strength 0.5\n  a.safetensors: 2 of 2 keys matched, 1 weights" in told
    assert "LoRA: a.safetensors:0.5, LoRA: b.safetensors:1" in images[1].text["parameters"]
    assert images[0].tobytes() == images[2].tobytes() != images[1].tobytes()


def test_images_masks_and_control(tmp_path, capsys, control_file):
    begun, mask, lines = (tmp_path / name for name in ("begun.png", "mask.png", "lines.png"))
    Image.new("RGB", (100, 72), "white").save(begun)
    Image.new("L", (100, 72), 0).save(mask)
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save(lines)
    common = ["--seed", "1", "-s", "4", "--cpu"]
    image = ["--image", str(begun), "--strength", "0.5"]
    control = ["--control", str(control_file), "--control-image", str(lines), "--control-strength", "0.7"]
    for number, (options, told) in enumerate(
        (
            (image, ("strength 0.5", "96x64", "2/2")),
            ([*image[:2], "--mask", str(mask)], ("strength 1", f"Mask      {mask}", "4/4")),
            ([*control, "--width", "64", "--height", "64"], (f"Control   {control_file}, strength 0.7, of {lines}",)),
            ([*image[:2], "--mask", str(mask), *control[:2]], (f"Control   {control_file}, strength 0.8",)),
        )
    ):
        out = tmp_path / f"{number}.png"
        assert main(["generate", "a red circle", *common, *options, "-o", str(out)]) == 0
        said = capsys.readouterr()
        assert all(word in said.out + said.err for word in told), said
    kept = Image.open(tmp_path / "1.png")
    assert kept.size == (96, 64) and kept.getcolors() == [(96 * 64, (255, 255, 255))]  # nothing was to be repainted
    assert "Denoising strength: 0.5" in Image.open(tmp_path / "0.png").text["parameters"]
    assert "Control: control.safetensors:0.7" in Image.open(tmp_path / "2.png").text["parameters"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--mask", "IMG"], "mask is for an image, and none is given"),
        (["--image", "TEXT"], "text.png is no image that can be read"),
        (["--image", "none.png"], "none.png"),
        (
            ["--control", "TEXT", "--control-image", "IMG", "--control-image", "IMG"],
            "2 --control-image for 1 --control",
        ),
        (["--image", "IMG", "--strength", "0"], "strength is 0.0, expected more than 0"),
        (["--control", "TEXT", "--control-image", "IMG"], "text.png"),
        (["--reference", "IMG"], "reference images need Z-Image Omni or Edit"),
        (["--reference", "TEXT"], "text.png is no image that can be read"),
    ],
)
def test_wrong_images_are_told_in_one_line(tmp_path, capsys, options, words):
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    (tmp_path / "text.png").write_text("no image")
    paths = {"IMG": str(tmp_path / "image.png"), "TEXT": str(tmp_path / "text.png")}
    out = tmp_path / "out.png"
    options = [paths.get(option, option) for option in options]
    assert main(["generate", "a circle", "-s", "2", "--width", "64", "--height", "64", "-o", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("error: ") and words in error and not out.exists()


def test_names_that_are_not_utf8(tmp_path, capsys):
    model, out = tmp_path / os.fsdecode(b"mod\xe8le"), tmp_path / os.fsdecode(b"image\xe9.png")
    shutil.copytree(ROOT / "nano" / "snapshot", model)
    options = ["-s", "1", "--width", "32", "--height", "32", "--cpu", "-o", str(out)]
    assert main(["generate", "a red circle", "-m", str(model), *options]) == 0, capsys.readouterr().err
    assert "mod\\udce8le" in Image.open(out).text["parameters"]


def test_without_an_output_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output.png").write_text("mine")
    assert main(["generate", "a red circle", "--steps", "1", "--cpu"]) == 0
    assert (tmp_path / "output.png").read_text() == "mine"
    assert len(list(tmp_path.glob("zimage-*.png"))) == 1


def test_without_a_seed_the_images_differ_and_the_seed_is_told(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        assert main(["generate", "a red circle", "--steps", "1", "--cpu", "-o", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.count("seed ") == 2
    seeds = [
        Image.open(tmp_path / name).text["parameters"].split("Seed: ")[1].split(",")[0] for name in ("a.png", "b.png")
    ]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--width", "100"], "100 is not divisible by 16; the nearest is 96"),
        (["--lora", "a.safetensors:much"], "strength 'much' is not a number"),
        (["--height", "0"], "'0' is not a whole number from 1"),
        (["--steps", "many"], "'many'"),
        (["--seed", "-1"], "'-1'"),
        (["--guidance-scale", "nan"], "'nan'"),
    ],
)
def test_wrong_options(options, words, capsys):
    with pytest.raises(SystemExit) as error:
        main(["generate", "a red circle", *options])
    assert error.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-m", "no/such/model"], "error: there is no such file or folder, and it is no repository"),
        (["-o", "image.gif"], "unknown image format '.gif'; use one of .png"),
    ],
)
def test_wrong_paths_are_told_in_one_line(options, words, capsys):
    assert main(["generate", "a red circle", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.count("\n") == 1


def test_an_interrupted_run_leaves_no_file(tmp_path, monkeypatch, capsys):
    from zimage_core.pipeline import ZImagePipeline

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ZImagePipeline, "decode", interrupted)
    assert main(["generate", "a red circle", "--steps", "1", "--cpu", "-o", str(tmp_path / "x.png")]) == 130
    assert list(tmp_path.iterdir()) == []
