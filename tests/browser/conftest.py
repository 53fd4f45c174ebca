"""ComfyUI's frontends in Chromium, each on a server of its own, as a user sees them.

`frontend`: the version in use. `page`: it, in each language and with each of the two renderers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import browser
import provision
import pytest
from host import Server


@dataclass(frozen=True)
class Look:
    """What a user chose in the settings."""

    locale: str
    vue: bool  # "Nodes 2.0"; else LiteGraph draws the nodes on a canvas

    def __str__(self) -> str:
        return f"{self.locale}-{'nodes2' if self.vue else 'litegraph'}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"Comfy.Locale": self.locale, "Comfy.VueNodes.Enabled": self.vue}


LOOKS = [Look(*both) for both in itertools.product(["en", "zh"], [False, True])]


@pytest.fixture(scope="session", params=["default", *browser.FRONTENDS])
def frontend(request: pytest.FixtureRequest) -> str:
    """A version, or "default": the one that the ComfyUI in use asks for."""
    return request.param


@pytest.fixture(scope="session")
def server(frontend: str) -> Iterator[Server]:
    args = [] if frontend == "default" else ["--front-end-root", str(browser.frontend(frontend))]
    with Server(provision.newest(), packs={"comfyui-zimage": provision.ROOT}, args=args) as server:
        yield server


@pytest.fixture(scope="session", params=LOOKS, ids=str)
def look(request: pytest.FixtureRequest) -> Look:
    return request.param


@pytest.fixture(scope="module")
def page(chromium: Any, server: Server, look: Look) -> Iterator[Any]:
    with browser.open_page(chromium, server, look.settings) as page:
        yield page
