"""What the nodes of a ComfyUI server take, by its /object_info: whether it can run a workflow, and types of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .graph import Target, Workflow
from .rows import COLUMNS

Info = Mapping[str, Any]  # class -> what /object_info says of it
SHOWN = 12  # of the choices in an error


def spec(info: Info, workflow: Workflow, target: Target) -> tuple[Any, Mapping[str, Any]] | None:
    """(type, settings) of an input; the type of a choice is the list of what is offered. None if it isn't known."""
    groups = info.get(workflow.nodes[target.node]["class_type"], {}).get("input", {})
    for group in ("required", "optional"):
        found = groups.get(group, {}).get(target.name)
        if found:
            settings = found[1] if len(found) > 1 and isinstance(found[1], dict) else {}
            if found[0] == "COMBO":
                return settings.get("options", []), settings
            return found[0], settings
    return None


def known(info: Info) -> dict[str, list[str]]:
    """Class -> all inputs that it takes."""
    return {
        name: [one for group in ("required", "optional") for one in node.get("input", {}).get(group, {})]
        for name, node in info.items()
    }


def lacks(info: Info, workflow: Workflow, values: Mapping[Target, Iterable[Any]]) -> list[str]:
    """Why a server can't run this workflow: classes it doesn't know, choices it doesn't offer.

    values: all that the rows put into an input, beside what the file has there.
    """
    found = []
    for node, content in workflow.nodes.items():
        if content["class_type"] not in info:
            found.append(
                f"it doesn't know {content['class_type']} (node {node}, {workflow.title(node)!r}); install the pack "
                "that has it"
            )
            continue
        for name in {**content["inputs"], **{target.name: None for target in values if target.node == node}}:
            target = Target(node, name)
            own = workflow.value(target)
            used = [*values.get(target, [] if own is None else [own])]
            found += [
                f"{workflow.shown(target)} is {value!r}, which it doesn't offer; {_offered(info, workflow, target)}"
                for value in dict.fromkeys(value for value in used if isinstance(value, str | int | float))
                if not _has(info, workflow, target, value)
            ]
    if not found and not any(info[content["class_type"]].get("output_node") for content in workflow.nodes.values()):
        found.append("no node of this workflow saves an image; add a SaveImage node and export it again")
    return found


def takes_images(info: Info, workflow: Workflow, target: Target) -> bool:
    """Whether an input is the name of an image that may be sent to the server."""
    _, settings = spec(info, workflow, target) or (None, {})
    return bool(settings.get("image_upload"))


def reader(info: Info, workflow: Workflow, target: Target) -> Callable[[Any], Any]:
    """What turns a value of the file into that of this input, or raises ValueError saying what is expected."""
    kind, settings = spec(info, workflow, target) or (None, {})
    if kind in ("INT", "FLOAT"):
        return lambda value: _number(value, kind == "INT", settings)
    if kind == "BOOLEAN":
        return _switch
    if kind == "STRING":
        return lambda value: COLUMNS["prompt"](value, None)  # type: ignore[arg-type]
    if isinstance(kind, list):
        return lambda value: _choice(value, kind)
    return _plain


def _offered(info: Info, workflow: Workflow, target: Target) -> str:
    kind, _ = spec(info, workflow, target) or ([], {})
    shown = ", ".join(map(str, kind[:SHOWN])) + (f" and {len(kind) - SHOWN} more" if len(kind) > SHOWN else "")
    return f"it offers {shown}" if kind else "it offers none"


def _has(info: Info, workflow: Workflow, target: Target, value: Any) -> bool:
    kind, settings = spec(info, workflow, target) or (None, {})
    if not isinstance(kind, list) or "remote" in settings:  # a choice that is filled later
        return True
    if (
        any(name.endswith("_upload") for name in settings)
        and isinstance(value, str)
        and ("/" in value or " [" in value)
    ):
        return True  # files in folders below are taken, too, and not listed
    return value in kind


def _number(value: Any, whole: bool, settings: Mapping[str, Any]) -> int | float:
    least, most = settings.get("min"), settings.get("max")
    bounds = f" from {least} to {most}" if least is not None and most is not None else ""
    told = f"expected a {'whole ' if whole else ''}number{bounds}"
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(told)
        number: int | float = int(value) if whole and not isinstance(value, float) else float(value)
        if whole and isinstance(number, float):
            if not number.is_integer():
                raise ValueError(told)
            number = int(number)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(told)
    except (ValueError, OverflowError):
        raise ValueError(told) from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(told)
    return number


def _switch(value: Any) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if word in ("true", "false") or isinstance(word, bool):
        return word in ("true", True)
    raise ValueError("expected true or false")


def _choice(value: Any, choices: list[Any]) -> Any:
    if isinstance(value, bool | list | dict) and value not in choices:
        raise ValueError("expected one of the choices of this input, as text")
    # as text, which is all that a CSV has; whether a server offers it is asked of each
    return next((choice for choice in choices if choice == value or str(choice) == value), value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | dict):
        raise ValueError("expected text, a number, true or false")
    return value
