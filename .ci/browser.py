"""A real browser on ComfyUI's own frontend: Chromium out of Debian's packages, driven by playwright.

with browser.start() as chromium, browser.open_page(chromium, server) as page:
    browser.open_graph(page, graph)
    browser.screenshot(page, "graph")
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision import ROOT, VENV

if TYPE_CHECKING:
    from host import Server
    from playwright.sync_api import Browser, Page

FOLDER = VENV / "chromium"
PROGRAM = "chromium-headless-shell"
FONT = "fonts-wqy-microhei"  # has the Chinese characters
FRONTENDS = ["1.58.1"]  # beside the one that ComfyUI 0.30.0 asks for, 1.47.12
SCREENSHOTS = ROOT / "build" / "screenshots"
MISSING = "no Chromium here: `make setup` fetches Debian's where there is apt-get; else install one"


# Getting them


def fetch() -> None:
    """Puts what this machine lacks of Chromium, its libraries and a font into `.venv/chromium`, from Debian's archive.

    Changes nothing outside that folder and needs no rights. Raises OSError or CalledProcessError where apt can't do it.
    """
    partial = FOLDER.with_name(".chromium.partial")
    shutil.rmtree(partial, ignore_errors=True)
    lists, cache = partial / "lists", partial / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    places = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
    apt = ["apt-get", "-qq", *places, "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User="]
    subprocess.run([*apt, "update"], check=True)
    # Of these and what they depend on, apt downloads what the machine lacks.
    packages = [FONT] if installed() else [FONT, PROGRAM]
    options = ["--yes", "--download-only", "--no-install-recommends"]
    subprocess.run([*apt, "install", *options, *packages], check=True, stdout=subprocess.DEVNULL)
    for package in cache.glob("archives/*.deb"):
        subprocess.run(["dpkg", "-x", package, partial], check=True)
    shutil.rmtree(lists)
    shutil.rmtree(cache)
    (partial / "fonts.conf").write_text(
        "<fontconfig><dir>/usr/share/fonts</dir>"
        f"<dir>{FOLDER / 'usr/share/fonts'}</dir><cachedir>{FOLDER / 'font-cache'}</cachedir></fontconfig>"
    )
    shutil.rmtree(FOLDER, ignore_errors=True)
    partial.replace(FOLDER)


def frontend(version: str) -> Path:
    """Where a provisioned frontend is, to be given as --front-end-root."""
    return VENV / "frontends" / version / "comfyui_frontend_package" / "static"


def program() -> Path | None:
    """The Chromium to run: the provisioned one, else one that is installed, else None."""
    own = FOLDER / "usr" / "lib" / "chromium" / PROGRAM
    return own if own.is_file() else installed()


def installed() -> Path | None:
    found = shutil.which(PROGRAM) or shutil.which("chromium")
    return Path(found) if found else None


# Driving it


@contextmanager
def start() -> Iterator[Browser]:
    """A running Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = program()
    if chromium is None:
        raise FileNotFoundError(MISSING)
    libraries = ":".join(sorted({str(path.parent) for path in FOLDER.rglob("*.so*")}))
    environment = os.environ | {"LD_LIBRARY_PATH": libraries, "FONTCONFIG_FILE": str(FOLDER / "fonts.conf")}
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", *quiet], env=environment, headless=True
        )
        yield browser
        browser.close()


@contextmanager
def open_page(
    browser: Browser,
    server: Server,
    settings: dict[str, Any] | None = None,
    size: tuple[int, int] = (1366, 768),
) -> Iterator[Page]:
    """The frontend of a server in a fresh profile, when its graph is ready and it knows the pack's nodes.

    `settings`: the user's, kept by the server, such as {"Comfy.Locale": "zh"}. Raises AssertionError in the end if a
    script of the page failed.
    """
    if settings:
        with server.connect() as client:
            client.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False, **settings})
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    try:
        page = context.new_page()
        page.set_default_timeout(30_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url, timeout=120_000)
        page.wait_for_function(READY, timeout=120_000)
        yield page
        assert not errors, errors
    finally:
        context.close()


READY = (
    "() => window.app?.vueAppReady && window.app.isGraphReady "
    "&& Boolean(window.LiteGraph?.registered_node_types['ZImageSampler'])"
)


