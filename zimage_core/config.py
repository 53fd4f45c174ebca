"""The numbers of each component, read from the snapshot's own JSON files.

Every class mirrors one `config.json`: a missing or impossible value is an error that names the file and the key;
keys that nothing reads may be missing. A single file has no config.json: `weights.specs` gives its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError

MOST = 2**24  # of any size: products of three of them are still numbers of bytes


@dataclass(frozen=True)
class BlockConfig:
    """What transformer and control networks share: the blocks (the numbers in comments are those of Turbo and Base)."""

    dim: int  # 3840, width of the residual stream
    n_heads: int  # 30 heads of 128
    norm_eps: float  # 1e-5, for every RMSNorm, the q/k norms included

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the gated MLP: int(dim / 3 * 8), 10240 for Z-Image (reference `FeedForward`)."""
        return int(self.dim / 3 * 8)

    @property
    def adaln_dim(self) -> int:
        """Width of the timestep embedding that modulates the blocks: at most 256 (reference `ADALN_EMBED_DIM`)."""
        return min(self.dim, 256)


@dataclass(frozen=True)
class TransformerConfig(BlockConfig):
    """S3-DiT, from `transformer/config.json` (the numbers in comments are Z-Image Turbo's and Base's)."""

    n_layers: int  # 30 joint blocks
    n_refiner_layers: int  # 2 noise refiner blocks, and 2 context refiner blocks
    cap_feat_dim: int  # 2560, width of the text encoder
    rope_theta: float  # 256.0
    t_scale: float  # 1000.0, the model time 0..1 is multiplied by this before its sinusoids
    axes_dims: tuple[int, int, int]  # (32, 48, 48): share of a head for (sequence, row, column)
    in_channels: int  # 16 latent channels
    patch_size: int  # 2: a token is 2x2 latent pixels, 16x16 pixels
    siglip_feat_dim: int | None = None  # of features of reference images, 1152 in Omni; None: it has no part for them

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.in_channels

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> TransformerConfig:
        _expect(raw, source, "_class_name", ("ZImageTransformer2DModel",))
        _expect(raw, source, "all_f_patch_size", ([1],))
        _expect(raw, source, "qk_norm", (True,))
        _expect(raw, source, "n_kv_heads", (_number(raw, source, "n_heads"),))
        patch_sizes = _numbers(raw, source, "all_patch_size", 1)
        config = cls(
            dim=_number(raw, source, "dim"),
            n_layers=_number(raw, source, "n_layers"),
            n_refiner_layers=_number(raw, source, "n_refiner_layers"),
            n_heads=_number(raw, source, "n_heads"),
            norm_eps=_number(raw, source, "norm_eps", float),
            cap_feat_dim=_number(raw, source, "cap_feat_dim"),
            rope_theta=_number(raw, source, "rope_theta", float),
            t_scale=_number(raw, source, "t_scale", float),
            axes_dims=_numbers(raw, source, "axes_dims", 3),
            in_channels=_number(raw, source, "in_channels"),
            patch_size=patch_sizes[0],
            siglip_feat_dim=None if raw.get("siglip_feat_dim") is None else _number(raw, source, "siglip_feat_dim"),
        )
        if config.dim % config.n_heads:
            raise CheckpointError(f"dim {config.dim} is not divisible by n_heads {config.n_heads}", source)
        if sum(config.axes_dims) != config.head_dim or any(d % 2 for d in config.axes_dims):
            raise CheckpointError(
                f"axes_dims {list(config.axes_dims)} must be even and add up to dim / n_heads = {config.head_dim}",
                source,
            )
        return config


