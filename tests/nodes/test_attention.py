"""What makes a run fast, in the real host: attention by choice, captions refined once, compiled parts."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ..helpers import NANO, relative

ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", RuntimeError)  # new in torch 2.8


@pytest.fixture(scope="module")
def positive(pack):
    return pack.bridge.clip.encode(pack.bridge.clip.load_clip(NANO, torch.float32), "a red circle on a blue background")


@pytest.fixture
def parts(pack, positive) -> SimpleNamespace:
    """A model of its own for each test: what is found about attention is kept with the model."""
    return SimpleNamespace(model=pack.bridge.model.load_model(NANO, torch.float32), positive=positive)


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
    """Puts a backend into ComfyUI's registry, where an installed package would put it; counts its calls."""
    registry = pack.bridge.attention.comfy_attention.REGISTERED_ATTENTION_FUNCTIONS

    def register(name: str, change) -> list[tuple[int, ...]]:
        calls: list[tuple[int, ...]] = []
        plain = registry["pytorch"]

        def backend(q, *arguments, **settings):
            calls.append(tuple(q.shape))
            return change(plain(q, *arguments, **settings))

        monkeypatch.setitem(registry, name, backend)
        return calls

    return register


def test_choices_are_what_is_installed(pack, registered):
    names = [item for item in pack.bridge.attention.choices() if item != "auto"]
    assert names[0] == "pytorch" and {"sub_quad", "split"} <= set(names) and "sage" not in names
    assert pack.bridge.attention.choices()[0] == "auto"
    registered("sage", lambda out: out)
    registered("comfy_kitchen_int8", lambda out: out)  # as newer ones have it
    assert pack.bridge.attention.choices() == ["auto", "pytorch", "sage", "sub_quad", "split", "comfy_kitchen_int8"]


@pytest.mark.parametrize("name", ["pytorch", "sub_quad", "split", "auto"])
def test_every_installed_backend_gives_the_same_image(sample, name):
    assert relative(sample(name), sample("pytorch")) <= 1e-5


def test_a_backend_is_checked_once_per_size_and_before_the_first_step(sample, parts, registered):
    calls = registered("flash", lambda out: out * (1 + 1e-6))
    config = parts.model.model.diffusion_model.config
    uses = 3 * (config.n_refiner_layers + config.n_layers) + config.n_refiner_layers  # three steps; captions once
    before = {}

    def first(apply_model, given):
        before.setdefault("the first step", len(calls))
        return apply_model(given["input"], given["timestep"], **given["c"])

    model = parts.model.clone()
    model.set_model_unet_function_wrapper(first)
    for checks in (4, 0):  # of both together, of the image's to both, of either alone
        before.clear()
        calls.clear()
        sample("flash", model=model)
        assert before == {"the first step": checks} and len(calls) == checks + uses
    assert relative(sample("flash"), sample("pytorch")) <= 1e-5


def test_a_wrong_backend_is_refused_with_its_error(sample, registered, caplog):
    calls = registered("flash", lambda out: out * 1.01)
    expected = sample("pytorch")
    for _ in range(2):  # never asked again, but told again
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert torch.equal(sample("flash"), expected)
        (message,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
        assert message == (
            "attention 'flash' is refused for 96 queries to 96 keys in torch.float32: it errs by 0.01, expected at "
            "most 1e-05 in torch.float32. 'pytorch' is used."
        )
        assert len(calls) == 1
    sample("flash", 24)
    assert len(calls) == 2  # another size is checked anew


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("no kernel image"), "it failed with RuntimeError: no kernel image"),
        (ValueError("head size"), "it failed with ValueError: head size"),
        (AssertionError("dtype"), "it failed with AssertionError: dtype"),
        (torch.OutOfMemoryError("tried to allocate"), "there is not enough memory for it"),
        (ACCELERATOR_ERROR("CUDA error: out of memory"), "there is not enough memory for it"),
    ],
)
def test_failing_backend_is_refused(sample, registered, caplog, error, words):
    def fail(_out):
        raise error

    registered("xformers", fail)
    expected = sample("pytorch")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample("xformers"), expected)
    assert f"'xformers' is refused for 96 queries to 96 keys in torch.float32: {words}. 'pytorch' is" in caplog.text


def test_nan_is_refused(sample, registered, caplog):
    registered("sage", lambda out: out * float("nan"))
    registered("flash", lambda out: out.index_fill(1, torch.tensor([2]), float("inf")))  # no row that is compared
    assert sample("sage").isfinite().all() and sample("flash").isfinite().all()
    assert "errs by nan" in caplog.text and "not all of its values are finite" in caplog.text


@pytest.mark.parametrize("name", ["sage", "comfy_kitchen_int8"])
def test_a_quantizing_backend_has_its_own_tolerance(sample, registered, caplog, name):
    calls = registered(name, lambda out: out * 1.03)
    sample(name)
    assert len(calls) > 20 and "refused" not in caplog.text
    registered(name, lambda out: out * 1.3)
    assert torch.equal(sample(name), sample("pytorch"))
    assert f"{name!r} is refused" in caplog.text and "it errs by 0.3, expected at most 0.12" in caplog.text


