"""What is particular to each network: how its files are named, told apart and read. A further network is one entry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import ControlConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from ..errors import CheckpointError
from ..model.control import ControlNetwork
from ..model.text_encoder import TextEncoder
from ..model.transformer import ZImageTransformer
from ..model.vae import AutoencoderKL
from . import key_maps
from .key_maps import KeyMap

Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], Tensor]  # the numbers of a parameter, by our name for it

CONFIG_KEY = "zimage.{component}.config"  # metadata of a single file: the config.json of a model of other numbers
# what a single file does not tell; the numbers of the published config.json of Turbo and Base alike
PUBLISHED_TRANSFORMER: dict[str, Any] = {
    "norm_eps": 1e-5,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": (32, 48, 48),
}
PUBLISHED_LAYERS = 30  # of the transformer
PUBLISHED_CONTROL = (3, 6, 15)  # layers of control networks: 2.1 lite, 1.0, 2.0 and 2.1
PUBLISHED_TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
PUBLISHED_VAE: dict[str, Any] = {
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "sample_size": 1024,
}


@dataclass(frozen=True)
class ComponentSpec:
    """One of the networks."""

    kind: str  # also its folder in a snapshot
    noun: str  # how to speak of it
    network: Callable[..., Any]
    config: Any  # its class
    key_map: Callable[[Any], KeyMap]  # by its config
    key_map_of: Callable[[Shapes], KeyMap]  # by a file's keys, where the config is not known yet; drops no layer
    # what may stand before every key: all-in-one checkpoints, ComfyUI's and LoRA trainers' habits
    prefixes: tuple[str, ...]
    anchors: tuple[str, ...]  # keys of which one is in every file of it, whatever its layout or precision
    from_shapes: Callable[[Shapes, str, Read], Any]  # its config, from shapes by our names, or numbers
    reads: Mapping[str, str]  # what its loader reads of a snapshot: folder -> files in it

    def prefix(self, keys: Iterable[str]) -> str | None:
        """What stands before the keys of this component in a file; None if the file does not hold it."""
        keys = set(keys)
        for candidate in self.prefixes:
            if any(candidate + anchor in keys for anchor in self.anchors):
                return candidate
        return None

    def config_of(self, shapes: Shapes, metadata: Mapping[str, str], source: str, read: Read) -> Any:
        """The numbers of a single file: from its metadata if they are there, else from its shapes.

        shapes, read: by the file's own names, the prefix taken off.
        """
        stored = metadata.get(CONFIG_KEY.format(component=self.kind))
        if stored is None:
            sources = self.key_map_of(shapes).sources(shapes)
            by_our_names = {name: shapes[keys[0]] for name, keys in sources.items()}
            return self.from_shapes(by_our_names, source, lambda name: read(sources[name][0]))
        try:
            raw = json.loads(stored)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the config in the metadata is not JSON ({error})", source) from error
        if not isinstance(raw, dict):
            raise CheckpointError("the config in the metadata is not a JSON object", source)
        return self.config.from_dict(raw, f"{source}, metadata")


# Numbers of a single file, from its shapes


def _transformer_config(shapes: Shapes, source: str, _read: Read) -> TransformerConfig:
    """shapes: by our names, `key_maps.OMNI` applied. Raises CheckpointError for other members of the family."""
    dim, patch_dim = _shape(shapes, "x_embedder.weight", 2, source)
    (head_dim,) = _shape(shapes, "layers.0.attention.q_norm.weight", 1, source)
    (cap_feat_dim,) = _shape(shapes, "cap_embedder.0.weight", 1, source)
    if dim == 2304:
        raise CheckpointError(
            "this is Lumina 2 (width 2304), not a Z-Image transformer; it can't be used here; load it with "
            "the nodes of that model",
            source,
        )
    if head_dim != sum(PUBLISHED_TRANSFORMER["axes_dims"]) or dim % head_dim or patch_dim % 4:
        raise CheckpointError(
            f"a transformer of width {dim} with heads of {head_dim} is no published Z-Image; use its "
            "snapshot folder, or store its config.json in the file's metadata as "
            f"{CONFIG_KEY.format(component='transformer')!r}",
            source,
        )
    return TransformerConfig(
        dim=dim,
        n_layers=_count(shapes, "layers."),
        n_refiner_layers=_count(shapes, "noise_refiner."),
        n_heads=dim // head_dim,
        cap_feat_dim=cap_feat_dim,
        in_channels=patch_dim // 4,
        patch_size=2,
        siglip_feat_dim=shapes["siglip_embedder.0.weight"][0] if "siglip_embedder.0.weight" in shapes else None,
        **PUBLISHED_TRANSFORMER,
    )


def _control_config(shapes: Shapes, source: str, read: Read) -> ControlConfig:
    """shapes, read: by our names."""
    dim, patch_dim = _shape(shapes, "x_embedder.weight", 2, source)
    (head_dim,) = _shape(shapes, "layers.0.attention.q_norm.weight", 1, source)
    count, hint = _count(shapes, "layers."), "noise_refiner.0.after_proj.weight"
    if patch_dim not in (4 * 16, 4 * 33) or count not in PUBLISHED_CONTROL or dim % head_dim:
        raise CheckpointError(
            f"a control network of width {dim} with {patch_dim / 4:g} input channels and {count} layers is none of the "
            "published ones for Z-Image (16 or 33 channels, 3, 6 or 15 layers); use a Fun-Controlnet-Union file, or "
            f"store its config.json in the file's metadata as {CONFIG_KEY.format(component='control')!r}",
            source,
        )
    refiners = _count(shapes, "noise_refiner.")
    if patch_dim == 4 * 16:
        refined = "blocks"
    else:  # 2.0 has these as well, never run nor trained
        refined = "hints" if hint in shapes and read(hint).any() else "layers"
    return ControlConfig(
        dim=dim,
        n_heads=dim // head_dim,
        norm_eps=PUBLISHED_TRANSFORMER["norm_eps"],
        in_channels=patch_dim // 4,
        places=tuple(range(0, PUBLISHED_LAYERS, PUBLISHED_LAYERS // count)),
        n_refiner_layers=refiners or 2,
        refined=refined,
    )


def _text_encoder_config(shapes: Shapes, source: str, _read: Read) -> TextEncoderConfig:
    """shapes: by our names. Only Qwen3-4B is Z-Image's."""
    vocabulary, hidden = _shape(shapes, "model.embed_tokens.weight", 2, source)
    published = TextEncoderConfig(**PUBLISHED_TEXT_ENCODER)
    layers = _count(shapes, "model.layers.")
    if hidden != published.hidden_size or layers not in (published.num_hidden_layers, published.num_hidden_layers - 1):
        size = {1024: " (Qwen3-0.6B)", 2048: " (Qwen3-1.7B)", 4096: " (Qwen3-8B)", 5120: " (Qwen3-14B)"}.get(hidden, "")
        raise CheckpointError(
            f"a text encoder of width {hidden} with {layers} layers{size}; Z-Image needs Qwen3-4B "
            f"(width {published.hidden_size}, {published.num_hidden_layers} layers)",
            source,
        )
    return published


