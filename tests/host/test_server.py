"""The pack loads in real ComfyUI servers, and the server and client the other host tests rely on do what they say."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import provision
import pytest
from host import Client, ExecutionFailed, HostError, PromptRejected, Server

NODES = {
    "ZImageTransformerLoader",
    "ZImageTextEncoderLoader",
    "ZImageVAELoader",
    "ZImageLoraLoader",
    "ZImageTextEncode",
    "ZImageSampler",
    "ZImageVAEDecode",
    "ZImageVAEEncode",
    "ZImageControlNet",
    "ZImageInpaintPrepare",
    "ZImageInpaintFinish",
}


def image(width: int = 64) -> dict:
    """A prompt of ComfyUI's own nodes: one plain image, saved."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": width, "height": 32, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "plain"}},
    }


@pytest.mark.parametrize("host_version", [provision.OLDEST, provision.NEWEST], indirect=True)
def test_pack_loads_and_offers_its_nodes(each_host: Server, each_client: Client):
    log = each_host.log_text()
    start = log[: log.find("To see the GUI")]
    (pack,) = each_host.packs
    # Only the line with its import time may name the pack: not a traceback, not a warning. (0.16.3 logs a traceback for
    # an optional node of its own that needs OpenGL.)
    places = (f"custom_nodes/{pack}", f"{provision.ROOT}/nodes", f"{provision.ROOT}/zimage_core")
    (line,) = [line for line in start.splitlines() if any(place in line for place in places)]
    assert "seconds: " in line and "IMPORT FAILED" not in line, start
    assert set(each_client.object_info()) >= NODES


def test_server_is_the_version_it_should_be(each_client: Client, host_version: str):
    if provision.chosen() and host_version == provision.NEWEST:
        host_version = provision.release(provision.newest())
    assert each_client.get("/system_stats")["system"]["comfyui_version"] == host_version


def test_prompt_runs_and_its_image_comes_back(each_client: Client):
    entry = each_client.run(image())
    (png,) = each_client.images(entry)
    assert png.startswith(b"\x89PNG")
    assert png[16:24] == (64).to_bytes(4, "big") + (32).to_bytes(4, "big")
    assert "execution_success" in [event["type"] for event in each_client.events]


def test_rejected_prompt_names_node_and_reason(client: Client):
    with pytest.raises(PromptRejected, match=r"node 1 \(EmptyImage\): Value -1 smaller than min"):
        client.run(image(width=-1))


def test_failure_in_a_node_is_raised_and_the_next_prompt_runs(client: Client):
    prompt = image()
    prompt["2"]["inputs"]["filename_prefix"] = "../outside"
    with pytest.raises(ExecutionFailed, match=r"node 2 \(SaveImage\): .*outside the output folder"):
        client.run(prompt)
    client.run(image())


def test_uploaded_image_can_be_loaded(client: Client):
    name = client.upload(client.images(client.run(image()))[0], "up loaded.png")
    prompt = image()
    prompt["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    assert len(client.images(client.run(prompt), "2")) == 1


def test_server_that_dies_says_why_and_leaves_nothing(tmp_path: Path, host: Server):
    server = Server(host.comfyui, args=["--no-such-flag"], base=tmp_path)
    with pytest.raises(HostError, match="unrecognized arguments: --no-such-flag"):
        server.start()
    assert server.process is None


def test_port_in_use_is_refused(tmp_path: Path, host: Server):
    with pytest.raises(HostError, match=f"port {host.port} can't be used"):
        Server(host.comfyui, port=host.port, base=tmp_path).start()


@pytest.mark.slow
def test_stopping_ends_the_whole_process_group(tmp_path: Path):
    """A main.py that answers nobody, ignores SIGTERM and has a child: both must be gone."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "cli_args.py").write_text("")
    (tmp_path / "main.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = os.fork()\n"
        "child and print(os.getpid(), child, flush=True)\n"
        "time.sleep(300)\n"
    )
    server = Server(tmp_path, base=tmp_path / "base", start_timeout=4.0, stop_patience=1.0)
    with pytest.raises(HostError, match="did not answer within 4 s"):
        server.start()
    parent, child = map(int, server.log_text().split())
    for process in (parent, child):
        for _ in range(50):  # the system may take a moment to end what was killed
            if not _runs(process):
                break
            time.sleep(0.1)
        assert not _runs(process), f"{process} of {parent}, {child} still runs"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    if sys.platform == "linux":  # an orphan stays as a zombie until the system's first process takes note of it
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return True
