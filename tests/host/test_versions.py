"""The pack in every ComfyUI that is provisioned, one after the other."""

from __future__ import annotations

import io

import numpy as np
import provision
import pytest
import workflow
from host import Server
from PIL import Image

from ..helpers import ROOT
from .test_server import NODES

HELLO = "zimage_nano_txt2img"


@pytest.mark.slow
@pytest.mark.skipif(provision.chosen() is not None, reason="COMFYUI_PATH names the one to test")
def test_every_version_draws_the_same_image():
    images = {}
    for version in provision.SOURCES:
        with Server(provision.folder(version), packs={"comfyui-zimage": ROOT}) as server, server.connect() as client:
            assert client.get("/system_stats")["system"]["comfyui_version"] == version
            assert set(client.object_info()) >= NODES
            (png,) = client.images(client.run(workflow.load(HELLO)))
            images[version] = np.asarray(Image.open(io.BytesIO(png)))
    newest = images[provision.NEWEST]
    assert {version: int((image != newest).sum()) for version, image in images.items()} == dict.fromkeys(images, 0)
    assert newest.std() > 10  # there is something in it