@dataclass(frozen=True)
class ControlConfig(BlockConfig):
    """A Fun-Controlnet-Union network, which borrows embedders and pad tokens of the transformer that it steers."""

    in_channels: int  # 16 of the control image's latents; 33 with the mask of an inpaint image and its latents
    places: tuple[int, ...]  # layers of the transformer that get hints: every 5th (1.0), 2nd (2.0, 2.1) or 10th (lite)
    n_refiner_layers: int  # 2 blocks over the image alone, before those
    refined: str  # by what: "blocks" (1.0), "hints" (2.1: they give hints as well) or "layers" (2.0: the joint ones)
    patch_size: int = 2

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.in_channels

    @property
    def n_layers(self) -> int:
        """Blocks over image and caption, one for each place."""
        return len(self.places)

    @property
    def inpaints(self) -> bool:
        """Whether it takes an image with a mask beside the control image."""
        return self.in_channels > 16

    @property
    def version(self) -> str:
        """How its makers call it."""
        if self.refined == "blocks":
            return "Union 1.0"
        return "Union 2.0" if self.refined == "layers" else "Union 2.1" if self.n_layers > 3 else "Union 2.1 lite"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> ControlConfig:
        """diffusers' config.json of a ZImageControlNetModel."""
        _expect(raw, source, "_class_name", ("ZImageControlNetModel",))
        _expect(raw, source, "all_patch_size", ([2],))
        _expect({"qk_norm": True, **raw}, source, "qk_norm", (True,))
        refined = {None: "blocks", "control_noise_refiner": "hints", "control_layers": "layers"}
        by = raw.get("add_control_noise_refiner")
        _expect({"add_control_noise_refiner": by}, source, "add_control_noise_refiner", tuple(refined))
        return cls(
            dim=_number(raw, source, "dim"),
            n_heads=_number(raw, source, "n_heads"),
            norm_eps=_number(raw, source, "norm_eps", float),
            in_channels=_number(raw, source, "control_in_dim"),
            places=_places(raw, source),
            n_refiner_layers=_number(raw, source, "n_refiner_layers"),
            refined=refined[by],
        )


