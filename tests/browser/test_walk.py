"""What a newcomer meets, from an empty user folder on; what the window showed is in build/screenshots/."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import browser
import pytest
from host import Server
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from nano import judge

from ..helpers import ROOT
from .conftest import Look

pytestmark = pytest.mark.slow
GRAPHS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "workflows").glob("*.json")}
SMALL, TOO_SMALL = "return app.canvas.low_quality", "opens so small that the canvas draws no text"
LOADERS = ("ZImageTransformerLoader", "ZImageTextEncoderLoader", "ZImageVAELoader", "ZImageControlNet")


def models(graph: dict[str, Any]) -> list[str]:
    """The names that the loaders of a graph have chosen."""
    return [node["widgets_values"][0] for node in graph["nodes"] if node["type"] in LOADERS]


def runs(graph: dict[str, Any]) -> bool:
    """Whether it needs nothing but what ships with the pack."""
    return all("Nano" in model for model in models(graph))


def images(graph: dict[str, Any]) -> int:
    """How many images it saves."""
    return sum(node["type"] == "SaveImage" for node in graph["nodes"])


def assert_shows(png: bytes, prompt: str) -> None:
    """That the nano model drew what the prompt says."""
    background, objects = judge.read(pil_to_tensor(Image.open(io.BytesIO(png)).convert("RGB")) / 255)
    assert f"{background} background" in prompt
    assert objects and all(f"{seen.color} {seen.shape}" in prompt for seen in objects), (objects, prompt)


# The smallest graph of the nano model says hello.
HELLO = min((name for name, graph in GRAPHS.items() if runs(graph)), key=lambda name: len(GRAPHS[name]["nodes"]))


def test_the_first_image(chromium: Any, server: Server, frontend: str):
    """The template browser opens by itself; two clicks load a graph, a third one draws what its prompt says."""
    (server.base / "user" / "default" / "comfy.settings.json").unlink(missing_ok=True)
    with browser.open_page(chromium, server) as page:
        page.get_by_role("dialog").get_by_text("comfyui-zimage").click()
        cards = page.locator("[data-testid^=template-workflow-]")
        page.get_by_test_id(f"template-workflow-{HELLO}").wait_for()
        assert sorted(card.get_by_role("heading").inner_text() for card in cards.all()) == sorted(GRAPHS)
        for card in cards.all():
            card.scroll_into_view_if_needed()
            assert card.locator("img").first.evaluate("async (image) => (await image.decode(), image.naturalWidth)")
        cards.first.scroll_into_view_if_needed()
        browser.screenshot(page, f"{frontend}/templates")
        page.get_by_test_id(f"template-workflow-{HELLO}").click()
        page.wait_for_function("() => window.app.graph.nodes.some((node) => node.type === 'ZImageSampler')")
        browser.wait_until_still(page)
        assert not browser.run(page, SMALL), TOO_SMALL
        browser.queue(page)
        png = browser.saved_image(page)
        page.wait_for_timeout(1000)  # for the image to be drawn into its node
        browser.screenshot(page, f"{frontend}/first-image")
        prompt = browser.run(page, "return JSON.stringify((await app.graphToPrompt()).output)")
    assert_shows(png, prompt)


@pytest.mark.parametrize("name", GRAPHS)
def test_workflow_opens(page: Any, look: Look, frontend: str, name: str):
    """Every node is known, no two overlap, its text is readable, and the frontend tells of each missing file."""
    browser.open_graph(page, GRAPHS[name])
    browser.screenshot(page, f"{frontend}/{look}/{name}")
    boxes = browser.boxes(page)
    assert len(boxes) == len(GRAPHS[name]["nodes"])
    assert browser.overlaps(boxes) == []
    assert browser.wrong(page) == []
    assert not browser.run(page, SMALL), TOO_SMALL
    if not runs(GRAPHS[name]):
        browser.queue(page)
        wanted = [Path(model.split(" (")[0].replace("--", "/")).name for model in models(GRAPHS[name])]
        told = browser.problems(page, *wanted)
        browser.screenshot(page, f"{frontend}/{look}/{name} without its files")
        assert [model for model in wanted if model not in told] == [], told


@pytest.mark.parametrize("name", [name for name, graph in GRAPHS.items() if runs(graph)])
def test_nothing_is_covered_after_a_run(page: Any, look: Look, frontend: str, name: str):
    """Previews make nodes higher."""
    browser.open_graph(page, GRAPHS[name])
    before = browser.boxes(page)
    browser.queue(page)
    browser.saved_image(page)
    page.wait_for_function("(count) => Object.values(window.app.nodeOutputs).length >= count", arg=images(GRAPHS[name]))
    page.wait_for_timeout(1000)  # for the images to be drawn into their nodes
    browser.screenshot(page, f"{frontend}/{look}/{name} after its run")
    after = browser.boxes(page)
    assert after != before, "no preview"
    assert browser.overlaps(after) == []


# What goes wrong for newcomers: a change to the graph that says hello, and what the error has to name.
MISTAKES = {
    "size": ("widget(node('EmptySD3LatentImage'), 'width').value = 24", ["24x128", "16"]),
    "negative": ("const n = node('ZImageSampler'); n.disconnectInput(n.findInputSlot('negative'))", ["negative"]),
    "file": ("widget(node('ZImageVAELoader'), 'model').value = 'gone.safetensors'", ["gone.safetensors"]),
}
FIND = """
const node = (type) => graph.nodes.find((one) => one.type === type);
const widget = (node, name) => node.widgets.find((one) => one.name === name);
"""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_error_is_readable(page: Any, look: Look, frontend: str, mistake: str):
    change, words = MISTAKES[mistake]
    browser.open_graph(page, GRAPHS[HELLO])
    browser.run(page, FIND + change + "; await app.loadGraphData(graph.serialize())")
    browser.queue(page)
    panel = browser.problems(page, *words)
    browser.screenshot(page, f"{frontend}/{look}/error {mistake}")
    assert [word for word in words if word not in panel] == [], panel
    message = browser.run(page, "return app.lastExecutionError?.exception_message")
    if message:  # else it was found before anything ran
        assert message.strip() in panel
        assert not message.startswith(("/", "ZImage", "zimage")) and str(ROOT) not in message
        assert browser.run(page, "return app.lastExecutionError.exception_type") in ("ValueError", "FileNotFoundError")


NODES = sorted(path.name for path in (ROOT / "web" / "docs").iterdir())


def test_help_opens_in_the_users_language(page: Any, look: Look, frontend: str):
    """The (i) above a selected node shows its page, and the node has the title of this language."""
    for node in NODES:
        graph = {"nodes": [{"id": 1, "type": node, "pos": [0, 0], "size": [300, 300]}], "links": [], "version": 0.4}
        browser.open_graph(page, graph)
        browser.run(page, "app.canvas.selectItems(graph.nodes)")
        page.get_by_test_id("info-button").click()
        text = (ROOT / "web" / "docs" / node / f"{look.locale}.md").read_text(encoding="utf-8")
        title = text.splitlines()[0].lstrip("# ")
        page.get_by_test_id("properties-panel").get_by_role("heading", name=title, exact=True).first.wait_for()
        assert browser.run(page, "return graph.nodes[0].title") == title
    browser.screenshot(page, f"{frontend}/{look}/help")
