"""A workflow in API format: its nodes by title or id, and which of their inputs a column fills."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .identity import digest

Nodes = dict[str, dict[str, Any]]  # id -> {"class_type": ..., "inputs": {...}, "_meta": {"title": ...}}

# Input of a sampler -> the column that fills it. KSampler's CFG is guidance_scale + 1.
SAMPLERS: dict[str, dict[str, str]] = {
    "ZImageSampler": {
        "seed": "seed",
        "steps": "steps",
        "guidance_scale": "guidance_scale",
        "cfg_normalization": "cfg_normalization",
        "cfg_truncation": "cfg_truncation",
    },
    "KSampler": {"seed": "seed", "steps": "steps", "cfg": "guidance_scale"},
    "KSamplerAdvanced": {"noise_seed": "seed", "steps": "steps", "cfg": "guidance_scale"},
}
ENCODERS = ("ZImageTextEncode", "CLIPTextEncode")
SIZES = ("EmptySD3LatentImage", "EmptyLatentImage")
MODELS = ("model", "unet_name", "ckpt_name")  # inputs of loaders that name one


@dataclass(frozen=True)
class Target:
    """An input of a node."""

    node: str
    name: str


class Workflow:
    """workflow = Workflow.read("zimage_nano_txt2img_api.json")
    workflow.filled({Target("4", "text"): "a red circle"})  # what POST /prompt takes
    """

    def __init__(self, nodes: Nodes):
        self.nodes = nodes

    @classmethod
    def read(cls, path: Path) -> Workflow:
        """Raises ValueError, saying what to do, for what is no workflow in API format; OSError."""
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--workflow {path} is not JSON ({error}); {EXPORT}") from None
        if isinstance(found, dict) and isinstance(found.get("nodes"), list):
            raise ValueError(f"--workflow {path} is a graph as the editor saves it, not in API format; {EXPORT}")
        if not isinstance(found, dict) or not found or not all(map(_is_node, found.values())):
            raise ValueError(f"--workflow {path} is no workflow in API format (nodes by id); {EXPORT}")
        workflow = cls(found)
        for target, value in workflow._inputs():
            if (link := _link(value)) is not None and link not in found:
                raise ValueError(
                    f"--workflow {path}: {workflow.shown(target)} is connected to node {link}, which is not in it; "
                    f"{EXPORT}"
                )
        return workflow

    def title(self, node: str) -> str:
        """As the editor shows it, else the class."""
        found = self.nodes.get(node, {})
        return str(found.get("_meta", {}).get("title") or found.get("class_type") or f"node {node}")

    def shown(self, target: Target) -> str:
        """As a column names it: by title, by id where several nodes have that title."""
        title = self.title(target.node)
        return f"{title if len(self._titled(title)) == 1 else target.node}.{target.name}"

    def listed(self) -> str:
        """All inputs that a column can fill, a node a line."""
        lines = []
        for node, found in self.nodes.items():
            names = [name for name, value in found["inputs"].items() if _link(value) is None]
            if names:
                lines.append(f"  {node} {self.title(node)!r} ({found['class_type']}): {', '.join(names)}")
        return "The workflow's nodes and their inputs are:\n" + "\n".join(lines)

    def find(self, text: str, known: Mapping[str, Iterable[str]]) -> Target:
        """The input that "title.input" or "id.input" names.

        known: class -> all inputs that it takes, those too that the file leaves out. Raises ValueError.
        """
        for place in [number for number, character in enumerate(text) if character == "."]:
            name, input_ = text[:place].strip(), text[place + 1 :].strip()
            nodes = [name] if name in self.nodes else self._titled(name)
            if not nodes:
                continue
            if len(nodes) > 1:
                raise ValueError(
                    f"{text!r}: {len(nodes)} nodes are titled {name!r}; name one by its id: "
                    + " or ".join(f"{node}.{input_}" for node in nodes)
                )
            (node,) = nodes
            inputs = self.nodes[node]["inputs"]
            if input_ in inputs:
                if (link := _link(inputs[input_])) is not None:
                    raise ValueError(
                        f"{text!r} is connected to node {link} ({self.title(link)!r}), and a connection is not "
                        "replaced; name an input of that node"
                    )
                return Target(node, input_)
            names = [*inputs, *(one for one in known.get(self.nodes[node]["class_type"], ()) if one not in inputs)]
            if input_ in names:
                return Target(node, input_)
            raise ValueError(
                f"{text!r}: node {node} ({self.title(node)!r}) has no input {input_!r}{_near(input_, names)}; it has "
                f"{', '.join(names)}"
            )
        title = text.rpartition(".")[0]
        near = _near(title, [*self.nodes, *map(self.title, self.nodes)])
        raise ValueError(f"{text!r}: no node has this title or id{near}")

    def usual(self) -> dict[str, list[Target]]:
        """Column -> the inputs that it may mean; it is clear where there is one."""
        found: dict[str, dict[Target, None]] = {}

        def add(column: str, target: Target | None) -> None:
            if target is not None:
                found.setdefault(column, {})[target] = None

        for node, content in self.nodes.items():
            inputs = content["inputs"]
            for name, column in SAMPLERS.get(content["class_type"], {}).items():
                add(column, self._literal(Target(node, name)))
            if content["class_type"] not in SAMPLERS:
                continue
            for name, column in (("positive", "prompt"), ("negative", "negative_prompt")):
                for encoder in self._upstream(inputs.get(name), ENCODERS, name):
                    add(column, self._literal(Target(encoder, "text")))
            for size in self._upstream(inputs.get("latent_image"), SIZES, "latent_image"):
                add("width", self._literal(Target(size, "width")))
                add("height", self._literal(Target(size, "height")))
        # An unused negative is often made of the prompt itself (ConditioningZeroOut): it has no text of its own.
        negative = [target for target in found.get("negative_prompt", ()) if target not in found.get("prompt", ())]
        return {column: [*targets] for column, targets in found.items()} | {"negative_prompt": negative}

    def value(self, target: Target) -> Any:
        """What the file has there; None if nothing or a connection."""
        value = self.nodes[target.node]["inputs"].get(target.name)
        return None if _link(value) is not None else value

    def model(self) -> str | None:
        """The first model that a node loads."""
        return next(
            (str(value) for target, value in self._inputs() if target.name in MODELS and _link(value) is None), None
        )

    def filled(self, values: Mapping[Target, Any]) -> Nodes:
        """A copy with these values."""
        nodes = copy.deepcopy(self.nodes)
        for target, value in values.items():
            nodes[target.node]["inputs"][target.name] = value
        return nodes

    def _literal(self, target: Target) -> Target | None:
        """Itself, or the input of the primitive node that it is connected to; None for what is computed."""
        value = self.nodes[target.node]["inputs"].get(target.name)
        link = _link(value)
        if link is None:
            return target if target.name in self.nodes[target.node]["inputs"] else None
        source = self.nodes[link]
        if source["class_type"].startswith("Primitive") and _link(source["inputs"].get("value", [])) is None:
            return Target(link, "value") if "value" in source["inputs"] else None
        return None

    def _upstream(self, link: Any, classes: tuple[str, ...], name: str) -> Iterator[str]:
        """The nearest nodes of these classes that an input hangs on. name: of that input."""
        seen: set[tuple[str, str]] = set()
        waiting = [(link, name)]
        while waiting:
            link, name = waiting.pop()
            node = _link(link)
            if node is None or (node, name) in seen:
                continue
            seen.add((node, name))
            content = self.nodes[node]
            inputs = content["inputs"]
            if content["class_type"] in classes:
                yield node
            elif {"positive", "negative"} <= inputs.keys() and name in ("positive", "negative"):
                waiting.append((inputs[name], name))  # what changes both, such as a control network
            elif content["class_type"] in SAMPLERS:
                waiting.append((inputs.get("latent_image"), name))
            else:
                waiting += [(value, name) for value in inputs.values()]

    def _titled(self, title: str) -> list[str]:
        return [node for node in self.nodes if self.title(node) == title]

    def _inputs(self) -> Iterator[tuple[Target, Any]]:
        for node, content in self.nodes.items():
            for name, value in content["inputs"].items():
                yield Target(node, name), value


EXPORT = "in ComfyUI, open the workflow and save it by Workflow > Export (API)"


def identity(nodes: Nodes) -> str:
    """The hash of all that the nodes say to a server: titles leave it as it is."""
    return digest({node: [content["class_type"], content["inputs"]] for node, content in nodes.items()})


def _is_node(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("class_type"), str) and isinstance(value.get("inputs"), dict)
        and isinstance(value.get("_meta", {}), dict)
    )  # fmt: skip


def _link(value: Any) -> str | None:
    """The node that an input is connected to."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
        return value[0]
    return None


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, [*words], 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else ""