@dataclass(frozen=True)
class TextEncoderConfig:
    """Qwen3, from `text_encoder/config.json` (comments: the 4B model)."""

    vocab_size: int  # 151936
    hidden_size: int  # 2560
    intermediate_size: int  # 9728
    num_hidden_layers: int  # 36, of which the last is never run
    num_attention_heads: int  # 32
    num_key_value_heads: int  # 8
    head_dim: int  # 128, so the queries are 4096 wide
    rms_norm_eps: float  # 1e-6
    rope_theta: float  # 1e6
    # whether the last layer and the final norm are there as well, which only generating text runs
    whole: bool = field(default=False, repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> TextEncoderConfig:
        _expect(raw, source, "model_type", ("qwen3",))
        _expect(raw, source, "hidden_act", ("silu",))
        _expect(raw, source, "attention_bias", (False,))
        # transformers 5 writes rope_theta inside rope_parameters
        rope = raw if "rope_theta" in raw else {"rope_theta": _value(raw, source, "rope_parameters").get("rope_theta")}
        return cls(
            vocab_size=_number(raw, source, "vocab_size"),
            hidden_size=_number(raw, source, "hidden_size"),
            intermediate_size=_number(raw, source, "intermediate_size"),
            num_hidden_layers=_number(raw, source, "num_hidden_layers"),
            num_attention_heads=_number(raw, source, "num_attention_heads"),
            num_key_value_heads=_number(raw, source, "num_key_value_heads"),
            head_dim=_number(raw, source, "head_dim"),
            rms_norm_eps=_number(raw, source, "rms_norm_eps", float),
            rope_theta=_number(rope, source, "rope_theta", float),
        )


@dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL, from `vae/config.json` (comments: Z-Image's, which is FLUX's)."""

    in_channels: int  # 3
    out_channels: int  # 3
    latent_channels: int  # 16
    block_out_channels: tuple[int, ...]  # (128, 256, 512, 512): each level but the last halves the image
    layers_per_block: int  # 2 (the decoder has one more)
    norm_num_groups: int  # 32
    scaling_factor: float  # 0.3611
    shift_factor: float  # 0.1159
    sample_size: int  # 1024, the image size it was made for

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel along one side: 8."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> VAEConfig:
        _expect(raw, source, "_class_name", ("AutoencoderKL",))
        _expect(raw, source, "act_fn", ("silu",))
        _expect(raw, source, "use_quant_conv", (False,))
        _expect(raw, source, "use_post_quant_conv", (False,))
        _expect({"mid_block_add_attention": True, **raw}, source, "mid_block_add_attention", (True,))
        config = cls(
            in_channels=_number(raw, source, "in_channels"),
            out_channels=_number(raw, source, "out_channels"),
            latent_channels=_number(raw, source, "latent_channels"),
            block_out_channels=_numbers(raw, source, "block_out_channels"),
            layers_per_block=_number(raw, source, "layers_per_block"),
            norm_num_groups=_number(raw, source, "norm_num_groups"),
            scaling_factor=_number(raw, source, "scaling_factor", float),
            shift_factor=_number(raw, source, "shift_factor", float),
            sample_size=_number(raw, source, "sample_size"),
        )
        for key, value in (("in_channels", config.in_channels), ("out_channels", config.out_channels)):
            if value != 3:
                raise CheckpointError(f"{key} is {value}, expected 3: red, green and blue", source)
        if any(channels % config.norm_num_groups for channels in config.block_out_channels):
            raise CheckpointError(
                f"norm_num_groups {config.norm_num_groups} must divide each of "
                f"block_out_channels {list(config.block_out_channels)}",
                source,
            )
        return config


@dataclass(frozen=True)
class SchedulerConfig:
    """Flow-matching Euler, from `scheduler/scheduler_config.json` (comments: Turbo; Base has shift 6.0)."""

    shift: float  # 3.0
    use_dynamic_shifting: bool  # false; if true the shift follows the image size by the four numbers below
    base_shift: float  # 0.5
    max_shift: float  # 1.15
    base_image_seq_len: int  # 256
    max_image_seq_len: int  # 4096

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> SchedulerConfig:
        _expect(raw, source, "_class_name", ("FlowMatchEulerDiscreteScheduler",))
        _expect({"time_shift_type": "exponential", **raw}, source, "time_shift_type", ("exponential",))
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
            _expect({key: False, **raw}, source, key, (False, None))
        _expect({"stochastic_sampling": False, **raw}, source, "stochastic_sampling", (False,))
        _expect({"shift_terminal": None, **raw}, source, "shift_terminal", (None,))
        dynamic = _value(raw, source, "use_dynamic_shifting")
        if not isinstance(dynamic, bool):
            raise CheckpointError(f"use_dynamic_shifting is {dynamic!r}, expected true or false", source)
        # Published files leave the four numbers out while they are unused; then diffusers' defaults apply.
        unused = {} if dynamic else {"base_shift": 0.5, "max_shift": 1.15}
        unused |= {} if dynamic else {"base_image_seq_len": 256, "max_image_seq_len": 4096}
        raw = {**unused, **raw}
        return cls(
            shift=_number(raw, source, "shift", float),
            use_dynamic_shifting=dynamic,
            base_shift=_number(raw, source, "base_shift", float),
            max_shift=_number(raw, source, "max_shift", float),
            base_image_seq_len=_number(raw, source, "base_image_seq_len"),
            max_image_seq_len=_number(raw, source, "max_image_seq_len"),
        )


# Reading with errors that name the file and the key


def _value(raw: Mapping[str, Any], source: str, key: str) -> Any:
    if key not in raw:
        raise CheckpointError(f"{key!r} is missing; the file is incomplete or belongs to another model", source)
    return raw[key]


def _places(raw: Mapping[str, Any], source: str) -> tuple[int, ...]:
    key = "control_layers_places"
    places = _value(raw, source, key)
    whole = isinstance(places, (list, tuple)) and all(type(place) is int for place in places)
    if not whole or not places or places[0] != 0 or sorted(set(places)) != list(places):
        raise CheckpointError(f"{key} is {places!r}, expected a list of ascending whole numbers from 0", source)
    return tuple(places)


def _expect(raw: Mapping[str, Any], source: str, key: str, allowed: tuple[Any, ...]) -> None:
    value = _value(raw, source, key)
    if value not in allowed:
        expected = " or ".join(repr(choice) for choice in allowed)
        raise CheckpointError(f"{key} is {value!r}, expected {expected}; this is not a Z-Image component", source)


def _number(raw: Mapping[str, Any], source: str, key: str, kind: type = int) -> Any:
    value = _value(raw, source, key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number and (0 < value < MOST if kind is int else True)
    if not fits or kind(value) != value:
        wanted = f"a positive whole number below {MOST}" if kind is int else "a number"
        raise CheckpointError(f"{key} is {value!r}, expected {wanted}", source)
    return kind(value)


def _numbers(raw: Mapping[str, Any], source: str, key: str, count: int | None = None) -> Any:
    values = _value(raw, source, key)
    if not isinstance(values, (list, tuple)) or not values or (count is not None and len(values) != count):
        wanted = "a list" if count is None else f"a list of {count}"
        raise CheckpointError(f"{key} is {values!r}, expected {wanted} whole numbers", source)
    return tuple(_number({key: value}, source, key) for value in values)
