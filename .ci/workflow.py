"""API-format workflows: reading one, and changing what a user would change in it, by what the nodes are."""

from __future__ import annotations

import json
from typing import Any

from provision import ROOT

API = ROOT / "workflows" / "api"
SAMPLER = "ZImageSampler"
TEXT = "ZImageTextEncode"


def load(name: str) -> dict[str, Any]:
    """The API prompt of a shipped workflow, such as "zimage_nano_txt2img"."""
    return json.loads((API / f"{name}_api.json").read_text(encoding="utf-8"))


def nodes(prompt: dict[str, Any], class_type: str) -> list[str]:
    """The ids of all nodes of a type."""
    return [node for node, content in prompt.items() if content["class_type"] == class_type]


def only(prompt: dict[str, Any], class_type: str) -> str:
    """The id of the one node of a type. Raises ValueError if there is none or another."""
    found = nodes(prompt, class_type)
    if len(found) != 1:
        raise ValueError(f"expected one {class_type} in the workflow, found {len(found)} among {len(prompt)} nodes")
    return found[0]


def source(prompt: dict[str, Any], node: str, name: str) -> str:
    """The id of the node that is wired to an input. Raises ValueError if none is."""
    link = prompt[node]["inputs"].get(name)
    if not isinstance(link, list):
        raise ValueError(f"nothing is wired to {name!r} of node {node} ({prompt[node]['class_type']})")
    return link[0]


def set_text(prompt: dict[str, Any], text: str, name: str = "positive") -> None:
    """Sets the text of the encoder that feeds the sampler's `positive` or `negative`."""
    node = source(prompt, only(prompt, SAMPLER), name)
    if prompt[node]["class_type"] != TEXT:
        raise ValueError(f"{name!r} of the sampler comes from {prompt[node]['class_type']}, expected {TEXT}")
    prompt[node]["inputs"]["text"] = text


def set_sampler(prompt: dict[str, Any], **values: Any) -> None:
    """Sets widgets of the sampler. Raises ValueError for a name that the workflow does not have."""
    inputs = prompt[only(prompt, SAMPLER)]["inputs"]
    for name, value in values.items():
        if name not in inputs:
            raise ValueError(f"the sampler in the workflow has no {name!r}; it has {', '.join(inputs)}")
        inputs[name] = value


def set_size(prompt: dict[str, Any], width: int, height: int) -> None:
    """Sets width and height of the empty latent that the sampler starts from."""
    inputs = prompt[source(prompt, only(prompt, SAMPLER), "latent_image")]["inputs"]
    inputs.update(width=width, height=height)
