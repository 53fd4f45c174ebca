"""Checkpoint formats as tables: which key of a file becomes which parameter of ours.

A `*` stands for anything and is carried over in order; the first row that matches a key wins, and a key that no row
matches keeps its name. Ours are the names of the single-file checkpoints, so those need almost no rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class KeyMap:
    """How one component's files are read."""

    rename: Mapping[str, str] = field(default_factory=dict)  # their pattern -> our pattern
    concat: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # our pattern <- theirs, stacked along dim 0
    unflatten: tuple[str, ...] = ()  # ours: [C, C] Linear weights that we keep as 1x1 convolutions [C, C, 1, 1]
    drop: tuple[str, ...] = ()  # theirs: known and not used

    def target(self, key: str) -> str | None:
        """Our name for a key of theirs; None if it is dropped. Parts of a concatenation map to the whole."""
        if any(_match(pattern, key) is not None for pattern in self.drop):
            return None
        for whole, parts in self.concat.items():
            for part in parts:
                if (groups := _match(part, key)) is not None:
                    return _fill(whole, groups)
        for theirs, ours in self.rename.items():
            if (groups := _match(theirs, key)) is not None:
                return _fill(ours, groups)
        return key

    def sources(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """Our name -> their keys, the parts of a concatenation in the order in which they are stacked."""
        found: dict[str, list[str]] = {}
        for key in keys:
            target = self.target(key)
            if target is not None:
                found.setdefault(target, []).append(key)
        for target, theirs in found.items():
            if set(order := self.parts(target)) == set(theirs):
                found[target] = order
        return found

    def parts(self, target: str) -> list[str]:
        """The keys of theirs whose stack is this parameter; empty if it is no concatenation."""
        for whole, parts in self.concat.items():
            if (groups := _match(whole, target)) is not None:
                return [_fill(part, groups) for part in parts]
        return []

    def is_complete(self, target: str, keys: list[str]) -> bool:
        """Whether these keys make up the parameter: one key of its own, or all parts of its concatenation."""
        parts = self.parts(target)
        return keys == parts or (len(keys) == 1 and keys[0] not in parts)

    def aliases(self, name: str) -> list[tuple[str, int | None, int]]:
        """All names for a parameter of ours, our own first: (name, number among the parts of a stack, of how many)."""
        found: list[tuple[str, int | None, int]] = [(name, None, 1)]
        found += [(part, number, len(self.parts(name))) for number, part in enumerate(self.parts(name))]
        for theirs, ours in self.rename.items():
            if (groups := _match(ours, name)) is not None:
                found.append((_fill(theirs, groups), None, 1))
        return found

    def is_flat(self, target: str) -> bool:
        """Whether a [C, C] tensor for this parameter is a 1x1 convolution stored as a Linear."""
        return any(_match(pattern, target) is not None for pattern in self.unflatten)


SIGLIP = "siglip_*"  # Omni's part for features of reference images
LEFT_OVER = "norm_final.weight"  # from Lumina 2, used by nothing
# transformer/ in the diffusers (and official) layout: 521 tensors become 453
TRANSFORMER = KeyMap(
    rename={
        "all_x_embedder.2-1.*": "x_embedder.*",
        "all_final_layer.2-1.*": "final_layer.*",
        "*.attention.to_out.0.*": "*.attention.out.*",
        "*.attention.norm_q.weight": "*.attention.q_norm.weight",
        "*.attention.norm_k.weight": "*.attention.k_norm.weight",
    },
    concat={
        "*.attention.qkv.weight": (
            "*.attention.to_q.weight",
            "*.attention.to_k.weight",
            "*.attention.to_v.weight",
        ),
    },
    drop=(LEFT_OVER, SIGLIP),
)
OMNI = replace(TRANSFORMER, drop=(LEFT_OVER,))


def control(refined: str) -> KeyMap:
    """A control network in the published layout; where `ControlConfig.refined` is "layers", some blocks never run."""
    parts = {"to_out.0.*": "out.*", "norm_q.weight": "q_norm.weight", "norm_k.weight": "k_norm.weight"}
    return KeyMap(
        rename={
            "control_all_x_embedder.2-1.*": "x_embedder.*",
            **{f"control_*.attention.{theirs}": f"*.attention.{ours}" for theirs, ours in parts.items()},
            "control_*": "*",
        },
        concat={"*.attention.qkv.weight": tuple(f"control_*.attention.to_{part}.weight" for part in "qkv")},
        drop=(*BORROWED, *(("control_noise_refiner.*",) if refined == "layers" else ())),
    )


# of a transformer, which diffusers saves with a control network that is in use
BORROWED = ("all_*", "cap_*", "t_embedder.*", "noise_refiner.*", "context_refiner.*", "layers.*", "x_pad_token")


def text_encoder(layers: int | None, whole: bool = False) -> KeyMap:
    """text_encoder/ of a Qwen3 with this many layers. The head is not used, nor, unless it is whole, the last layer
    (None: no layer) and the final norm.
    """
    last = "none" if layers is None else layers - 1
    unused = () if whole else (f"layers.{last}.*", "norm.weight")
    return KeyMap(
        rename={
            "model.*": "model.*",
            "layers.*": "model.layers.*",
            "embed_tokens.*": "model.embed_tokens.*",
            "token_embd.*": "model.embed_tokens.*",
            **{name: "model.norm.weight" for name in ("norm.weight", "output_norm.weight")},
            **{f"blk.*.{theirs}.weight": f"model.layers.*.{ours}.weight" for theirs, ours in LLAMA_CPP.items()},
        },
        drop=(
            *unused,
            *(f"model.{pattern}" for pattern in unused),
            *(() if whole else (f"blk.{last}.*", "output_norm.weight")),
            *("output.weight", "lm_head.weight"),
        ),
    )


LLAMA_CPP = {  # modules of a layer in the GGUF files of language models -> Qwen3's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def vae(levels: int) -> KeyMap:
    """vae/ in the diffusers layout, for an autoencoder of this many levels."""
    rename = {"decoder.conv_norm_out.*": "decoder.norm_out.*", "encoder.conv_norm_out.*": "encoder.norm_out.*"}
    for level in range(levels):
        # diffusers counts the decoder's levels as they run, the original by resolution
        for theirs, ours in (
            (f"encoder.down_blocks.{level}", f"encoder.down.{level}"),
            (f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"),
        ):
            rename[f"{theirs}.resnets.*.conv_shortcut.*"] = f"{ours}.block.*.nin_shortcut.*"
            rename[f"{theirs}.resnets.*"] = f"{ours}.block.*"
            rename[f"{theirs}.downsamplers.0.conv.*"] = f"{ours}.downsample.conv.*"
            rename[f"{theirs}.upsamplers.0.conv.*"] = f"{ours}.upsample.conv.*"
    for theirs, ours in (("resnets.0", "block_1"), ("resnets.1", "block_2")):
        rename[f"*.mid_block.{theirs}.*"] = f"*.mid.{ours}.*"
    for theirs, ours in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        rename[f"*.mid_block.attentions.0.{theirs}.*"] = f"*.mid.attn_1.{ours}.*"
    return KeyMap(rename=rename, unflatten=tuple(f"*.mid.attn_1.{name}.weight" for name in ("q", "k", "v", "proj_out")))


def _match(pattern: str, key: str) -> tuple[str, ...] | None:
    found = _compiled(pattern).fullmatch(key)
    return None if found is None else found.groups()


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("(.+?)".join(re.escape(part) for part in pattern.split("*")))  # re keeps its own cache


def _fill(pattern: str, groups: tuple[str, ...]) -> str:
    parts = pattern.split("*")
    return "".join(part + group for part, group in zip(parts, (*groups, ""), strict=True))
