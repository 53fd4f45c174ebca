"""What a weight file is, by its keys and shapes: which of our components it holds, or whose file it is instead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import TextEncoderConfig, TransformerConfig, VAEConfig
from ..errors import CheckpointError
from . import key_maps
from .key_maps import KeyMap

Shapes = Mapping[str, tuple[int, ...]]

COMPONENTS = ("transformer", "text_encoder", "vae")
NODES = {  # how to speak of them
    "transformer": "a Z-Image transformer",
    "text_encoder": "a Qwen3 text encoder",
    "vae": "an AutoencoderKL (VAE)",
}
# what may stand before every key of a component: all-in-one checkpoints, ComfyUI's and LoRA trainers' habits
PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model."),
    "text_encoder": (
        "",
        "text_encoders.qwen3_4b.transformer.",
        "qwen3_4b.transformer.",
        "text_encoders.qwen3_4b.",
        "text_encoder.",
        "transformer.",
    ),
    "vae": ("", "vae.", "first_stage_model."),
}
# keys of which one is in every file of the component, whatever its layout or precision
ANCHORS = {
    "transformer": ("cap_embedder.1.weight",),
    "text_encoder": (
        "model.layers.0.self_attn.q_norm.weight",
        "layers.0.self_attn.q_norm.weight",
        "blk.0.attn_q_norm.weight",
    ),
    "vae": ("decoder.conv_in.weight",),
}
# what a single file does not tell; the numbers of the published config.json of Turbo and Base alike
PUBLISHED_TRANSFORMER: dict[str, Any] = {
    "norm_eps": 1e-5,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": (32, 48, 48),
    "axes_lens": (1536, 512, 512),
}
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
    "max_position_embeddings": 40960,
}
PUBLISHED_VAE: dict[str, Any] = {
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "sample_size": 1024,
}
CONFIG_KEY = "zimage.{component}.config"  # metadata of a single file: the config.json of a model of other numbers

_QUANTIZED = "load the bf16 or fp16 version of the same model instead"
_OTHER = "it can't be used here; load it with the nodes of that model"
# (what it is, fragments of which each must be in some key, what to do), the more particular first
FOREIGN = (
    ("a LoRA", (".lora_A",), "it belongs into a LoRA loader, after the model loader"),
    ("a LoRA", ("lora_down",), "it belongs into a LoRA loader, after the model loader"),
    ("a LoRA", ("lora_up",), "it belongs into a LoRA loader, after the model loader"),
    ("a LoRA", (".lokr_w",), "it belongs into a LoRA loader, after the model loader"),
    ("a LoRA", (".hada_w",), "it belongs into a LoRA loader, after the model loader"),
    ("a LoRA", (".oft_",), "it belongs into a LoRA loader, after the model loader"),
    ("a Z-Image ControlNet", ("control_all_x_embedder",), "load it with ModelPatchLoader, as a model patch"),
    ("a Z-Image ControlNet", ("control_layers.0.after_proj",), "load it with ModelPatchLoader, as a model patch"),
    ("a ControlNet", ("input_hint_block",), _OTHER),
    ("a ControlNet", ("controlnet_blocks.0",), _OTHER),
    ("quantized by nunchaku (SVDQuant)", (".qweight", ".wscales"), _QUANTIZED),
    ("quantized by nunchaku (SVDQuant)", (".qweight", "smooth_factor"), _QUANTIZED),
    ("quantized by bitsandbytes", ("quant_state.bitsandbytes",), _QUANTIZED),
    ("quantized by bitsandbytes", (".absmax",), _QUANTIZED),
    ("quantized by SDNQ", (".svd_up",), _QUANTIZED),
    ("quantized by SDNQ", (".zero_point",), _QUANTIZED),
    ("quantized by GPTQ or AWQ", (".qweight", ".qzeros"), _QUANTIZED),
    ("quantized by MLX", ("embedder.scales",), _QUANTIZED),
    ("quantized by MLX", (".attention.to_q.scales",), _QUANTIZED),
    ("quantized by MLX", (".q_proj.scales", ".q_proj.biases"), _QUANTIZED),
    ("the pixel-space variant of Z-Image", ("dec_net.cond_embed",), "use the latent-space Turbo or Base model"),
    ("a Flux model", ("double_blocks.0.img_attn", "single_blocks.0"), _OTHER),
    ("a Flux model", ("single_transformer_blocks.0.", "transformer_blocks.0."), _OTHER),
    ("a Hunyuan model", ("double_blocks.0.", "txt_in.individual_token_refiner"), _OTHER),
    ("Qwen-Image", ("transformer_blocks.0.img_mod.", "transformer_blocks.0.txt_mod."), _OTHER),
    ("Stable Diffusion 3", ("joint_blocks.0.context_block",), _OTHER),
    ("Wan", ("blocks.0.cross_attn.norm_k", "patch_embedding."), _OTHER),
    ("Wan's VAE", ("decoder.middle.0.residual",), "use Z-Image's VAE (that of Flux 1)"),
    ("a video VAE", ("decoder.mid_block.resnets.0.conv1.conv",), "use Z-Image's VAE (that of Flux 1)"),
    ("SDXL", ("input_blocks.", "label_emb.0.0"), _OTHER),
    ("SDXL", ("conditioner.embedders.",), _OTHER),
    ("Stable Diffusion 1 or 2", ("input_blocks.0.0.", "output_blocks."), _OTHER),
    ("a Stable Diffusion U-Net", ("down_blocks.0.attentions.", "mid_block.attentions."), _OTHER),
    ("PixArt or a similar model", ("caption_projection.", "transformer_blocks.0."), _OTHER),
    ("a CLIP text encoder", ("text_model.encoder.layers.0",), "Z-Image needs Qwen3-4B"),
    ("a CLIP text encoder", ("transformer.resblocks.0",), "Z-Image needs Qwen3-4B"),
    ("a T5 text encoder", ("encoder.block.0.layer.0.SelfAttention",), "Z-Image needs Qwen3-4B"),
    ("Qwen2.5 or Qwen2.5-VL", ("layers.0.self_attn.q_proj.bias",), "Z-Image needs Qwen3-4B"),
    ("a language model of another family", ("layers.0.self_attn.q_proj",), "Z-Image needs Qwen3-4B"),
)


def prefix(component: str, keys: Iterable[str]) -> str | None:
    """What stands before the keys of this component in a file; None if the file does not hold it."""
    keys = set(keys)
    for candidate in PREFIXES[component]:
        if any(candidate + anchor in keys for anchor in ANCHORS[component]):
            return candidate
    return None


def others(keys: Iterable[str], component: str) -> tuple[str, ...]:
    """The prefixes of the other components of an all-in-one file."""
    found = (prefix(other, keys) for other in COMPONENTS if other != component)
    return tuple(start for start in found if start)


def refusal(component: str, shapes: Shapes, source: str) -> CheckpointError:
    """Why a file that lacks this component lacks it: what it is instead, and what to do with it."""
    wanted = NODES[component]
    if foreign := foreign_name(shapes):
        what, advice = foreign
        return CheckpointError(f"{source}: this is {what}, not {wanted}; {advice}")
    held = [NODES[other] for other in COMPONENTS if prefix(other, shapes) is not None]
    if held:
        return CheckpointError(
            f"{source}: this is {' and '.join(held)}, not {wanted}; choose it in the loader made for it"
        )
    examples = ", ".join(list(shapes)[:3])
    return CheckpointError(
        f"{source}: this is neither {wanted} nor any file that is known here (its keys begin with {examples}); "
        "check that it is a Z-Image file"
    )


def foreign_name(shapes: Shapes) -> tuple[str, str] | None:
    """(what it is, what to do) of a file that no component can come from."""
    text = "\n".join(shapes)
    for what, fragments, advice in FOREIGN[:-1] if prefix("text_encoder", shapes) is not None else FOREIGN:
        if all(fragment in text for fragment in fragments):
            return what, advice
    return None


# Numbers of a single file, from its shapes


def transformer_config(shapes: Shapes, source: str) -> TransformerConfig:
    """shapes: by our names, `key_maps.TRANSFORMER` applied. Raises CheckpointError for other members of the family."""
    dim, patch_dim = _shape(shapes, "x_embedder.weight", 2, source)
    (head_dim,) = _shape(shapes, "layers.0.attention.q_norm.weight", 1, source)
    (cap_feat_dim,) = _shape(shapes, "cap_embedder.0.weight", 1, source)
    if dim == 2304:
        raise CheckpointError(f"{source}: this is Lumina 2 (width 2304), not a Z-Image transformer; {_OTHER}")
    if head_dim != sum(PUBLISHED_TRANSFORMER["axes_dims"]) or dim % head_dim or patch_dim % 4:
        raise CheckpointError(
            f"{source}: a transformer of width {dim} with heads of {head_dim} is no published Z-Image; use its "
            "snapshot folder, or store its config.json in the file's metadata as "
            f"{CONFIG_KEY.format(component='transformer')!r}"
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


def text_encoder_config(shapes: Shapes, source: str) -> TextEncoderConfig:
    """shapes: by our names. Only Qwen3-4B is Z-Image's."""
    vocabulary, hidden = _shape(shapes, "model.embed_tokens.weight", 2, source)
    published = TextEncoderConfig(**PUBLISHED_TEXT_ENCODER)
    layers = _count(shapes, "model.layers.")
    if hidden != published.hidden_size or layers not in (published.num_hidden_layers, published.num_hidden_layers - 1):
        size = {1024: " (Qwen3-0.6B)", 2048: " (Qwen3-1.7B)", 4096: " (Qwen3-8B)", 5120: " (Qwen3-14B)"}.get(hidden, "")
        raise CheckpointError(
            f"{source}: a text encoder of width {hidden} with {layers} layers{size}; Z-Image needs Qwen3-4B "
            f"(width {published.hidden_size}, {published.num_hidden_layers} layers)"
        )
    return published


