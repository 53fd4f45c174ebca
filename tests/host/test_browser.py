"""The frontend in a real browser: it opens every shipped workflow, and runs the smallest of the nano model's."""

from __future__ import annotations

import io
import json
from typing import Any

import browser
from host import Server
from PIL import Image

from ..helpers import ROOT

GRAPHS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "workflows").glob("*.json")}


def test_the_frontend_opens_every_workflow_and_draws(chromium: Any, host: Server):
    with browser.open_page(chromium, host, {"Comfy.Locale": "en", "Comfy.VueNodes.Enabled": False}) as page:
        for name, graph in GRAPHS.items():
            browser.open_graph(page, graph)
            assert (name, browser.wrong(page)) == (name, [])
            assert len(browser.boxes(page)) == len(graph["nodes"])
        nano = [graph for name, graph in GRAPHS.items() if "nano" in name.lower()]
        browser.open_graph(page, min(nano, key=lambda graph: len(graph["nodes"])))
        browser.queue(page)
        assert Image.open(io.BytesIO(browser.saved_image(page))).size == (128, 128)