@pytest.mark.parametrize("case", ["guidance", "batch", "area", "uneven"])
def test_no_size_of_a_run_is_left_to_plain_attention(pack, parts, registered, monkeypatch, case):
    """Guidance with prompts of other lengths, batches, areas and sizes that have to be padded are all foreseen."""
    longer = parts.positive[0][0].repeat(1, 3, 1)
    given = {"positive": parts.positive, "negative": [[longer, {}]]}
    shape = [1, 16, 16, 16]
    if case == "batch":
        shape[0] = 2
    elif case == "uneven":
        shape[2:] = [18, 22]
    elif case == "area":
        given["positive"] = [[parts.positive[0][0], {"area": (8, 10, 4, 10)}], [longer, {}]]
    calls = registered("flash", lambda out: out)

    def plain(*_arguments, **_settings):
        raise AssertionError("plain attention")

    monkeypatch.setattr(pack.bridge.attention, "_plain", lambda _device: plain)
    settings = {"scale": 2.0, "cfg_normalization": 0.0, "cfg_truncation": 1.0, "attention": "flash"}
    guider = pack.bridge.sampler.make_guider(parts.model, **given, **settings)
    pack.bridge.sampler.run(guider, torch.zeros(shape), torch.tensor([1.0, 0.5]), 3, {})
    assert len(calls) > 10


def test_what_was_not_foreseen_takes_plain_attention(pack, sample, parts, registered, caplog):
    calls = registered("flash", lambda out: out)
    seen = []

    def cropping(apply_model, given):
        seen.append(len(calls))
        half = apply_model(given["input"][:, :, :12], given["timestep"], **given["c"])
        return torch.cat((half, half), dim=2)

    model = parts.model.clone()
    model.set_model_unet_function_wrapper(cropping)
    sample("flash", 24, model=model)
    foreseen = parts.model.model.diffusion_model.config.n_refiner_layers  # of the captions, which are refined once
    assert len(calls) == seen[0] + foreseen and caplog.text == ""
    model.set_model_unet_function_wrapper(lambda _apply_model, given: given["input"])
    sample("flash", 24, model=model)
    assert "attention 'flash' was asked for nothing that it was checked for" in caplog.text
    choice = pack.bridge.attention.choose("flash", model, {})
    q = torch.randn(1, 2, 8, 4)
    mask = torch.zeros(1, 1, 1, 8, dtype=torch.bool)
    for settings in ({"mask": mask}, {"skip_output_reshape": True}):
        choice(None, q, q, q, 2, skip_reshape=True, **settings)
    assert len(calls) == seen[0] + foreseen


# auto


