"""Real ComfyUI servers with the pack in them, each started once, when a test first asks for it.

`host`: the newest ComfyUI. `each_host`: a test with it runs on every `host_version`, on the oldest in `make test-all`
only, but for two tests: the pack loads and draws there. `client`: a fresh connection to
`host`, `each_client` to `each_host`. A server's models/, input/ and output/ are in `host.base`. The hub that it would
download from is one of `hubs`, so what nobody asked for would show there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import provision
import pytest
from host import Client, Server

from ..hub import Hub, serve

# Folder names in custom_nodes: users rename the folder, and ComfyUI makes a module name of its path.
PACKS = {provision.OLDEST: "ComfyUI-Z.Image (renamed)", provision.NEWEST: "comfyui-zimage"}


@pytest.fixture(scope="session")
def hubs() -> Iterator[dict[str, Hub]]:
    """version -> the hub that the server of this version asks. In the end no request is left that no test wanted."""
    with ExitStack() as stack:
        found = {version: stack.enter_context(serve()) for version in PACKS}
        yield found
        assert [hub.asked for hub in found.values()] == [[], []]


@pytest.fixture(scope="session")
def start_host(hubs: dict[str, Hub]) -> Iterator[Callable[[str], Server]]:
    """version -> the running server of that version, or a skip that says why it can't be had."""
    running: dict[str, Server] = {}
    with ExitStack() as stack:

        def start(version: str) -> Server:
            if version not in running:
                comfyui = provision.newest() if version == provision.NEWEST else provision.folder(version)
                if not (comfyui / "main.py").is_file():
                    why = "COMFYUI_PATH replaces it" if provision.chosen() else "`make setup` provisions it"
                    pytest.skip(f"ComfyUI {version} is not in {comfyui.relative_to(provision.ROOT)}: {why}")
                online = {"HF_ENDPOINT": hubs[version].endpoint, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
                server = Server(comfyui, packs={PACKS[version]: provision.ROOT}, environment=online)
                running[version] = stack.enter_context(server)
            running[version].check_alive()
            return running[version]

        yield start


@pytest.fixture(scope="session")
def host(start_host: Callable[[str], Server]) -> Server:
    return start_host(provision.NEWEST)


@pytest.fixture(scope="session", params=[pytest.param(provision.OLDEST, marks=pytest.mark.slow), provision.NEWEST])
def host_version(request: pytest.FixtureRequest) -> str:
    """The ComfyUI that is tested; with COMFYUI_PATH its checkout stands in for the newest."""
    return request.param


@pytest.fixture(scope="session")
def each_host(start_host: Callable[[str], Server], host_version: str) -> Server:
    return start_host(host_version)


@pytest.fixture
def client(host: Server) -> Iterator[Client]:
    with host.connect() as client:
        yield client


@pytest.fixture
def each_client(each_host: Server) -> Iterator[Client]:
    with each_host.connect() as client:
        yield client