def vae_config(shapes: Shapes, source: str) -> VAEConfig:
    """shapes: by our names (those of `ae.safetensors`)."""
    top, latent_channels, *_ = _shape(shapes, "decoder.conv_in.weight", 4, source)
    if latent_channels != 16:
        whose = {4: "Stable Diffusion's", 32: "Flux 2's"}.get(latent_channels, "another model's")
        raise CheckpointError(
            f"{source}: this VAE has {latent_channels} latent channels ({whose}); Z-Image needs the one with 16, "
            "Flux 1's ae.safetensors"
        )
    levels = _count(shapes, "encoder.down.")
    widths = tuple(
        _shape(shapes, f"encoder.down.{level}.block.0.conv2.weight", 4, source)[0] for level in range(levels)
    )
    if widths[-1] != top or any(width % PUBLISHED_VAE["norm_num_groups"] for width in widths):
        raise CheckpointError(
            f"{source}: a VAE of widths {list(widths)} is not Z-Image's; use its snapshot folder, or store its "
            f"config.json in the file's metadata as {CONFIG_KEY.format(component='vae')!r}"
        )
    return VAEConfig(
        in_channels=_shape(shapes, "encoder.conv_in.weight", 4, source)[1],
        out_channels=_shape(shapes, "decoder.conv_out.weight", 4, source)[0],
        latent_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=_count(shapes, "encoder.down.0.block."),
        **PUBLISHED_VAE,
    )


