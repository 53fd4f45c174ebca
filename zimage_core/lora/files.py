"""LoRA files: every format's keys onto our weights, and a report. `formulas` has what they mean, `apply` adds it.

A key is a module's name in some format and a suffix that tells the part. Names are compared with underscores for dots
and without the habitual prefixes, so that one table (`key_maps`) serves PEFT, kohya, LyCORIS and ComfyUI alike.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnostics.finite import WHAT
from ..errors import CheckpointError
from ..weights import identify, key_maps, packed
from ..weights.tensor_files import MapFile, TensorFiles, map_safetensors
from .formulas import EXTRAS, FAMILIES, Adapter

# suffix of a key -> the part of an adapter that it is; the first that fits wins
SUFFIXES = {
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")},
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f".{part}.weight": f"glora_{part}" for part in ("a1", "a2", "b1", "b2")},
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
}
# ... of the text encoder, as ComfyUI, kohya, OneTrainer and others write it
TEXT_ENCODER = ("text_encoder_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "te_", "clip_")
COMPILED = "_orig_mod"  # a module that torch.compile has put around another
# what may stand before a module's name, dots already underscores; taken off as often as one fits
PREFIXES = (
    "base_model_model_",
    "model_diffusion_model_",
    "diffusion_model_",
    "transformer_",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "lora_prior_unet_",
    "text_encoders_",
    "qwen3_4b_",
    *TEXT_ENCODER,
)
PIECE = 2**22  # values that are looked at together, so that none of a large file is copied whole
# modules of other models, dots as underscores -> whose they are
FOREIGN = (
    ("Flux", r"(double|single)_blocks_\d|single_transformer_blocks_\d"),
    ("Qwen-Image", r"transformer_blocks_\d+_(img|txt)_m(lp|od)|transformer_blocks_\d+_attn_add_"),
    ("Stable Diffusion 3", r"joint_blocks_\d"),
    ("Wan or another video model", r"(^|_)blocks_\d+_(self|cross)_attn"),
    ("SDXL", r"(input|output)_blocks_\d|lora_te2_|(down|up)_blocks_\d_attentions_\d_transformer_blocks_[1-9]"),
    ("Stable Diffusion", r"(down|up|mid)_blocks?_|text_model_encoder"),
)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A parameter of ours, or a third of the rows of a fused one."""

    component: str  # transformer or text_encoder
    name: str
    part: int | None = None
    parts: int = 1

    def rows(self, out: int) -> tuple[int, int]:
        """(first row, number of rows) of a parameter with `out` rows."""
        count = out // self.parts
        return (0 if self.part is None else self.part * count, count)


# Reading a file


@dataclass(frozen=True)
class Lora:
    """A file's adapters by the weight that they change, and what was left over."""

    path: Path
    adapters: Mapping[Target, Adapter]
    total: int  # keys in the file
    left: tuple[str, ...]  # keys that have no place here
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def matched(self) -> int:
        return self.total - len(self.left)

    def of(self, component: str) -> dict[Target, Adapter]:
        return {target: adapter for target, adapter in self.adapters.items() if target.component == component}

    def report(self, explained: Collection[str] = ()) -> str:
        """What was matched, in lines: keys, parts, families, ranks, alphas, base model, trigger words, leftovers.

        explained: leftovers that the caller tells about.
        """
        kinds = Counter(_part(target) for target in self.adapters)
        ranks = sorted({adapter.rank for adapter in self.adapters.values() if adapter.rank is not None})
        alphas = sorted({adapter.alpha for adapter in self.adapters.values() if adapter.alpha is not None})
        lines = [
            f"{self.path.name}: {self.matched} of {self.total} keys matched, {len(self.adapters)} weights",
            "parts: " + ", ".join(f"{name} {count}" for name, count in sorted(kinds.items())),
            "family: " + ", ".join(sorted({adapter.family + _dora(adapter) for adapter in self.adapters.values()})),
        ]
        if ranks:
            lines.append("rank: " + ", ".join(map(str, ranks)))
        lines.append("alpha: " + (", ".join(f"{alpha:g}" for alpha in alphas) if alphas else "none (scale 1)"))
        for label, keys in METADATA.items():
            if value := next((self.metadata[key] for key in keys if self.metadata.get(key)), None):
                lines.append(f"{label}: {value[:200]}")
        if left := [key for key in self.left if key not in explained]:
            lines.append(f"WARNING: {len(left)} keys have no place in this model: " + ", ".join(left))
        return "\n".join(lines)


