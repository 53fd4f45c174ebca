"""The nodes that come with ComfyUI, by their ids, as the server calls them."""

from __future__ import annotations

import functools
import importlib
import inspect
from contextlib import suppress
from typing import Any

import provision


@functools.cache
def nodes() -> dict[str, Any]:
    """Id -> class, of nodes.py and comfy_extras."""
    found = dict(importlib.import_module("nodes").NODE_CLASS_MAPPINGS)
    for path in sorted((provision.newest() / "comfy_extras").glob("nodes_*.py")):
        try:
            module = importlib.import_module(f"comfy_extras.{path.stem}")
        except (ImportError, RuntimeError):  # wants a package that is not here, for what is not Z-Image's
            continue
        found |= getattr(module, "NODE_CLASS_MAPPINGS", {})
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__ and hasattr(kind, "GET_SCHEMA"):
                with suppress(NotImplementedError):  # a base of several
                    found[kind.GET_SCHEMA().node_id] = kind
    return found


def run(name: str, **inputs: Any) -> tuple[Any, ...]:
    """What the node puts out."""
    kind = nodes()[name]
    if hasattr(kind, "GET_SCHEMA"):
        return kind.execute(**inputs).args
    return getattr(kind(), kind.FUNCTION)(**inputs)
