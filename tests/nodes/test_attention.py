"""What makes a run fast, in the real host: attention by choice, captions refined once, compiled parts."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

NANO = Path(__file__).resolve().parents[2] / "nano" / "snapshot"


@pytest.fixture(scope="module")
def positive(pack):
    return pack.host_clip.encode(pack.host_clip.load_clip(NANO, torch.float32), "a red circle on a blue background")


@pytest.fixture
def parts(pack, positive) -> SimpleNamespace:
    """A model of its own for each test: what is found about attention is kept with the model."""
    return SimpleNamespace(model=pack.host_model.load_model(NANO, torch.float32), positive=positive)


@pytest.fixture
def sample(pack, parts):
    def run(attention: str = "auto", size: int = 16, model: Any = None) -> torch.Tensor:
        (out,) = pack.sampling.ZImageSampler.execute(
            model=model or parts.model,
            positive=parts.positive,
            latent_image={"samples": torch.zeros(1, 16, size, size)},
            seed=3,
            steps=3,
            guidance_scale=0.0,
            cfg_normalization=0.0,
            cfg_truncation=1.0,
            denoise=1.0,
            attention=attention,
        ).args
        return out["samples"]

    return run


@pytest.fixture
def registered(pack, monkeypatch):
    """Puts a backend into the host's registry, where an installed package would put it; counts its calls."""
    registry = pack.host_attention.host_attention.REGISTERED_ATTENTION_FUNCTIONS

    def register(name: str, change) -> list[tuple[int, ...]]:
        calls: list[tuple[int, ...]] = []
        plain = registry["pytorch"]

        def backend(q, *arguments, **settings):
            calls.append(tuple(q.shape))
            return change(plain(q, *arguments, **settings))

        monkeypatch.setitem(registry, name, backend)
        return calls

    return register


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def test_choices_are_what_is_installed(pack, registered):
    names = [item for item in pack.host_attention.choices() if item != "auto"]
    assert names[0] == "pytorch" and {"sub_quad", "split"} <= set(names) and "sage" not in names
    assert pack.host_attention.choices()[0] == "auto"
    registered("sage", lambda out: out)
    assert "sage" in pack.host_attention.choices()


@pytest.mark.parametrize("name", ["pytorch", "sub_quad", "split", "auto"])
def test_every_installed_backend_gives_the_same_picture(sample, name):
    assert relative(sample(name), sample("pytorch")) <= 1e-5


def test_exact_backend_is_checked_once_per_size_and_then_used(sample, parts, registered):
    calls = registered("flash", lambda out: out * (1 + 1e-6))
    checked = sample("flash", 16)
    config = parts.model.model.diffusion_model.config
    uses = 3 * (config.n_refiner_layers + config.n_layers) + config.n_refiner_layers  # three steps; captions once
    assert len(calls) == uses
    used = sample("flash", 16)
    assert len(calls) == 2 * uses
    assert not torch.equal(checked, used)  # a checked call gives plain attention's result
    assert relative(checked, used) <= 1e-5


def test_wrong_backend_is_refused_with_its_error(sample, registered, caplog):
    calls = registered("sage", lambda out: out * 1.01)
    expected = sample("pytorch")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample("sage"), expected)
    messages = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert messages and all("'sage' is refused" in message for message in messages)
    assert all("errs by 0.01, expected at most 1e-05 in torch.float32" in message for message in messages)
    assert len(messages) == len(set(messages)) == len(calls)  # one for each size, and never asked again
    caplog.clear()
    sample("sage")
    assert len(calls) == len(messages)
    sample("sage", 24)
    assert len(calls) > len(messages)  # another size is checked anew


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), ValueError("head size"), AssertionError("dtype")])
def test_failing_backend_is_refused(sample, registered, caplog, error):
    def fail(_out):
        raise error

    registered("xformers", fail)
    expected = sample("pytorch")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample("xformers"), expected)
    assert f"it failed with {type(error).__name__}: {error}" in caplog.text


def test_nan_is_refused(sample, registered, caplog):
    registered("sage", lambda out: out * float("nan"))
    assert sample("sage").isfinite().all()
    assert "errs by nan" in caplog.text


def test_among_several_the_fastest_that_passes_is_taken(pack, parts):
    """The choice that `auto` makes on CUDA, among backends of this machine."""
    plain = pack.host_attention.host_attention.get_attention_function("pytorch")
    q = torch.randn(1, 2, 64, 16)
    used: list[str] = []

    def backend(name, times, factor=1.0):
        def call(*arguments, **settings):
            used.append(name)
            for _ in range(times):
                out = plain(*arguments, **settings)
            return out * factor

        return call

    candidates = {"slow": backend("slow", 300), "quick": backend("quick", 1), "wrong": backend("wrong", 1, 1.1)}
    choice = pack.host_attention.Choice(candidates, {})
    choice(None, q, q, q, 2, skip_reshape=True)
    assert set(used) == {"slow", "quick", "wrong"}
    used.clear()
    result = choice(None, q, q, q, 2, skip_reshape=True)
    assert used == ["quick"] and torch.equal(result, plain(q, q, q, 2, skip_reshape=True))


