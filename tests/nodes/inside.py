"""Imports a ComfyUI and this pack into the running process, the way ComfyUI does it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NODES = "control convert inpaint loaders lora conditioning sampling vae".split()
BRIDGE = "attention clip control download files folders layers lora model others prompts quantized".split()
BRIDGE += "references sampler vae".split()


def load_pack(*flags: str, cpu: bool = True, **settings: Any) -> SimpleNamespace:
    """The modules of nodes/, by name, those of its bridge under `bridge`.

    flags, settings: of ComfyUI's command line, by name.
    """
    if str(ROOT / ".ci") not in sys.path:
        sys.path.append(str(ROOT / ".ci"))
    import provision

    # Before the repository on sys.path, whose nodes/ would hide ComfyUI's nodes.py.
    sys.path.insert(0, str(provision.newest()))
    importlib.import_module("utils.install_util")  # as main.py does: later, comfy/utils.py would hide the package
    from comfy.cli_args import args

    for flag, value in {"cpu": cpu, **dict.fromkeys(flags, True), **settings}.items():
        setattr(args, flag, value)
    name = "zimage_pack"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    nodes, bridge = (
        {module: importlib.import_module(f"{name}.nodes.{room}{module}") for module in modules}
        for room, modules in (("", NODES), ("bridge.", BRIDGE))
    )
    return SimpleNamespace(**nodes, bridge=SimpleNamespace(**bridge))
