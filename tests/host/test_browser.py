"""A short smoke of tests/browser: the frontend opens the nano model's workflows and draws the smallest."""

from __future__ import annotations

import io
import json
from typing import Any

import browser
from host import Server
from PIL import Image

from ..helpers import ROOT

FILES = [path for path in (ROOT / "workflows").glob("*.json") if "nano" in path.name.lower()]


def test_the_frontend_opens_workflows_and_draws(chromium: Any, host: Server):
    with browser.open_page(chromium, host, {"Comfy.Locale": "en", "Comfy.VueNodes.Enabled": False}) as page:
        graphs = [json.loads(file.read_text(encoding="utf-8")) for file in FILES]
        for graph in sorted(graphs, key=lambda graph: -len(graph["nodes"])):
            browser.open_graph(page, graph)
            assert (graph["id"], browser.wrong(page)) == (graph["id"], [])
            assert len(browser.boxes(page)) == len(graph["nodes"])
        browser.queue(page)
        assert Image.open(io.BytesIO(browser.saved_image(page))).size == (128, 128)