def test_what_is_not_installed_is_refused(sample):
    with pytest.raises(ValueError, match="attention is 'sage', which is not installed here; there are auto, pytorch"):
        sample("sage")


def test_attention_of_another_node_stays(sample, parts):
    calls = []

    def override(function, *arguments, **settings):
        calls.append(1)
        return function(*arguments, **settings)

    model = parts.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    expected = sample("auto")
    assert calls == []
    assert relative(sample("auto", model=model), expected) <= 1e-5
    assert calls
    with pytest.raises(ValueError, match="can't be combined with a node that replaces the attention"):
        sample("sub_quad", model=model)


def test_the_model_itself_is_left_as_it_was(sample, parts):
    sample("sub_quad")
    assert "optimized_attention_override" not in parts.model.model_options.get("transformer_options", {})


# Captions


@pytest.fixture
def refined(parts, monkeypatch) -> list[int]:
    """Tokens of each caption that was refined."""
    found: list[int] = []
    network = parts.model.model.diffusion_model
    refine = network.refine_captions

    def counted(features, *arguments, **settings):
        found.append(features.shape[1])
        return refine(features, *arguments, **settings)

    monkeypatch.setattr(network, "refine_captions", counted)
    return found


def test_captions_are_refined_once_per_run_and_not_kept(sample, parts, refined):
    first = sample()
    assert len(refined) == 1
    captions = parts.model.model.diffusion_model.run_captions
    assert captions.known == [] and captions.patcher is None
    assert torch.equal(sample(), first)
    assert len(refined) == 2


def test_captions_that_change_during_the_run_are_refined_anew(sample, parts, refined):
    model = parts.model.clone()
    weight = iter([1.0, 1.0, 0.5])

    def wrapper(apply_model, given):
        c = dict(given["c"])
        c["c_crossattn"] = c["c_crossattn"] * next(weight)
        return apply_model(given["input"], given["timestep"], **c)

    model.set_model_unet_function_wrapper(wrapper)
    changed = sample(model=model)
    assert len(refined) == 2
    assert not torch.equal(changed, sample())


def test_captions_follow_an_override_that_may_change(sample, parts, refined):
    model = parts.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k)
    sample(model=model)
    assert len(refined) == 3


def test_captions_are_dropped_after_an_error(sample, parts, refined):
    model = parts.model.clone()

    def wrapper(apply_model, given):
        apply_model(given["input"], given["timestep"], **given["c"])
        raise RuntimeError("from another node")

    model.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(RuntimeError, match="from another node"):
        sample(model=model)
    assert len(refined) == 1
    assert parts.model.model.diffusion_model.run_captions.known == []


# Compiled parts


def test_compiled_model_agrees_also_with_a_lora_and_is_compiled_once(pack, parts, sample):
    (model,) = pack.loaders.ZImageTransformerLoader.execute(pack.host.NANO, "fp32", compile=True).args
    assert model.model.diffusion_model.compiled
    assert relative(sample(model=model), sample()) <= 1e-5
    graphs = _graphs()
    name = pack.host.NANO_LORA
    with_lora, plain_with_lora = (
        pack.host_lora.add_lora(patcher, None, name, 1.0, 1.0)[0] for patcher in (model, parts.model)
    )
    changed = sample(model=with_lora)
    assert relative(changed, sample(model=plain_with_lora)) <= 1e-5
    assert relative(changed, sample()) > 1e-2
    assert relative(sample(model=model, size=24), sample(size=24)) <= 1e-5
    assert graphs > 0 and _graphs() == graphs


def test_the_host_builds_a_compiled_model_anew_as_compiled(pack):
    model = pack.host_model.load_model(NANO, torch.float32, compiled=True)
    factory, arguments = model.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).model.diffusion_model.compiled
    assert not pack.host_model.load_model(NANO).model.diffusion_model.compiled


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "queries"), [(1, 40), (2, 40), (1, 24)])
def test_the_hosts_kernel_norms_and_rotates_as_we_do(pack, parts, dtype, batch, queries):
    """Its own fallback for a CPU, which is the same formula; on a GPU it is one pass."""
    model = parts.model.model.diffusion_model
    layer = model.layers[0].attention
    assert layer.norm_and_rotate is pack.host_model._norm_and_rotate  # the host brings the kernel
    generator = torch.Generator().manual_seed(0)
    width = layer.q_norm.weight.shape[0]
    q, k = torch.randn(2, batch, 40, 3, width, generator=generator).to(dtype).unbind()
    places = 50 * torch.rand(1, 40, 3, generator=generator)
    ours = pack.host_model._by_kernel
    plain = pack.host_model.norm_and_rotate
    with torch.inference_mode():
        given = (q[:, :queries], k, model._rotations(places), layer.q_norm, layer.k_norm)
        for result, expected in zip(ours(*given), plain(*given), strict=True):
            assert result.dtype == dtype and result.shape == expected.shape
            assert relative(result.float(), expected.float()) <= (1e-6 if dtype == torch.float32 else 2**-7)
