"""The `download` switch of the loaders on a running host, against a hub that is served here."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
import workflow
from host import Client, ExecutionFailed, PromptRejected, Server

from ..helpers import NANO
from ..hub import Hub

LOADERS = ("ZImageTransformerLoader", "ZImageTextEncoderLoader", "ZImageVAELoader")


@pytest.fixture
def served(each_host: Server, host_version: str, hubs: dict[str, Hub]) -> Iterator[tuple[Hub, Server]]:
    """A hub and a host that asks it. Nothing asked it before, and nothing that was fetched stays."""
    hub = hubs[host_version]
    assert hub.asked == []
    hub.repositories["Org/Nano"] = NANO
    yield hub, each_host
    shutil.rmtree(each_host.base / "models" / "zimage" / "Org--Nano", ignore_errors=True)
    hub.status.clear()
    hub.asked.clear()


def prompt(repository: str = "", download: bool = False, **sampler: Any) -> dict[str, Any]:
    found = workflow.load("zimage_nano_txt2img")
    for loader in LOADERS:
        found[workflow.only(found, loader)]["inputs"].update(repository=repository, download=download)
    workflow.set_sampler(found, **sampler)
    return found


def test_nothing_is_fetched_unasked_and_the_error_says_how(served):
    hub, server = served
    turbo = workflow.load("zimage_turbo_txt2img")
    with server.connect() as client:
        words = r"Tongyi-MAI/Z-Image-Turbo \(about [\d.]+ GB\) is not here. Switch `download` on in this node"
        with pytest.raises(PromptRejected, match=words):
            client.run(turbo)
        with pytest.raises(PromptRejected, match="Org/Nano is not here. Switch `download` on"):
            client.run(prompt("Org/Nano"))
        with pytest.raises(PromptRejected, match="'nonsense' is no repository of the hub, expected Org/Name"):
            client.run(prompt("nonsense", True))
    assert hub.asked == []


def test_download_is_shown_interrupted_resumed_and_gives_the_same_image(served):
    hub, server = served
    with server.connect() as client:
        (expected,) = client.images(client.run(prompt()))
        hub.speed = 3e6
        try:
            prompt_id = client.queue(prompt("Org/Nano", True))
            _wait_for_bytes(client, 3e6)  # of the transformer: the others are smaller
            client.interrupt(prompt_id)
            served = hub.served
            entry = client.wait(prompt_id)
            assert hub.served - served < 1.5 * hub.speed  # seconds, of which the download takes less than 1
            assert entry["status"]["messages"][-1][0] == "execution_interrupted"
        finally:
            hub.speed = None
        hub.asked.clear()
        (image,) = client.images(client.run(prompt("Org/Nano", True)))
        assert _pixels(image) == _pixels(expected)
        assert any(ranged.startswith("bytes=") for _, _, ranged in hub.asked)
        assert any(event["type"] == "progress" and event["data"]["max"] > 5e6 for event in client.events)

        # it is there now: without the switch, from the list, and without loading anything again
        hub.asked.clear()
        client.events.clear()
        client.run(prompt("Org/Nano", True, seed=5))
        executed = {event["data"]["node"] for event in client.events if event["type"] == "executing"}
        assert not executed & {workflow.only(prompt(), loader) for loader in LOADERS}
        chosen = prompt(seed=5)
        for loader in LOADERS:
            chosen[workflow.only(chosen, loader)]["inputs"]["model"] = "Org--Nano"
        client.run(chosen)
        assert hub.asked == []


def test_a_failed_download_says_why(served):
    hub, server = served
    hub.status["Org/Gated"] = (403, "GatedRepo")
    with server.connect() as client, pytest.raises(ExecutionFailed, match="access is restricted.*Org/Gated"):
        client.run(prompt("Org/Gated", True))


def _wait_for_bytes(client: Client, count: float) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        event = client.receive(1)
        if event and event["type"] == "progress" and event["data"]["value"] >= count:
            return
    raise TimeoutError(f"no progress of {count} bytes; the last messages were {client.events[-3:]}")


def _pixels(png: bytes) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).tobytes()


def test_known_repositories_are_in_the_lists(served):
    _, server = served
    with server.connect() as client:
        options = _options(client, "ZImageTransformerLoader")
    marked = {f"Tongyi-MAI--{name} (download)" for name in ("Z-Image-Turbo", "Z-Image")}
    assert set(options[-2:]) == marked


def _options(client: Client, node: str) -> list[str]:
    kind, settings = client.object_info(node)[node]["input"]["required"]["model"][:2]
    return kind if isinstance(kind, list) else settings["options"]
