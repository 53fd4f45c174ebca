"""Control networks of every version: against the formulas, and against diffusers and what of it is not as published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage_core.config import ControlConfig
from zimage_core.model.control import ActiveControl, control_latents
from zimage_core.weights.snapshot import Snapshot, open_component

from ..control_reference import Numbers, steered
from ..helpers import relative
from .conftest import randomize

LAYERS, REFINERS = 6, 2
# version -> (places of layers, input channels, what refines)
VERSIONS = {
    "1.0": ((0, 2, 4), 16, None),
    "2.0": ((0, 1, 2, 3), 33, "control_layers"),
    "2.1": ((0, 2, 5), 33, "control_noise_refiner"),
    "lite": ((0,), 33, "control_noise_refiner"),
}
STRENGTH = 0.8


@dataclass
class Models:
    """One transformer and control network, as diffusers has them and as ours."""

    transformer: diffusers.ZImageTransformer2DModel
    net: diffusers.ZImageControlNetModel
    folder: Path
    numbers: Numbers

    def ours(self):
        return Snapshot(self.folder).transformer(), open_component(self.folder / "net", "control").build()

    def reference(self, inputs: Inputs, item: int, **ways) -> Tensor:
        main, control = self.transformer.state_dict(), self.net.state_dict()
        args = (inputs.latents[item], inputs.t[item].item(), inputs.captions[item], inputs.control[item])
        return steered(main, control, self.numbers, *args, STRENGTH, **ways).velocity


@dataclass
class Inputs:
    latents: Tensor
    t: Tensor
    captions: list[Tensor]
    control: Tensor


@pytest.fixture(scope="module", params=[(version, seed) for version in VERSIONS for seed in (0, 1)], ids=str)
def models(request, make_transformer, tmp_path_factory) -> Models:
    version, seed = request.param
    places, channels, refined = VERSIONS[version]
    transformer = make_transformer("narrow", seed)
    config = dict(transformer.config) | {"n_layers": LAYERS, "n_refiner_layers": REFINERS}
    transformer = randomize(diffusers.ZImageTransformer2DModel.from_config(config), seed)
    net = diffusers.ZImageControlNetModel(
        control_layers_places=list(places),
        control_refiner_layers_places=list(range(REFINERS)),
        control_in_dim=channels,
        add_control_noise_refiner=refined,
        n_refiner_layers=REFINERS,
        **{name: config[name] for name in ("dim", "n_heads", "n_kv_heads")},
    )
    net = randomize(net, seed + 100)
    folder = tmp_path_factory.mktemp("snapshot")
    transformer.save_pretrained(folder / "transformer")
    net.save_pretrained(folder / "net")
    names = {None: "blocks", "control_noise_refiner": "hints", "control_layers": "layers"}
    return Models(
        transformer, net, folder, Numbers(config["n_heads"], tuple(config["axes_dims"]), places, names[refined])
    )


# (caption lengths, latent height and width): with and without padding
CASES = {
    "no pads": ([32, 32], 16, 16),
    "pads": ([19], 12, 10),
    "mixed lengths": ([5, 40, 96], 10, 14),
}


def _inputs(models: Models, case: str) -> Inputs:
    lengths, height, width = CASES[case]
    make = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    batch, channels = len(lengths), models.net.config.control_in_dim
    captions = [draw(length, models.transformer.config.cap_feat_dim) for length in lengths]
    t = torch.rand(batch, generator=make)
    return Inputs(draw(batch, 16, height, width), t, captions, draw(batch, channels, height, width))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_equals_the_formulas(models, case):
    inputs = _inputs(models, case)
    transformer, network = models.ours()
    network.check(transformer.config)
    ours = transformer(
        inputs.latents, inputs.t, inputs.captions, controls=[ActiveControl(network, inputs.control, STRENGTH)]
    )
    reference = torch.stack([models.reference(inputs, item) for item in range(len(ours))])
    plain = transformer(inputs.latents, inputs.t, inputs.captions)
    assert relative(ours, reference) <= 1e-5
    assert relative(ours, plain) > 0.05  # it does steer


@pytest.mark.one_in(2)
@torch.inference_mode()
def test_both_halves_of_guidance_share_what_no_prompt_changes(models):
    """Exactly: as if each were alone; and the refiner's blocks see each image once."""
    inputs = _inputs(models, "mixed lengths")
    transformer, network = models.ours()
    latents, t = (x[:1].repeat(3, *[1] * (x.ndim - 1)) for x in (inputs.latents, inputs.t))
    seen: list[int] = []
    first = network.noise_refiner[0] if len(network.noise_refiner) else network.layers[0]
    ways = []
    for images in (None, [0, 0, 0]):
        control = ActiveControl(network, inputs.control[:1], STRENGTH)
        ways.append(transformer(latents, t, inputs.captions, controls=[control], images=images))
    assert relative(ways[1], ways[0]) <= 1e-6
    hook = first.register_forward_pre_hook(lambda _block, args: seen.append(len(args[0])))
    control = ActiveControl(network, inputs.control[:1], STRENGTH)
    size = inputs.latents.shape[-2:]
    even = torch.nn.functional.pad(latents, (0, 16 - size[1], 0, 16 - size[0]))  # without pads
    control = ActiveControl(network, torch.zeros(1, inputs.control.shape[1], 16, 16), STRENGTH)
    for item in range(3):  # each caption by itself, as where memory is short
        transformer(even[:1], t[:1], [inputs.captions[item]], controls=[control], images=[0])
    hook.remove()
    own = [1] if network.config.refined != "layers" else [1, 1, 1, 1]  # 2.0: in the joint sequence as well
    assert seen == own