@pytest.fixture
def on(pack, monkeypatch):
    """Has the pack's choice of attention believe that it is on another device."""

    def simulate(cpu: bool, **answers: bool) -> None:
        mm = SimpleNamespace(**vars(pack.bridge.attention.mm))
        mm.is_device_cpu = lambda _device: cpu
        for name, answer in answers.items():
            setattr(mm, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(pack.bridge.attention, "mm", mm)

    return simulate


def test_torchs_attention_is_not_forced_where_comfyui_avoids_it(pack, sample, on, monkeypatch, registered):
    """As on a Mac and most AMD cards: ComfyUI's own there is sub_quad, as it is here, and torch's is never called."""
    ops = pack.bridge.attention.comfy_attention.comfy.ops
    calls, torchs = [], ops.scaled_dot_product_attention
    monkeypatch.setattr(ops, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or torchs(*a, **k))
    expected = sample("pytorch")
    assert calls
    on(cpu=False)
    calls.clear()
    assert relative(sample("auto"), expected) <= 1e-5 and not calls
    assert relative(sample("split"), expected) <= 1e-5 and not calls  # nor as what another is held against


@pytest.mark.parametrize(
    ("nvidia", "cuda", "torchs", "capability", "tried"),
    [
        (True, True, True, (9, 0), ("pytorch", "pytorch cudnn", "flash")),  # Hopper
        (True, True, True, (8, 9), ("pytorch", "flash")),  # Ada, where cuDNN is not the faster one
        (True, True, False, (9, 0), ()),  # started with --use-split-cross-attention
        (False, True, True, (9, 0), ()),  # AMD
        (False, False, True, (9, 0), ()),  # XPU
        (False, False, False, (9, 0), ()),  # MPS
    ],
)
def test_where_auto_tries_others(pack, on, registered, monkeypatch, nvidia, cuda, torchs, capability, tried):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    registered("flash", lambda out: out)
    registered("comfy_kitchen_int8", lambda out: out)
    on(cpu=False, is_nvidia=nvidia, is_device_cuda=cuda, pytorch_attention_enabled=torchs)
    assert pack.bridge.attention._tried(torch.device("cpu")) == tried


def test_auto_takes_the_fastest_that_passes(pack, parts, sample, registered, monkeypatch):
    plain = pack.bridge.attention.comfy_attention.get_attention_function("pytorch")

    def slow(*arguments, **settings):
        for _ in range(30):
            out = plain(*arguments, **settings)
        return out

    quick = registered("flash", lambda out: out)
    wrong = registered("xformers", lambda out: out * 1.1)
    monkeypatch.setattr(pack.bridge.attention, "_tried", lambda _device: ("flash", "xformers"))
    monkeypatch.setattr(pack.bridge.attention, "_plain", lambda _device: slow)
    monkeypatch.setattr(pack.bridge.attention, "WORTH_SECONDS", 1e9)
    sample("auto")
    assert not quick and not wrong  # so short a run is not worth a trial
    monkeypatch.setattr(pack.bridge.attention, "WORTH_SECONDS", 0.0)
    sample("auto")
    trial = 1 + 1 + pack.bridge.attention.TIMED_CALLS
    assert len(wrong) == 1 and len(quick) == trial + 3 * (parts.model.model.diffusion_model.config.n_layers - 1)
    assert {shape[-2] for shape in quick} == {96}  # what the others gain is not worth a plan for each
    monkeypatch.setattr(pack.bridge.attention, "WORTH_SHARE", 1.0)
    quick.clear()
    sample("auto")
    assert not quick  # what gains too little is left alone


@pytest.mark.parametrize("gone", ["before", "in the trial"])
def test_auto_survives_without_memory_for_a_trial(pack, sample, registered, monkeypatch, gone):
    def fail(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    expected = sample("auto")
    registered("flash", fail)
    monkeypatch.setattr(pack.bridge.attention, "_tried", lambda _device: ("flash",))
    monkeypatch.setattr(pack.bridge.attention, "WORTH_SECONDS", 0.0)
    if gone == "before":
        monkeypatch.setattr(pack.bridge.attention, "example_of", fail)
        monkeypatch.setattr(pack.bridge.attention, "_times", {})
    assert torch.equal(sample("auto"), expected)


@pytest.mark.parametrize("given", ["heads apart", "heads together"])
@pytest.mark.parametrize("settings", [{}, {"scale": 0.5}, {"skip_output_reshape": True}, {"mask": 2}, {"mask": 3}])
def test_torchs_kernels_are_called_as_comfyuis_are(pack, monkeypatch, given, settings):
    """And by themselves: on a GPU ComfyUI's own call of torch sets its own list of kernels."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 24, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 40, 8, generator=generator)
    call: dict[str, Any] = {"skip_reshape": True, "enable_gqa": True, **settings}
    if given == "heads together":
        q, k, v = (tensor.transpose(1, 2).flatten(2) for tensor in (q, k, v))
        call["skip_reshape"] = False
    if "mask" in settings:
        call["mask"] = torch.randn(24, 40, generator=generator).expand((2, 24, 40)[-settings["mask"] :])
    expected = pack.bridge.attention.comfy_attention.get_attention_function("pytorch")(q, k, v, 4, **call)
    seen, torchs = [], F.scaled_dot_product_attention

    def recorded(*arguments, **more):
        seen.append(_cur_sdpa_kernel_backends())
        return torchs(*arguments, **more)

    def as_on_a_gpu(*arguments, **more):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(*arguments, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(pack.bridge.attention.comfy_attention.comfy.ops, "scaled_dot_product_attention", as_on_a_gpu)
    result = pack.bridge.attention._torch_kernel(SDPBackend.MATH, q, k, v, 4, **call)
    assert seen == [[SDPBackend.MATH]]
    assert result.shape == expected.shape and relative(result, expected) <= 1e-5


def test_what_ran_can_be_asked_and_plain_attention_forced(pack, parts, registered):
    calls = registered("flash", lambda out: out)
    settings = {"scale": 0.0, "cfg_normalization": 0.0, "cfg_truncation": 1.0, "attention": "flash"}
    guider = pack.bridge.sampler.make_guider(parts.model, parts.positive, None, **settings)
    options = guider.model_options["transformer_options"]
    start = torch.zeros(1, 16, 16, 16), torch.tensor([1.0, 0.5]), 3, {}
    pack.bridge.sampler.run(guider, *start)
    assert pack.bridge.attention.ran(options) == "attention 'flash'"
    assert pack.bridge.attention.force_plain(options)
    calls.clear()
    pack.bridge.sampler.run(guider, *start)
    assert not calls and pack.bridge.attention.ran(options) == "attention 'pytorch'"
    assert not pack.bridge.attention.force_plain(options)
    host = pack.bridge.attention.comfy_attention.optimized_attention
    name = next(n for n, f in pack.bridge.attention.comfy_attention.REGISTERED_ATTENTION_FUNCTIONS.items() if f is host)
    others = {f"attention {name!r}": {}, "the attention of another node": {"optimized_attention_override": print}}
    for words, given in others.items():
        assert pack.bridge.attention.ran(given).startswith(words) and not pack.bridge.attention.force_plain(given)


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