def _vae_config(shapes: Shapes, source: str, _read: Read) -> VAEConfig:
    """shapes: by our names (those of `ae.safetensors`)."""
    _check_half(shapes, "decoder", source)
    top, latent_channels, *_ = _shape(shapes, "decoder.conv_in.weight", 4, source)
    if latent_channels != 16:
        whose = {4: "Stable Diffusion's", 32: "Flux 2's"}.get(latent_channels, "another model's")
        raise CheckpointError(
            f"this VAE has {latent_channels} latent channels ({whose}); Z-Image needs the one with 16, "
            "Flux 1's ae.safetensors",
            source,
        )
    _check_half(shapes, "encoder", source)
    taken = _shape(shapes, "encoder.conv_in.weight", 4, source)[1]
    made = _shape(shapes, "decoder.conv_out.weight", 4, source)[0]
    if (taken, made) != (3, 3):
        raise CheckpointError(
            f"this VAE takes images of {taken} channels and makes images of {made}, expected 3 and 3; "
            "Z-Image needs Flux 1's ae.safetensors, not one that upscales or has transparency",
            source,
        )
    levels = _count(shapes, "encoder.down.")
    _shape(shapes, "encoder.down.0.block.0.conv2.weight", 4, source)
    widths = tuple(
        _shape(shapes, f"encoder.down.{level}.block.0.conv2.weight", 4, source)[0] for level in range(levels)
    )
    if widths[-1] != top or any(width % PUBLISHED_VAE["norm_num_groups"] for width in widths):
        raise CheckpointError(
            f"a VAE of widths {list(widths)} is not Z-Image's; use its snapshot folder, or store its "
            f"config.json in the file's metadata as {CONFIG_KEY.format(component='vae')!r}",
            source,
        )
    return VAEConfig(
        in_channels=taken,
        out_channels=made,
        latent_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=_count(shapes, "encoder.down.0.block."),
        **PUBLISHED_VAE,
    )


