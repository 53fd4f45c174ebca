"""The benchmarks run, at toy size; what they measure is in benchmarks/RESULTS.md."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from benchmarks import images, results
from benchmarks.gpu import report

from .helpers import ROOT


@pytest.mark.slow
def test_loading_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.loading", "--toy", "--layers", "1", "--repeats", "1"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    loaders = {tuple(cell.strip() for cell in row) for row in rows}
    assert {("bf16 file", "core"), ("bf16 file", "our nodes"), ("fp32 folder to bf16", "diffusers")} <= loaders
    assert list(tmp_path.iterdir()) == []


@functools.cache
def referee(*parts: str) -> str:
    """What the referee prints at toy size. It ends with an error where implementations disagree."""
    command = [sys.executable, "-m", "benchmarks", *parts, "--toy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


def first_table(part: str) -> list[list[str]]:
    printed = referee("step") if part == "step" else referee("control", "compiling", "text", "vae", "starting")
    output = printed.split(f"$ -m benchmarks.{part} ")[1].split("$ -m")[0]
    below = output[output.index("\n|---") :].splitlines()[2:]  # what follows the rule
    return [line.strip("| ").split(" | ") for line in takewhile(lambda line: line.startswith("| "), below)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("step", {"64², 10 tokens", "64², 40 tokens, guidance"}),
        pytest.param("text", {"40 tokens", "400 tokens"}, marks=pytest.mark.slow),
        pytest.param("vae", {"decode 64²", "encode 64²"}, marks=pytest.mark.slow),
    ],
)
def test_each_part_compares_all_implementations(part, rows):
    table = first_table(part)
    assert {cells[0] for cells in table} == rows
    if part == "step":
        times = [float(cell) for cells in table for cell in cells[1:4]]
    else:
        times = [float(cells[2]) for cells in table]
        named = {cells[1].split(",")[0] for cells in table}
        assert {"core", "diffusers"} <= named and (part == "text" or "native" in named)
    assert len(times) >= 6 and all(time > 0 for time in times)


@pytest.mark.slow
def test_compiling_tells_the_first_step_of_each_shape():
    table = first_table("compiling")
    assert [cells[:2] for cells in table] == [["with the cache", case] for case in ("64², 10 tokens", "64², 40 tokens")]
    for first, following, compiling in (map(float, cells[2:]) for cells in table):
        assert following > 0 and compiling == pytest.approx(first - following, abs=0.02)


@pytest.mark.slow
def test_starting_compares_a_image_of_each():
    ((row, *cells),) = first_table("starting")
    assert row == "nano image" and all(float(cell) > 0 for cell in cells[:2])


@pytest.mark.slow
def test_images_run(tmp_path):
    """Ours through a real server, and the nano image, which must agree with diffusers'."""
    command = [sys.executable, "-m", "benchmarks.images", "--toy", "--rounds", "1", "--repeats", "1"]
    done = subprocess.run([*command, "--folder", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    for row in ("guidance 2", "first image", "new seed", "new prompt", "known prompt", "sampling, 8 steps"):
        assert f"| {row} | " in done.stdout
    known = next(line for line in done.stdout.splitlines() if line.startswith("| text encoder, known prompt"))
    assert float(known.split(" | ")[1]) < 0.1
    assert list(tmp_path.iterdir()) == []


def test_prompts_are_lengthened_to_so_many_words():
    assert images.lengthened("a red fox", 0) == "a red fox"
    long = images.lengthened("a red fox", 40).split()
    assert len(long) == 40 and long[:3] == ["a", "red", "fox"]


@pytest.mark.slow
def test_an_earlier_commit_is_compared():
    """The one before this, which a shallow clone has not."""
    if subprocess.run(["git", "rev-parse", "-q", "--verify", "HEAD~1"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("there is no earlier commit in this clone")
    command = [sys.executable, "-m", "benchmarks.earlier", "HEAD~1", "--toy", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:2] == ["64², 10 tokens", "fp32"] and float(cells[2]) > 0 and cells[-1] in ("yes", "no")
    assert (
        "checkout" not in subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    )


@pytest.mark.slow
def test_batches_are_measured_beside_the_plain_loop():
    command = [sys.executable, "-m", "benchmarks.batch", "--toy", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {line.split(" | ")[0].strip("| ") for line in done.stdout.splitlines() if line.startswith("| ")}
    assert {"plain loop", "plain loop, twice at once", "Ray, 1 worker", "Ray, 2 workers"} <= rows


def test_an_unknown_part_is_refused():
    command = [sys.executable, "-m", "benchmarks", "stop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 2
        and "there is no benchmark stop; there are step, control, compiling, text, vae, starting, batch, images"
        in done.stderr
    )


def test_results_are_put_between_their_marks(tmp_path, monkeypatch):
    file = tmp_path / "RESULTS.md"
    file.write_text("before\n<!-- a: written by the benchmark -->\nold\n<!-- end of a -->\nafter\n")
    monkeypatch.setattr(results, "FILE", file)
    monkeypatch.setattr(sys, "argv", ["a", "--only", "512², 40"])
    results.write("a", "a", "| new |")
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| new |" in text and "old" not in text
    assert "`python -m benchmarks.a --only '512², 40'`" in text and "torch 2." in text
    assert torch.cuda.is_available() or f" ({torch.backends.cpu.get_cpu_capability()}" in text
    with pytest.raises(ValueError, match="the marks .* are missing"):
        results.write("b", "", "")


def test_every_section_is_filled():
    """Those of a GPU say that they haven't run, until they have."""
    text = results.FILE.read_text()
    names = re.findall(r"<!-- (.*): written by the benchmark -->", text)
    assert len(names) == len(set(names))
    parts = ["compiling", "images", "starting", "images of long prompts"]
    assert {f"{part}, {device}" for part in parts for device in ("cpu", "cuda")} <= set(names)
    assert {"gpu", "text encoder, cpu", "vae, cpu", "nano, cpu", "loading", "loading, fewer layers"} <= set(names)
    assert {"step, cpu, bf16", "step, cpu, fp32", "step, cpu, fp32, larger"} <= set(names)
    for name in names:
        section = text.split(f"<!-- {name}: written by the benchmark -->")[1].split(f"<!-- end of {name} -->")[0]
        assert "|---" in section or (name.endswith(("cuda", "gpu")) and "not been run" in section), name


# The command for a GPU


@pytest.fixture(scope="module")
def gpu_run(tmp_path_factory) -> Path:
    """The folder of a run at toy size on the CPU: every phase, by the same code."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "every phase passed" in done.stdout.splitlines()[-1]
    return out


@pytest.mark.slow
def test_gpu_phases_compare_everybody(gpu_run):
    found = report.load(gpu_run)
    phases = {"machine", "nano", "step", "host", "autoencoder and encoder", "exact", "control", "several GPUs"}
    assert set(found) == phases
    (teams,) = found["several GPUs"]["tables"].values()
    assert [row[1] for row in teams["rows"]] == ["1", "1", "2", "2"]
    assert all(float(row[4]) < 1e-5 for row in teams["rows"] if row[4])
    steps = found["step"]["tables"]["milliseconds"]
    assert [name.strip(">") for name in steps["columns"][1:]] == [
        "core",
        "core compiled",
        "nodes",
        "nodes compiled",
        "native",
        "diffusers",
        "floor",
    ]
    assert all(float(cell) > 0 for row in steps["rows"] for cell in row[1:])
    assert {row[0] for row in found["host"]["tables"]["seconds"]["rows"]} == {"ours", "stock"}
    (exact,) = found["exact"]["tables"].values()
    assert {row[0] for row in exact["rows"]} == {"drawn", "w3 times 4096"}
    drawn = next(row for row in exact["rows"] if row[2] == "float32")
    assert all(float(cell) < 1e-5 for cell in drawn[3:] if cell)
    nano = {(row[0], row[1]): float(row[3]) for row in found["nano"]["tables"]["nodes"]["rows"]}
    assert nano["LoRA", "float32"] < 1e-5 and nano["GGUF Q8_0, LoRA", "float32"] < 1e-4


@pytest.mark.slow
def test_gpu_results_go_into_the_document(gpu_run, tmp_path, monkeypatch):
    file = tmp_path / "RESULTS.md"
    file.write_text("<!-- gpu: written by the benchmark -->\nold\n<!-- end of gpu -->\n")
    monkeypatch.setattr(results, "FILE", file)
    report.record(gpu_run)
    text = file.read_text()
    assert "| image | core |" in text and "old" not in text and "torch 2." in text


def test_a_gpu_phase_that_fails_keeps_what_it_had(tmp_path):
    with report.Report(tmp_path, "one") as found:
        found.table("t", ["a", ">b"])
        found.row("t", "x", 1)
        raise RuntimeError("no more memory")
    saved = report.load(tmp_path)["one"]
    assert found.failed and saved["tables"]["t"]["rows"] == [["x", "1"]]
    assert saved["remarks"] == ["FAILED with RuntimeError: no more memory"]
    assert "| x | 1 |" in report.printed({"one": saved})


def test_the_kit_holds_what_the_gpu_command_needs(tmp_path):
    """Its parts; `make gpu-kit` fetches packages, which takes minutes."""
    sys.path.append(str(ROOT / ".ci"))
    gpu_kit, provision = importlib.import_module("gpu_kit"), importlib.import_module("provision")
    names = {name for _, name in gpu_kit._sources(provision.newest())}
    assert {"main.py", "requirements.txt", "comfyui_version.py", "nodes.py", "comfy/model_base.py"} <= names
    assert "comfy_api/latest/__init__.py" in names and not any(name.startswith("tests/") for name in names)
    assert gpu_kit.OTHERS.search("/comfy_kitchen/backends/hip/_C.cpython-312.so")
    assert not gpu_kit.OTHERS.search("/comfy_kitchen/backends/cuda/_C.cpython-312.so")
    (tmp_path / "av").mkdir()
    (tmp_path / "av" / "__init__.py").write_text(gpu_kit.STAND_IN)
    script = "import av; from av.container import InputContainer; from av.subtitles.stream import SubtitleStream"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", f"{script}; av.VideoFrame"], env=environment, check=True, timeout=60)