@pytest.mark.one_in(2)
@torch.inference_mode()
def test_controls_add_up_and_none_is_none(models):
    inputs = _inputs(models, "no pads")
    transformer, network = models.ours()

    def run(*strengths: float) -> Tensor:
        controls = [ActiveControl(network, inputs.control, strength) for strength in strengths]
        return transformer(inputs.latents, inputs.t, inputs.captions, controls=controls)

    plain = transformer(inputs.latents, inputs.t, inputs.captions)
    assert torch.equal(run(), plain)
    assert torch.equal(run(0.0), plain)
    # the transformer is not linear, but to first order two halves are a whole
    small = 1e-3
    whole, halves = run(small) - plain, run(small / 2, small / 2) - plain
    assert relative(halves, whole) <= 1e-2


def _of_diffusers(models: Models, inputs: Inputs, *, hints_in_refiner: bool) -> Tensor:
    """With hints_in_refiner, hooks add to the transformer what diffusers adds to the control network's copy alone."""
    net = diffusers.ZImageControlNetModel.from_transformer(models.net, models.transformer)
    latents = [item[:, None] for item in inputs.latents]  # with a frame
    control = [item[:, None] for item in inputs.control]
    found: list[Tensor] = []
    refined = models.net.config.add_control_noise_refiner
    hooks = []
    if hints_in_refiner and refined:
        for block in getattr(net, refined)[:REFINERS]:
            hooks.append(block.after_proj.register_forward_hook(lambda _layer, _args, out: found.append(out)))
    hints = net(latents, inputs.t, inputs.captions, control, conditioning_scale=STRENGTH)
    for hook in hooks:
        hook.remove()
    hooks = []
    if found:
        for block, hint in zip(models.transformer.noise_refiner, found[:REFINERS], strict=True):
            hooks.append(block.register_forward_hook(lambda _block, _args, out, hint=hint: out + STRENGTH * hint))
    out = models.transformer(latents, inputs.t, inputs.captions, controlnet_block_samples=hints).sample
    for hook in hooks:
        hook.remove()
    return torch.stack([item[:, 0] for item in out])


@pytest.mark.one_in(2)
@torch.inference_mode()
def test_diffusers_is_right_but_for_the_hints_of_the_refiner(models):
    """How far from the published networks: nothing in 1.0, in 2.x more than a tenth of what the control does."""
    inputs = _inputs(models, "no pads")
    transformer, network = models.ours()
    ours = transformer(
        inputs.latents, inputs.t, inputs.captions, controls=[ActiveControl(network, inputs.control, STRENGTH)]
    )
    assert relative(_of_diffusers(models, inputs, hints_in_refiner=True), ours) <= 1e-5
    plain = transformer(inputs.latents, inputs.t, inputs.captions)
    off = (_of_diffusers(models, inputs, hints_in_refiner=False) - ours).norm() / (ours - plain).norm()
    assert off <= 1e-4 if network.config.refined == "blocks" else off > 0.1


