"""What a weight file is where it isn't what was asked for: another of our networks, or some other model's."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import CheckpointError
from .specs import SPECS, Shapes

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


def others(keys: Iterable[str], component: str) -> tuple[str, ...]:
    """The prefixes of the other components of an all-in-one file."""
    found = (spec.prefix(keys) for kind, spec in SPECS.items() if kind != component)
    return tuple(start for start in found if start)


def held(keys: Iterable[str]) -> str:
    """How to speak of the components that a file holds; empty if it holds none."""
    return " and ".join(spec.noun for spec in SPECS.values() if spec.prefix(keys) is not None)


def refusal(component: str, shapes: Shapes, source: str, advice: str = "") -> CheckpointError:
    """Why a file that lacks this component lacks it: what it is instead, and what to do with it.

    advice: where it is another of our components.
    """
    wanted = SPECS[component].noun
    if foreign := foreign_name(shapes):
        return CheckpointError(f"this is {foreign[0]}, not {wanted}; {foreign[1]}", source)
    if found := held(shapes):
        return CheckpointError(f"this is {found}, not {wanted}; {advice}", source)
    examples = ", ".join(list(shapes)[:3])
    return CheckpointError(
        f"this is neither {wanted} nor any file that is known here (its keys begin with {examples}); "
        "check that it is a Z-Image file",
        source,
    )


def foreign_name(shapes: Shapes) -> tuple[str, str] | None:
    """(what it is, what to do) of a file that no component can come from."""
    text = "\n".join(shapes)
    for what, fragments, advice in FOREIGN[:-1] if SPECS["text_encoder"].prefix(shapes) is not None else FOREIGN:
        if all(fragment in text for fragment in fragments):
            return what, advice
    return None
