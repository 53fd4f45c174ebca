"""Numbers that are not finite: noticed in every stage, told, and computed anew in a dtype that holds them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from zimage_core import pipeline
from zimage_core.__main__ import main
from zimage_core.diagnostics import finite
from zimage_core.errors import CheckpointError
from zimage_core.pipeline import ZImagePipeline
from zimage_core.prompts import cache as prompt_cache

from .helpers import NANO, enlarge, relative

PROMPT = "a red circle"
SMALL = {"width": 64, "height": 64, "steps": 3, "seed": 2}


@pytest.fixture
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(NANO, dtype=torch.float16, vae_dtype=torch.float16)


def overflow(pipe: ZImagePipeline, kind: str) -> None:
    """Makes the values of a network larger than float16's, its weights not."""
    names = {
        "transformer": ["final_layer.linear.weight"],
        "text_encoder": ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"],
        "vae": ["decoder.conv_in.weight"],
    }
    for name in names[kind]:
        enlarge(getattr(pipe, kind).get_parameter(name))


# The watch


def test_the_first_bad_step_is_found_at_the_end_and_on_a_cpu_at_once(monkeypatch):
    good, bad = torch.ones(2, 3), torch.tensor([1.0, float("nan")])
    for value in (float("nan"), float("inf"), float("-inf")):
        watched = finite.Steps(5)
        watched.saw(good)
        with pytest.raises(finite.NotFinite, match="^step 2 of 5$"):
            watched.saw(torch.tensor([1.0, value]))
    watched = finite.Steps(5)
    watched.check()
    watched._largest = [value.max() for value in (good, good, bad, bad)]  # as a GPU would have left them
    with pytest.raises(finite.NotFinite, match="^step 3 of 5$"):
        watched.check()


def test_watching_reads_nothing_back_and_takes_two_calls_a_step():
    class Calls(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.name())
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():  # there, a value that is read raises
        latents = torch.empty(1, 16, 128, 128, device="cuda")
        watched = finite.Steps(8)
        with Calls() as calls:
            for _ in range(8):
                watched.saw(latents)
        assert calls.names == ["aten::abs", "aten::max"] * 8
        with pytest.raises(Exception, match="_local_scalar_dense|data-dependent|data dependent"):
            watched.check()


def test_a_dtype_with_more_room():
    cpu = torch.device("cpu")
    assert finite.safer(torch.float16, cpu) == finite.safer(torch.bfloat16, cpu) == torch.float32
    assert finite.safer(torch.float32, cpu) is None