METADATA = {
    "base model": ("modelspec.architecture", "ss_base_model_version", "base_model", "ss_sd_model_name"),
    "trigger words": ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "activation text"),
}


def open_lora(
    path: str | Path, shapes: Mapping[str, Mapping[str, Shape]], *, map_file: MapFile | None = map_safetensors
) -> Lora:
    """Reads a LoRA file for a model.

    map_file: see `open_component`.
    shapes: component ("transformer", "text_encoder") -> our parameter name -> shape.
    Raises CheckpointError that names the file if nothing in it fits, or if a weight has another size.
    """
    path = Path(path)
    files = TensorFiles([path], map_file)
    places = _places(shapes)
    groups: dict[str, dict[str, str]] = {}  # module in the file's words -> part -> key
    left: list[str] = []
    for key in files.entries:
        module, part = _split(key)
        group = groups.setdefault(module, {})
        if part is None or part in group:
            left.append(key)
        else:
            group[part] = key
    adapters: dict[Target, Adapter] = {}
    for module, group in groups.items():
        target = places.get(_normalized(module))
        made, unused = (None, list(group.values())) if target is None else _adapters(path, group, files)
        left += unused
        for suffix, adapter in (made or {}).items():
            assert target is not None
            aimed = Target(target.component, target.name + suffix, target.part, target.parts)
            shape = shapes[aimed.component].get(aimed.name)
            if shape is None or aimed in adapters:
                left += [group[part] for part in group if part in (*adapter.tensors, "alpha")]
                continue
            _check(path, module, adapter, aimed, shape)
            adapters[aimed] = adapter
    if not adapters:
        raise CheckpointError(_refusal(files), path)
    return Lora(path, adapters, len(files.entries), tuple(sorted(left)), files.metadata)


def checked_strength(strength: float, name: str = "strength") -> float:
    """Raises ValueError for one that is NaN or infinite, naming it."""
    if not math.isfinite(strength):
        raise ValueError(f"{name} is {strength}, expected a finite number: 1 is the LoRA as it was trained")
    return strength