@torch.inference_mode()
def test_a_control_network_without_the_caption_is_another(models):
    """As ComfyUI runs it: the share of the control's effect that is lost, on these random networks."""
    inputs = _inputs(models, "no pads")
    ours = models.reference(inputs, 0)
    plain = steered(
        models.transformer.state_dict(),
        None,
        models.numbers,
        inputs.latents[0],
        inputs.t[0].item(),
        inputs.captions[0],
    ).velocity
    without = models.reference(inputs, 0, caption_in_control=False)
    assert (without - ours).norm() / (ours - plain).norm() > 0.05


@pytest.mark.one_in(2)
def test_files_of_every_kind_hold_the_same_network(models, tmp_path):
    """Single files: q, k, v apart or fused, a prefix, the transformer's weights as well; a config in the metadata."""
    _, expected = models.ours()
    whole = {name: value.contiguous() for name, value in models.net.state_dict().items()}
    state = {name: value for name, value in whole.items() if name.startswith("control_")}
    config = (models.folder / "net" / "config.json").read_text()
    fused = {}
    for name, value in state.items():
        if ".to_q." in name:
            rows = [state[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            fused[name.replace("to_q", "qkv")] = torch.cat(rows)
        elif ".to_k." not in name and ".to_v." not in name:
            new = name.replace("to_out.0", "out").replace("norm_q", "q_norm").replace("norm_k", "k_norm")
            fused[new] = value
    prefixed = {f"model.diffusion_model.{name}": value for name, value in fused.items()}
    borrowed = {**models.transformer.state_dict(), **state}  # as diffusers saves one that is in use
    for number, tensors in enumerate((state, fused, prefixed, borrowed)):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, metadata={"zimage.control.config": config})
        found = open_component(path, "control").build()
        for (name, ours), (other, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
            assert name == other and torch.equal(ours, theirs)


def test_what_a_network_reads():
    image, masked, keep = torch.rand(1, 16, 4, 4), torch.rand(1, 16, 4, 4), torch.ones(1, 1, 4, 4)
    old = ControlConfig(64, 2, 1e-5, in_channels=16, places=(0,), n_refiner_layers=2, refined="blocks")
    new = ControlConfig(64, 2, 1e-5, in_channels=33, places=(0,), n_refiner_layers=2, refined="hints")
    zeros = torch.zeros(1, 16, 4, 4)
    assert torch.equal(control_latents(image, None, None, old), image)
    assert torch.equal(control_latents(image, None, None, new), torch.cat((image, 0 * keep, zeros), 1))
    assert torch.equal(control_latents(image, keep, masked, new), torch.cat((image, keep, masked), 1))
    assert torch.equal(control_latents(None, keep, masked, new), torch.cat((zeros, keep, masked), 1))
    with pytest.raises(ValueError, match="needs a control image"):
        control_latents(None, None, None, new)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_sixteen_bits_are_near_float32(models, dtype):
    """In float16 also where tokens and hints leave its range."""
    inputs = _inputs(models, "mixed lengths")
    transformer, network = models.ours()

    def run(dtype: torch.dtype) -> Tensor:
        control = ActiveControl(network.to(dtype), inputs.control, STRENGTH)
        captions = [caption.to(dtype) for caption in inputs.captions]
        return transformer.to(dtype)(inputs.latents.to(dtype), inputs.t, captions, controls=[control]).float()

    exact = run(torch.float32)
    assert relative(run(dtype), exact) <= (0.03 if dtype == torch.bfloat16 else 0.005)
    if dtype == torch.float16:
        transformer, network = models.ours()
        transformer.sums_fit_half = True  # as far as its own blocks go
        for layer in network.layers:
            layer.after_proj.weight.mul_(3e4)
        assert relative(run(dtype), run(torch.float32)) <= 0.01