FROM_SHAPES: dict[str, Any] = {
    "transformer": transformer_config,
    "text_encoder": text_encoder_config,
    "vae": vae_config,
}
CONFIGS: dict[str, Any] = {"transformer": TransformerConfig, "text_encoder": TextEncoderConfig, "vae": VAEConfig}


def config(component: str, shapes: Shapes, metadata: Mapping[str, str], source: str) -> Any:
    """The numbers of a component in a single file: from its metadata if they are there, else from its shapes.

    shapes: by the file's own names, the prefix taken off.
    """
    stored = metadata.get(CONFIG_KEY.format(component=component))
    if stored is not None:
        try:
            raw = json.loads(stored)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{source}: the config in the metadata is not JSON ({error})") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{source}: the config in the metadata is not a JSON object")
        return CONFIGS[component].from_dict(raw, f"{source}, metadata")
    return FROM_SHAPES[component](_renamed(_key_map(component, shapes), shapes), source)


def _key_map(component: str, keys: Iterable[str]) -> KeyMap:
    """The table for this component's names in either layout; no layer is dropped, so that all can be counted."""
    if component == "transformer":
        return key_maps.TRANSFORMER
    if component == "text_encoder":
        layers = max(_count(keys, start) for start in ("model.layers.", "layers.", "blk."))
        return key_maps.text_encoder(layers + 1)
    return key_maps.vae(_count(keys, "encoder.down_blocks.") or _count(keys, "encoder.down."))


def _renamed(table: KeyMap, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name: shapes[keys[0]] for name, keys in table.sources(shapes).items()}


def _shape(shapes: Shapes, name: str, ndim: int, source: str) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != ndim or 0 in shape:
        found = "missing" if shape is None else f"of shape {list(shape)}"
        raise CheckpointError(f"{source}: {name} is {found}; the file is incomplete or damaged, download it again")
    return shape


def _count(keys: Iterable[str], start: str) -> int:
    """How many different numbers follow this start of a key."""
    return len({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})