def run(page: Page, body: str, argument: Any = None) -> Any:
    """The value that an asynchronous function with this body returns; it sees `app`, `graph` and `argument`."""
    return page.evaluate(f"async (argument) => {{ const app = window.app, graph = app.graph; {body} }}", argument)


def open_graph(page: Page, graph: dict[str, Any] | Path) -> None:
    """Opens a workflow as its card does, fitted into the window, and waits until its nodes stand still."""
    run(
        page,
        "await app.loadGraphData(argument, true, true, null, { openSource: 'template' })",
        json.loads(graph.read_text(encoding="utf-8")) if isinstance(graph, Path) else graph,
    )
    wait_until_still(page)


def wait_until_still(page: Page) -> None:
    """Returns when the nodes have kept their places and sizes for a tenth of a second."""
    last = None
    for _ in range(100):
        page.wait_for_timeout(100)
        now = boxes(page)
        if now == last:
            return
        last = now
    raise TimeoutError(f"nodes still move after 10 s: {last}")


def boxes(page: Page) -> dict[str, list[float]]:
    """ "type id" of each node -> [left, top, width, height] as drawn, title included, in the graph's pixels."""
    return run(page, BOXES)


BOXES = """
const view = app.canvas.ds, drawn = document.querySelectorAll("[data-node-id]");
if (!drawn.length)  // LiteGraph draws on the canvas
  return Object.fromEntries(graph.nodes.map((node) => {
    node.updateArea?.();
    return [`${node.type} ${node.id}`, [...node.boundingRect]];
  }));
const types = Object.fromEntries(graph.nodes.map((node) => [node.id, node.type]));
return Object.fromEntries([...drawn].map((element) => {
  const box = element.getBoundingClientRect();
  const place = [box.x / view.scale - view.offset[0], box.y / view.scale - view.offset[1]];
  return [`${types[element.dataset.nodeId]} ${element.dataset.nodeId}`,
    [...place, box.width / view.scale, box.height / view.scale]];
}));
"""


def overlaps(boxes: dict[str, list[float]]) -> list[tuple[str, str]]:
    """The pairs whose boxes share more than a line of pixels."""

    def meet(a: list[float], b: list[float]) -> bool:
        return all(a[side] + a[side + 2] > b[side] + 1 and b[side] + b[side + 2] > a[side] + 1 for side in (0, 1))

    return [(one, two) for one, two in itertools.combinations(boxes, 2) if meet(boxes[one], boxes[two])]


def wrong(page: Page) -> list[str]:
    """The types of nodes that the frontend does not know or marks; what reads files is marked where one is missing."""
    test = "!LiteGraph.registered_node_types[node.type] || (node.has_errors && !/Load|ControlNet/.test(node.type))"
    return run(page, f"return graph.nodes.filter((node) => {test}).map((node) => node.type)")


def queue(page: Page) -> None:
    """Presses Run."""
    page.get_by_test_id("queue-button").click()


def saved_image(page: Page, timeout: float = 120.0) -> bytes:
    """The first image file of the run that was just queued, once it is there; `open_graph` forgets older ones."""
    page.wait_for_function(f"() => {IMAGE} || window.app.lastExecutionError", timeout=timeout * 1000)
    error = run(page, "return app.lastExecutionError?.exception_message")
    if error:
        raise AssertionError(error)
    image = page.evaluate(f"() => {IMAGE}")
    return page.request.get(page.evaluate("location.origin") + "/view", params=image).body()


IMAGE = "Object.values(window.app.nodeOutputs ?? {}).flatMap((output) => output.images ?? [])[0]"


def problems(page: Page, *words: str) -> str:
    """The text of the panel of errors, which the frontend offers when it knows of some, once it has these words.

    Where they don't come within 20 s, the text without them is returned. What the server said of an input is behind
    an (i), which is pressed.
    """
    panel, tab = page.get_by_test_id("properties-panel"), page.get_by_test_id("panel-tab-errors")
    (tab if panel.is_visible() else page.get_by_test_id("error-overlay-see-errors")).click()
    infos = panel.locator("button:has([class*='lucide--info'])")
    for _ in range(100):
        text = panel.inner_text()
        if all(word in text for word in words):
            break
        for info in infos.all():
            if info.get_attribute("aria-expanded") != "true":
                info.click()
        page.wait_for_timeout(200)
    return text


def screenshot(page: Page, name: str) -> None:
    """Keeps what the window shows in build/screenshots/, for looking at."""
    file = SCREENSHOTS / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=file)