@pytest.mark.parametrize(("ampere", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_float16_on_cuda_goes_to_what_the_card_computes_in(monkeypatch, ampere, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: ampere or including_emulation)
    assert finite.safer(torch.float16, torch.device("cuda")) == expected
    assert finite.safer(torch.bfloat16, torch.device("cuda")) == torch.float32


# The stages of the pipeline


def test_a_step_that_overflows_is_sampled_again_from_the_same_noise(pipe, told):
    overflow(pipe, "transformer")
    steps: list[int] = []
    found = pipe.generate(PROMPT, output="latents", callback=lambda step, *_: steps.append(step), **SMALL)
    (warning,) = told()
    assert "step 1 of 3 gave values that are not finite" in warning
    assert "in float16, though all weights are finite, so it is computed again, in float32" in warning
    assert steps == [1, 2, 3]  # on a CPU, the first run ended with the step that failed
    exact = copy.copy(pipe)
    exact.dtype, exact.transformer = torch.float32, copy.deepcopy(pipe.transformer).float()
    exact.encode_prompts = lambda *_, **__: pipe.encode_prompts([PROMPT])
    expected = exact.generate(PROMPT, output="latents", **SMALL)
    assert relative(found, expected) <= 1e-5
    assert {weight.dtype for weight in pipe.transformer.parameters()} == {torch.float16}


def test_a_later_step_is_named(pipe, told):
    """As on a GPU, where the run goes on; the callback starts over."""
    forward, calls = pipe.transformer.forward, []

    def failing(latents, *arguments, **settings):
        calls.append(latents.dtype)
        out = forward(latents, *arguments, **settings)
        return out * float("nan") if len(calls) == 2 else out

    pipe.transformer.forward = failing
    steps: list[int] = []
    found = pipe.generate(PROMPT, output="latents", callback=lambda step, *_: steps.append(step), **SMALL)
    assert found.isfinite().all()
    assert calls == [torch.float16] * 2 + [torch.float32] * 3 and steps == [1, 1, 2, 3]
    assert "step 2 of 3" in told()[0]


def test_a_vae_that_overflows_decodes_in_float32(pipe, told):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    overflow(pipe, "vae")
    found = pipe.decode(latents)
    (warning,) = told()
    assert "decoding (VAE) gave values that are not finite (NaN or infinite) in float16" in warning
    assert {weight.dtype for weight in pipe.vae.parameters()} == {torch.float16}
    pipe.vae = copy.deepcopy(pipe.vae).float()
    assert torch.equal(found, pipe.decode(latents))
    assert len(told()) == 1


def test_an_infinity_that_clamping_would_hide_is_seen(pipe, told):
    enlarge(pipe.vae.decoder.conv_out.weight)
    pipe.decode(torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert len(told()) == 1


def test_a_text_encoder_that_overflows_computes_in_float32(told, tmp_path):
    cache = prompt_cache.PromptCache(tmp_path)
    pipe = ZImagePipeline.from_pretrained(NANO, dtype=torch.float16, prompt_cache=cache)
    overflow(pipe, "text_encoder")
    prompts = [PROMPT, "a blue square on a white background"]
    found = pipe.encode_prompts(prompts)
    (warning,) = told()
    assert "the text encoder gave values that are not finite (NaN or infinite) in float16" in warning
    pipe.dtype = torch.float32
    for ours, reference in zip(found, pipe.encode_prompts(prompts), strict=True):
        assert relative(ours, reference) <= 1e-3
    assert len(told()) == 1
    pipe.dtype = torch.float16
    assert all(map(torch.equal, pipe.encode_prompts(prompts), found))  # known now
    assert len(told()) == 1


def test_features_that_float16_can_not_hold_stay_in_float32(pipe, told):
    for layer in pipe.text_encoder.model.layers:
        enlarge(layer.mlp.down_proj.weight)
    (features,) = pipe.encode_prompts([PROMPT])
    assert features.dtype == torch.float32 and features.isfinite().all() and features.abs().max() > 65504
    assert pipe.generate(PROMPT, output="latents", **SMALL).isfinite().all()
    assert [message.split(" gave")[0] for message in told()] == ["the text encoder"] * 2 + ["text features for step 1"]


@pytest.mark.parametrize("kind", ["transformer", "text_encoder", "vae"])
def test_without_the_retry_the_stage_and_the_way_out_are_told(pipe, told, kind):
    overflow(pipe, kind)
    pipe.safe_retry = False
    with pytest.raises(CheckpointError, match=r"in float16, though all weights are finite\. .* float32 may help, but"):
        pipe.generate(PROMPT, **SMALL)
    assert not told()


def test_what_no_dtype_mends_is_told_after_the_second_time(pipe, told):
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *arguments, **settings: forward(*arguments, **settings) * float("inf")
    with pytest.raises(CheckpointError, match=r"in float16, .*; computed again in float32, step 1 of 3 gave .* LoRA"):
        pipe.generate(PROMPT, **SMALL)
    assert len(told()) == 1
    pipe.dtype = torch.float32
    with pytest.raises(CheckpointError, match=r"^step 1 of 3 gave .* in float32, though all weights are finite\. "):
        pipe.generate(PROMPT, **SMALL)
    assert len(told()) == 1


def test_damage_is_told_without_computing_again(pipe, told):
    with torch.no_grad():
        pipe.transformer.x_embedder.weight[3, 4] = float("inf")
    words = r"^step 1 of 3 .* in float16: x_embedder.weight of the transformer .* download it again, or .* choose bf16"
    with pytest.raises(CheckpointError, match=words):
        pipe.generate(PROMPT, **SMALL)
    assert not told()


def test_cancelling_reaches_through_the_second_run(pipe):
    overflow(pipe, "transformer")
    with pytest.raises(pipeline.loop.Cancelled):
        pipe.generate(PROMPT, callback=lambda *_: False, **SMALL)


def test_packed_weights_are_looked_through():
    class Packed(torch.nn.Module):
        def expanded(self) -> torch.Tensor:
            return torch.tensor([float("nan")])

    network = torch.nn.ModuleDict({"good": Linear(2, 2), "bad": Packed()})
    assert "bad.weight of the text encoder" in str(finite.damaged(text_encoder=network))
    assert finite.damaged(vae=Linear(2, 2, device="meta")) is None


def test_the_switch_of_the_command_line(monkeypatch, tmp_path):
    asked: list[bool] = []
    opened = ZImagePipeline.from_pretrained

    def noted(*arguments, **settings):
        asked.append(settings["safe_retry"])
        return opened(*arguments, **settings)

    monkeypatch.setattr(ZImagePipeline, "from_pretrained", noted)
    for switch in ([], ["--no-safe-retry"]):
        assert main(["generate", PROMPT, "--cpu", "-s", "1", "-o", str(tmp_path / "x.png"), *switch]) == 0
    assert asked == [True, False]


def test_the_cache_gives_nothing_out_that_is_not_finite(tmp_path):
    cache, bad = prompt_cache.PromptCache(tmp_path), torch.tensor([[1.0, float("nan")]])
    cache._write(tmp_path, prompt_cache._name("key"), bad)  # as another program could
    assert cache.get("key") is None
