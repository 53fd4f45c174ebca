"""Ways to an image that show no graph of our nodes: a blueprint, which is one node, and App mode."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import browser
import pytest
from host import Server

from ..helpers import ROOT
from .test_walk import GRAPHS, HELLO, assert_shows, runs

pytestmark = pytest.mark.slow
BLUEPRINTS = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
EMPTY: dict[str, Any] = {"nodes": [], "links": [], "version": 0.4}
PROMPT = "a green ring on a yellow background"
USE_NANO = """
const node = graph.nodes.find((node) => node.subgraph);
for (const widget of node.widgets)
  if (widget.name in argument) {
    widget.value = argument[widget.name];
    widget.callback?.(widget.value);
  }
const save = LiteGraph.createNode("SaveImage");
graph.add(save);
save.pos = [node.pos[0] + node.size[0] + 60, node.pos[1]];
node.connect(0, save, 0);
return (await app.graphToPrompt()).output;
"""


@pytest.fixture(params=[False, True], ids=["litegraph", "nodes2"])
def page(chromium: Any, server: Server, request: pytest.FixtureRequest) -> Any:
    """Fresh for each test: a search or App mode that was left open is in the way of the next one."""
    settings = {"Comfy.Locale": "en", "Comfy.VueNodes.Enabled": request.param}
    with browser.open_page(chromium, server, settings) as page:
        page.renderer = "nodes2" if request.param else "litegraph"
        yield page


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_blueprint_is_found_and_put_on_the_canvas(page: Any, frontend: str, name: str):
    browser.open_graph(page, EMPTY)
    place(page, name)
    browser.screenshot(page, f"{frontend}/en-{page.renderer}/{name}")
    (node,) = browser.run(page, "return graph.nodes.map((node) => node.serialize())")
    saved = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    assert [end["name"] for end in node["inputs"]] == [end["name"] for end in saved["nodes"][0]["inputs"]]
    assert browser.run(page, "return graph.nodes[0].subgraph.nodes.map((node) => node.type)") == [
        one["type"] for one in saved["definitions"]["subgraphs"][0]["nodes"]
    ]
    shown = browser.run(page, "return graph.nodes[0].widgets.map((widget) => widget.name)")
    assert {end["name"] for end in saved["nodes"][0]["inputs"] if "widget" in end} <= set(shown)


def test_blueprint_draws(page: Any, frontend: str):
    """The three files of Turbo replaced by those of the nano model, in the one node that is seen."""
    browser.open_graph(page, EMPTY)
    place(page, "Text to Image (Z-Image Turbo, ComfyUI-ZImage)")
    nano = "Z-Image-Nano (built in)"
    values = {"prompt": PROMPT, "width": 128, "height": 128} | dict.fromkeys(
        ["transformer", "text_encoder", "vae"], nano
    )
    prompt = browser.run(page, USE_NANO, values)
    browser.queue(page)
    png = browser.saved_image(page)
    page.wait_for_timeout(1000)  # for the image to be drawn into its node
    browser.screenshot(page, f"{frontend}/en-{page.renderer}/blueprint after its run")
    assert_shows(png, json.dumps(prompt))


@pytest.mark.parametrize("name", GRAPHS)
def test_app_mode(page: Any, frontend: str, name: str):
    """It shows prompts, image, size and seed, each under its name, and a nano workflow draws there."""
    browser.open_graph(page, GRAPHS[name])
    page.get_by_role("button", name="Enter app mode").click()
    widgets = page.get_by_test_id("linear-widgets")
    widgets.wait_for()
    page.wait_for_timeout(500)
    if page.get_by_test_id("coach-landing").is_visible():  # the frontend explains App mode once
        page.keyboard.press("Escape")
    labels = widgets.get_by_test_id("builder-widget-label").all_inner_texts()
    prompts = [node["title"].lower() for node in GRAPHS[name]["nodes"] if node["type"] == "ZImageTextEncode"]
    shown = {"EmptySD3LatentImage": ["width", "height"], "LoadImage": ["image"], "ZImageSampler": ["seed"]}
    others = [label for node in GRAPHS[name]["nodes"] for label in shown.get(node["type"], [])]
    assert sorted(labels) == sorted([*prompts, *others])
    if runs(GRAPHS[name]):
        if name == HELLO:
            widgets.locator("textarea").first.fill(PROMPT)
        prompt = browser.run(page, "return JSON.stringify((await app.graphToPrompt()).output)")
        page.get_by_test_id("linear-run-button-icon").click()
        png = browser.saved_image(page)
        page.wait_for_timeout(1500)  # for the image to be shown
        if name == HELLO:
            assert PROMPT in prompt
            assert_shows(png, prompt)
    browser.screenshot(page, f"{frontend}/en-{page.renderer}/{name} in App mode")
    page.get_by_role("button", name="Enter node graph").click()
    widgets.wait_for(state="detached")


def place(page: Any, name: str) -> None:
    """Double-click, the name as far as the search reads (it wants each word near the beginning), a click.

    Once more where nothing is found: a page finds no blueprints before it has fetched them.
    """
    from playwright.sync_api import TimeoutError as NotFound

    found = page.get_by_role("option", name=name).or_(page.get_by_text(name, exact=True)).first
    for _ in range(3):
        page.mouse.dblclick(600, 450)
        search = page.get_by_role("combobox").or_(page.get_by_placeholder("Search")).first
        search.wait_for()
        page.keyboard.type(name.split(" (")[0])
        with contextlib.suppress(NotFound):
            found.wait_for(timeout=10_000)
            break
        page.keyboard.press("Escape")
    found.click()
    page.wait_for_function("() => window.app.graph.nodes.length === 1")
    browser.wait_until_still(page)
