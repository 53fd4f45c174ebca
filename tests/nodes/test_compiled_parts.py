"""Compiled parts of the model, with every choice of attention, in the real host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..helpers import NANO, relative
from . import test_attention

parts = test_attention.parts
positive = test_attention.positive
registered = test_attention.registered
sample = test_attention.sample


@pytest.mark.slow
def test_compiled_model_agrees_also_with_a_lora_and_is_compiled_once(pack, parts, sample):
    (model,) = pack.loaders.ZImageTransformerLoader.execute(pack.bridge.folders.NANO, "fp32", compile=True).args
    assert model.model.diffusion_model.compiled
    assert relative(sample(model=model), sample()) <= 1e-5
    graphs = _graphs()
    name = pack.bridge.folders.NANO_LORA
    with_lora, plain_with_lora = (
        pack.bridge.lora.add_lora(patcher, None, name, 1.0, 1.0)[0] for patcher in (model, parts.model)
    )
    changed = sample(model=with_lora)
    assert relative(changed, sample(model=plain_with_lora)) <= 1e-5
    assert relative(changed, sample()) > 1e-2
    assert relative(sample(model=model, size=24), sample(size=24)) <= 1e-5
    assert graphs > 0 and _graphs() == graphs


@pytest.fixture
def compiled(parts):
    """Our model behind ComfyUI's own compile node, and the counter of what dynamo made of it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    def compile_(*keys: str) -> tuple[Any, Any]:
        torch._dynamo.reset()
        counters.clear()
        model, counter = parts.model.clone(), CompileCounter()
        options = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(model=model, backend=counter, keys=list(keys), options=options)
        return model, counter

    yield compile_
    torch._dynamo.reset()


def unseen(out: torch.Tensor) -> torch.Tensor:
    """What dynamo can't look into, as most packages' kernels."""
    torch._dynamo.graph_break()
    return out * 1.0


BLOCKS = ["diffusion_model.layers.0", "diffusion_model.layers.1"]


@pytest.mark.parametrize(
    ("attention", "keys"),
    [
        ("flash", BLOCKS),
        ("auto", BLOCKS),
        *(pytest.param(name, BLOCKS, marks=pytest.mark.slow) for name in ("pytorch", "sub_quad", "split")),
        pytest.param("auto", ["diffusion_model"], marks=pytest.mark.slow),
    ],
)
def test_no_choice_breaks_a_compiled_graph(pack, sample, compiled, registered, monkeypatch, attention, keys):
    """auto as on CUDA, where it chooses among several."""
    used = registered("flash", unseen)
    monkeypatch.setattr(pack.bridge.attention, "_tried", lambda _device: ("flash", "split"))
    monkeypatch.setattr(pack.bridge.attention, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(pack.bridge.attention, "WORTH_SHARE", -1e9)
    model, counter = compiled(*keys)
    monkeypatch.setattr(
        pack.bridge.attention, "_seconds", lambda backend, _size: float("backend" not in backend.__name__)
    )
    frames = []
    for _ in range(2):  # a further run needs no further graph
        used.clear()
        assert relative(sample(attention, model=model), sample("pytorch")) <= 1e-5
        assert torch._dynamo.utils.counters["graph_break"] == {}
        assert bool(used) == (attention in ("flash", "auto"))
        frames.append(counter.frame_count)
    assert frames == [1, 1]  # of all blocks together


def test_another_choice_counts_for_a_compiled_model(sample, compiled, parts, registered):
    """Though ComfyUI's node has torch.compile ignore changes of the transformer options."""
    used = registered("flash", unseen)
    model, _counter = compiled(BLOCKS[0])
    config = parts.model.model.diffusion_model.config
    uses = 3 * (config.n_refiner_layers + config.n_layers) + config.n_refiner_layers
    for attention, expected in (("pytorch", 0), ("flash", 4 + uses), ("pytorch", 0), ("flash", uses)):
        used.clear()
        sample(attention, model=model)
        assert len(used) == expected


def test_comfyui_builds_a_compiled_model_anew_as_compiled(pack):
    model = pack.bridge.model.load_model(NANO, torch.float32, compiled=True)
    factory, arguments = model.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).model.diffusion_model.compiled
    assert not pack.bridge.model.load_model(NANO).model.diffusion_model.compiled


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "queries"), [(1, 40), (2, 40), (1, 24)])
def test_comfyuis_kernel_norms_and_rotates_as_we_do(pack, parts, dtype, batch, queries):
    """Its own fallback for a CPU, which is the same formula; on a GPU it is one pass."""
    model = parts.model.model.diffusion_model
    layer = model.layers[0].attention
    kernels = model.lean_operations(model.gain)
    assert isinstance(kernels, pack.bridge.model.KernelOperations)
    generator = torch.Generator().manual_seed(0)
    width = layer.q_norm.weight.shape[0]
    q, k = torch.randn(2, batch, 40, 3, width, generator=generator).to(dtype).unbind()
    places = 50 * torch.rand(1, 40, 3, generator=generator)
    ours, plain = kernels.by_kernel, super(type(kernels).__mro__[1], kernels).norm_rotate
    with torch.inference_mode():
        given = (q[:, :queries], k, model._rotations(places), layer.q_norm, layer.k_norm)
        for result, expected in zip(ours(*given), plain(*given), strict=True):
            assert result.dtype == dtype and result.shape == expected.shape
            assert relative(result.float(), expected.float()) <= (1e-6 if dtype == torch.float32 else 2**-7)