def _check_half(shapes: Shapes, half: str, source: str) -> None:
    if not any(name.startswith(f"{half}.") for name in shapes):
        raise CheckpointError(
            f"this VAE has no {half} ({half}.conv_in.weight and all its others are missing); Z-Image needs both "
            "halves, as in Flux 1's ae.safetensors",
            source,
        )


def _shape(shapes: Shapes, name: str, ndim: int, source: str) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != ndim or 0 in shape:
        found = "missing" if shape is None else f"of shape {list(shape)}"
        raise CheckpointError(f"{name} is {found}; the file is incomplete or damaged, download it again", source)
    return shape


def _count(keys: Iterable[str], start: str) -> int:
    """How many different numbers follow this start of a key."""
    return len({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})


SPECS = {
    spec.kind: spec
    for spec in (
        ComponentSpec(
            kind="transformer",
            noun="a Z-Image transformer",
            network=ZImageTransformer,
            config=TransformerConfig,
            key_map=lambda config: key_maps.TRANSFORMER if config.siglip_feat_dim is None else key_maps.OMNI,
            key_map_of=lambda shapes: key_maps.OMNI,
            prefixes=("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model."),
            anchors=("cap_embedder.1.weight",),
            from_shapes=_transformer_config,
            reads={"transformer": "*", "scheduler": "*", "vae": "config.json"},
        ),
        ComponentSpec(
            kind="text_encoder",
            noun="a Qwen3 text encoder",
            network=TextEncoder,
            config=TextEncoderConfig,
            key_map=lambda config: key_maps.text_encoder(config.num_hidden_layers, config.whole),
            key_map_of=lambda shapes: key_maps.text_encoder(None),
            prefixes=(
                "",
                "text_encoders.qwen3_4b.transformer.",
                "qwen3_4b.transformer.",
                "text_encoders.qwen3_4b.",
                "text_encoder.",
                "transformer.",
            ),
            anchors=(
                "model.layers.0.self_attn.q_norm.weight",
                "layers.0.self_attn.q_norm.weight",
                "blk.0.attn_q_norm.weight",
            ),
            from_shapes=_text_encoder_config,
            reads={"text_encoder": "*", "tokenizer": "*"},
        ),
        ComponentSpec(
            kind="vae",
            noun="an AutoencoderKL (VAE)",
            network=AutoencoderKL,
            config=VAEConfig,
            key_map=lambda config: key_maps.vae(len(config.block_out_channels)),
            key_map_of=lambda shapes: key_maps.vae(
                _count(shapes, "encoder.down_blocks.") or _count(shapes, "encoder.down.")
            ),
            prefixes=("", "vae.", "first_stage_model."),
            anchors=("decoder.conv_in.weight", "encoder.conv_in.weight"),
            from_shapes=_vae_config,
            reads={"vae": "*"},
        ),
        ComponentSpec(
            kind="control",
            noun="a Z-Image control network (Fun-Controlnet-Union)",
            network=ControlNetwork,
            config=ControlConfig,
            key_map=lambda config: key_maps.control(config.refined),
            key_map_of=lambda shapes: key_maps.control(""),
            prefixes=("", "model.diffusion_model.", "diffusion_model.", "control_net.", "controlnet.", "transformer."),
            anchors=("control_all_x_embedder.2-1.weight",),
            from_shapes=_control_config,
            reads={},
        ),
    )
}