def shapes_of(**models: nn.Module | None) -> dict[str, dict[str, Shape]]:
    """transformer=..., text_encoder=...: what `open_lora` wants to know of them."""
    return {
        kind: {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        | {name: layer.shape for name, layer in packed.layers(model).items()}
        for kind, model in models.items()
        if model is not None
    }


def _split(key: str) -> tuple[str, str | None]:
    for suffix, part in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    return key, None


def for_text_encoder(key: str) -> bool:
    """Whether a key says that it is for a text encoder, of whatever model."""
    return key.replace(".", "_").startswith((*TEXT_ENCODER, "text_encoders_", "qwen3_4b_"))


def _normalized(module: str) -> str:
    name = module.replace(f"{COMPILED}.", "").replace(".", "_").replace(f"{COMPILED}_", "")
    while start := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(start)
    return name


def _places(shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, Target]:
    """Module, in each format's words as `_normalized` leaves them -> our module (`name` without .weight)."""
    found: dict[str, Target] = {}
    for component, parameters in shapes.items():
        for parameter in parameters:
            if not parameter.endswith(".weight"):
                continue
            for alias, part, parts in _aliases(component, parameter):
                target = Target(component, parameter.removesuffix(".weight"), part, parts)
                found.setdefault(alias.removesuffix(".weight").replace(".", "_"), target)
    return found


def _aliases(component: str, parameter: str) -> list[Any]:
    """(name, part, parts) as `KeyMap.aliases` gives them."""
    if component != "transformer":
        return [(parameter, None, 1), (parameter.removeprefix("model."), None, 1)]
    aliases = key_maps.TRANSFORMER.aliases(parameter)
    # "to_out" without its number is a habit of some trainers
    return aliases + [
        (name.replace("to_out.0", "to_out"), part, parts) for name, part, parts in aliases if "to_out.0" in name
    ]


def _adapters(path: Path, group: Mapping[str, str], files: TensorFiles) -> tuple[dict[str, Adapter], list[str]]:
    """(".weight" or ".bias" -> adapter, keys that belong to no whole adapter)."""
    parts = set(group) - EXTRAS
    made: dict[str, Adapter] = {}
    if "diff_b" in parts:
        parts.remove("diff_b")
        made[".bias"] = Adapter("diff", {"diff": _read(files, group["diff_b"])})
    used = {"diff_b"} & set(group)
    if family := next(
        (name for name, entry in FAMILIES.items() if any(set(way) == parts for way in entry.needs)), None
    ):
        used |= parts | (EXTRAS & set(group))
        tensors = {part: _read(files, group[part]) for part in sorted(used - {"diff_b"})}
        alpha = tensors.pop("alpha", None)
        if alpha is not None and alpha.numel() != 1:
            raise CheckpointError(
                f"{group['alpha']} has shape {list(alpha.shape)}, expected one number; download the file again", path
            )
        if family == "OFT" and tensors["oft_blocks"].ndim == 4:
            family = "BOFT"
        made[".weight"] = Adapter(family, tensors, None if alpha is None else float(alpha))
    return made, [key for part, key in group.items() if part not in used]


def _read(files: TensorFiles, key: str) -> Tensor:
    """Raises CheckpointError for values that are not finite: the model would be blamed for them later."""
    tensor = files.read(key)
    for piece in tensor.flatten().split(PIECE):
        values = piece.float() if piece.dtype.itemsize == 1 else piece
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            raise CheckpointError(
                f"{key} of this LoRA holds {WHAT}; download it again, or leave it out: its training failed",
                files.entries[key].path,
            )
    return tensor


def _check(path: Path, module: str, adapter: Adapter, target: Target, shape: Shape) -> None:
    """That the adapter's change has the size of the weight, tried on tensors without values."""
    expected = (target.rows(shape[0])[1], *shape[1:])
    if _fits(adapter, expected):
        return
    tensors = {part: torch.empty_like(tensor, device="meta") for part, tensor in adapter.tensors.items()}
    try:
        found = tuple(
            Adapter(adapter.family, tensors, adapter.alpha).change(torch.empty(expected, device="meta"), 1.0).shape
        )
        problem = f"a change of shape {list(found)}"
    except (RuntimeError, IndexError, ValueError) as error:
        found = None
        problem = f"parts that don't fit together or the weight ({str(error).splitlines()[0]})"
    if found != expected:
        raise CheckpointError(
            f"{module} has {problem}, but {target.name} of this model has {list(expected)}; "
            "the LoRA is for a model of another size (Lumina 2, say), choose one made for this model",
            path,
        )


def _fits(adapter: Adapter, expected: Shape) -> bool:
    """Whether a plain LoRA does, as nearly all are: torch takes seconds to get ready for tensors without values."""
    if adapter.family != "LoRA" or adapter.tensors.keys() != {"down", "up"}:
        return False
    down, up = (adapter.tensors[part].flatten(1).shape for part in ("down", "up"))
    return up[1] == down[0] and (up[0], down[1]) == expected


def _refusal(files: TensorFiles) -> str:
    metadata = next((files.metadata[key] for key in METADATA["base model"] if files.metadata.get(key)), None)
    said = f" (its metadata says {metadata!r})" if metadata else ""
    names = {_split(key)[0].replace(".", "_") for key in files.entries}
    for what, pattern in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return f"this is a LoRA for {what}{said}, not for Z-Image; choose one made for Z-Image"
    if all(_split(key)[1] is None for key in files.entries):
        what = identify.held(files.entries) or "something else"
        return f"this is {what}, not a LoRA; choose a LoRA made for Z-Image"
    examples = ", ".join(sorted(files.entries)[:3])
    return f"no key of this LoRA{said} belongs to this model (they begin with {examples}); is it for Z-Image?"


def _part(target: Target) -> str:
    if target.component == "text_encoder":
        return "text encoder"
    for fragment, name in ((".attention.", "attention"), (".feed_forward.", "feed forward"), ("adaLN", "modulation")):
        if fragment in target.name:
            return name
    return "embedders and norms"


def _dora(adapter: Adapter) -> str:
    return " with DoRA" if "magnitude" in adapter.tensors else ""
