"""The autoencoder in bands against the whole of it: same numbers, less memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import GroupNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zimage_core.backends import memory
from zimage_core.config import VAEConfig
from zimage_core.model import vae_bands
from zimage_core.model.vae import AutoencoderKL
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights.snapshot import open_component

from . import process_memory
from .helpers import NANO, PUBLISHED

CPU = torch.device("cpu")
TINY = {**PUBLISHED["vae"], "block_out_channels": [8, 16, 16, 24], "norm_num_groups": 4}
SIZES = [(16, 16), (9, 7), (1, 3)]  # latent height and width
ROWS = [6, 64, None]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.inference_mode():
        yield


def random_vae(config: dict) -> AutoencoderKL:
    """Norms and biases away from 1 and 0, so that each of them matters."""
    torch.manual_seed(0)
    model = AutoencoderKL(VAEConfig.from_dict(config, "here"))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module", params=["trained", "random"])
def vae(request) -> AutoencoderKL:
    if request.param == "random":
        return random_vae(TINY)
    return open_component(NANO, "vae").build(dtype=torch.float32)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_decoding_equals_the_plain_one(vae, size, rows):
    latents = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1)) * 2
    plain = vae.decode(latents)
    assert (vae_bands.decode(vae, latents, rows) - plain).abs().max() <= 2e-5
    assert (plain - plain.mean()).abs().max() > 0.1


@pytest.mark.one_in(3)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_encoding_equals_the_plain_one(vae, size, rows):
    image = torch.rand(2, 3, *(8 * side for side in size), generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert (vae_bands.encode(vae, image, rows) - vae.encode(image)).abs().max() <= 2e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_statistics_of_a_map_far_from_zero_keep_their_digits(layout):
    """A large mean with a small variance is where a sum of squares in float32 would fail."""
    x = 1000 + 0.01 * torch.randn(1, 16, 64, 8, generator=torch.Generator().manual_seed(0))
    norm = GroupNorm(4, 16)
    bands = vae_bands._Bands(6, None, CPU)
    parts = [part.contiguous(memory_format=layout) for part in x.split(10, dim=2)]
    mean, variance = bands.statistics(norm, vae_bands.Stored(parts))
    groups = x.double().view(4, -1)
    assert torch.allclose(mean, groups.mean(1), rtol=1e-7, atol=0)
    assert torch.allclose(variance, groups.var(1, correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_norms_of_a_large_map_are_exact(layout):
    """Where channels lie side by side, torch's own group norm is off by 7e-4 here: it adds them up one by one."""
    x = torch.randn(1, 8, 1024, 1024, generator=torch.Generator().manual_seed(0)) + 0.5
    norm, bands = GroupNorm(2, 8, eps=1e-6), vae_bands._Bands(300, None, CPU)
    stored = vae_bands.Stored([part.contiguous(memory_format=layout) for part in x.split(300, dim=2)])
    found = vae_bands.Normed(norm, stored, bands.statistics(norm, stored)).rows(0, 1024)
    exact = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 2, eps=1e-6))
    assert (found - exact).abs().max() <= 2e-6


def test_attention_of_the_plain_one_stores_no_scores():
    """A fused kernel runs, not torch's straightforward one, which SDPA falls back to for rows that are strided."""
    layer, x = random_vae(TINY).decoder.mid.attn_1, torch.randn(1, 24, 16, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiled:
        layer(x)
    ran = {event.key for event in profiled.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in ran
    assert not ran & {"aten::_scaled_dot_product_attention_math", "aten::_softmax"}


def test_bfloat16_is_no_further_from_float32_than_plain(vae):
    latents = torch.randn(2, 16, 10, 10, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(vae).bfloat16().float().decode(latents)
    half = copy.deepcopy(vae).bfloat16()
    ours = (vae_bands.decode(half, latents.bfloat16(), 20).float() - exact).norm()
    theirs = (half.decode(latents.bfloat16()).float() - exact).norm()
    assert 0 < ours <= 1.1 * theirs


def test_size_that_can_not_be_encoded_is_an_error(vae):
    with pytest.raises(ValueError, match="an image of 20x16 can't be encoded"):
        vae_bands.encode(vae, torch.zeros(1, 3, 16, 20))


def test_each_band_is_announced_and_can_be_the_last(vae):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        vae_bands.decode(vae, torch.zeros(1, 16, 8, 8), 16, stop)
    ticks: list[int] = []
    vae_bands.decode(vae, torch.zeros(1, 16, 8, 8), 16, lambda: ticks.append(1))
    few = len(ticks)
    vae_bands.decode(vae, torch.zeros(1, 16, 8, 8), 4, lambda: ticks.append(1))
    assert 10 < few < len(ticks) - few


def test_no_row_is_computed_twice_but_for_the_edges_of_bands(vae):
    rows: dict[str, int] = {}
    latents, convolutions = torch.zeros(1, 16, 16, 4), {}
    for name, module in vae.decoder.named_modules():
        if isinstance(module, torch.nn.Conv2d) and "mid" not in name:
            convolutions[name] = module
    hooks = [
        module.register_forward_hook(lambda *call, name=name: rows.update({name: rows.get(name, 0) + call[2].shape[2]}))
        for name, module in convolutions.items()
    ]
    vae.decode(latents)
    plain = dict(rows)
    rows.clear()
    vae_bands.decode(vae, latents, 32)
    for hook in hooks:
        hook.remove()
    assert rows.keys() == plain.keys() and len(plain) > 20
    for name in plain:
        edge = 4 if "upsample" in name else 2  # one row above and below, which upsampling doubles
        assert plain[name] <= rows[name] <= plain[name] + edge * (128 // 32)


@pytest.mark.slow
def test_memory_is_little_more_than_the_widest_map():
    """The published shape of the maps at an eighth of the channels, at a size where maps outweigh the rest.

    Kernels' own memory, of which a whole map needs as much again and a band little, is not counted here.
    """
    narrow = {**PUBLISHED["vae"], "block_out_channels": [16, 32, 64, 64], "norm_num_groups": 16}
    vae, latents = random_vae(narrow), torch.randn(1, 16, 96, 64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vae_bands, "WORKSPACE", 2 * 2**20)
        patched.setattr(vae_bands, "SCORES", 4 * 2**20)
        in_bands = process_memory.tensors(lambda: vae_bands.decode(vae, latents))
    plain = process_memory.tensors(lambda: vae.decode(latents))
    widest = 32 * 768 * 512 * 4
    assert widest < in_bands <= 1.25 * widest
    assert plain >= 3 * widest


@pytest.mark.slow
def test_freed_bands_go_back_to_the_system(monkeypatch):
    """Else glibc keeps those below 32 MB, and the process needs twice what tensors take."""
    monkeypatch.setattr(vae_bands, "WORKSPACE", 4 * 2**20)
    vae = random_vae({**PUBLISHED["vae"], "block_out_channels": [16, 32, 64, 64], "norm_num_groups": 16})
    latents = torch.randn(1, 16, 96, 64)
    of_tensors = process_memory.tensors(lambda: vae_bands.decode(vae, latents))
    memory.give_back()
    assert process_memory.growth(lambda: vae_bands.decode(vae, latents)) <= 1.35 * of_tensors


def test_the_pipeline_decodes_in_bands_where_memory_is_short(monkeypatch):
    pipe = ZImagePipeline.from_pretrained(NANO)
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    calls = []
    decode = vae_bands.decode
    monkeypatch.setattr(vae_bands, "decode", lambda *arguments: calls.append(1) or decode(*arguments))
    plain = pipe.decode(latents)
    assert calls == []
    for free, expected in ((2**40, 0), (None, 0), (2**20, 2)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert (pipe.decode(latents) - plain).abs().max() <= 1e-5
        assert len(calls) == expected


def test_a_cpu_decodes_in_bands_what_is_more_than_one(monkeypatch):
    """There they are faster (benchmarks/RESULTS.md), so memory doesn't matter."""
    pipe = ZImagePipeline.from_pretrained(NANO)
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    widest = max(pipe.vae.config.block_out_channels[:2]) * 128 * 128 * 4
    cpu, plain = torch.device("cpu"), pipe.decode(latents)
    monkeypatch.setattr(vae_bands, "WORKSPACE", widest)
    assert not vae_bands.faster(pipe.vae, 128, 128, cpu, torch.float32)
    monkeypatch.setattr(vae_bands, "WORKSPACE", widest - 1)
    assert vae_bands.faster(pipe.vae, 128, 128, cpu, torch.float32)
    assert not vae_bands.faster(pipe.vae, 128, 128, cpu, torch.bfloat16)
    assert not vae_bands.faster(pipe.vae, 128, 128, torch.device("cuda"), torch.float32)
    calls = []
    decode = vae_bands.decode
    monkeypatch.setattr(vae_bands, "decode", lambda *arguments: calls.append(1) or decode(*arguments))
    assert (pipe.decode(latents) - plain).abs().max() <= 1e-5
    assert calls == [1]
    pipe.vae.decoder.conv_in.padding_mode = "circular"  # what reaches beyond its neighbors can't be cut into bands
    assert (pipe.decode(latents) - plain).abs().max() > 1e-3
    assert calls == [1]


def test_free_memory_is_what_the_system_tells():
    free = memory.free_bytes(torch.device("cpu"))
    if not Path("/proc/meminfo").exists():
        assert free is None
    else:
        assert 2**20 < free < 2**50


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The operations that CUDA tensors go through, on the CPU."""
    monkeypatch.setattr(vae_bands, "_casts_within_kernels", lambda device: True)
    monkeypatch.setattr(vae_bands, "_laid_out", lambda x: x)
    made = vae_bands._Bands.__init__

    def on_a_device(self, *arguments):
        made(self, *arguments)
        self._in_main_memory = False

    monkeypatch.setattr(vae_bands._Bands, "__init__", on_a_device)


@pytest.mark.parametrize("rows", [6, 20, 64])
def test_what_a_gpu_computes_equals_the_plain_one(vae, as_on_a_gpu, rows):
    latents = torch.randn(1, 16, 9, 7, generator=torch.Generator().manual_seed(1)) * 2
    image = torch.rand(1, 3, 72, 56, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert (vae_bands.decode(vae, latents, rows) - vae.decode(latents)).abs().max() <= 2e-5
    assert (vae_bands.encode(vae, image, rows) - vae.encode(image)).abs().max() <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_on_a_gpu_are_no_further_from_float32_than_plain(vae, as_on_a_gpu, dtype):
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    half = copy.deepcopy(vae).to(dtype)
    exact = copy.deepcopy(half).float().decode(latents)
    ours = (vae_bands.decode(half, latents.to(dtype), 20).float() - exact).norm()
    assert 0 < ours <= 1.1 * (half.decode(latents.to(dtype)).float() - exact).norm()


def test_statistics_on_a_gpu_keep_their_digits(as_on_a_gpu):
    x = 1000 + 0.01 * torch.randn(1, 16, 64, 8, generator=torch.Generator().manual_seed(0))
    bands = vae_bands._Bands(10, None, CPU)
    mean, variance = bands.statistics(GroupNorm(4, 16), vae_bands.Stored(list(x.split(10, dim=2))))
    groups = x.double().view(4, -1)
    assert mean.dtype == variance.dtype == torch.float32
    assert torch.allclose(mean.double(), groups.mean(1), rtol=2e-7, atol=0)
    assert torch.allclose(variance.double(), groups.var(1, correction=0), rtol=2e-2, atol=0)  # 0.01 is 160 spacings


class Traffic(TorchDispatchMode):
    """Bytes that kernels read and write, and the calls for which a CPU waits or which cross the bus."""

    VIEWS = frozenset(
        "flatten unflatten view _unsafe_view alias as_strided slice select narrow transpose permute t expand unsqueeze "
        "squeeze split split_with_sizes unbind chunk detach empty empty_like empty_strided new_empty lift_fresh "
        "device".split()
    )
    WAITS = frozenset("_local_scalar_dense item is_nonzero nonzero equal".split())

    def __init__(self):
        super().__init__()
        self.bytes, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if {tensor.device.type for tensor in written + read} - {"cuda"} or name in self.WAITS:
            self.waits.append(name)
        if "out" in (kwargs or {}):
            read = [tensor for tensor in read if tensor is not kwargs["out"]]
        if name not in self.VIEWS:
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in written + read)
        return out


@pytest.mark.parametrize("call", ["decode", "encode"])
def test_bands_on_a_gpu_wait_for_nothing_and_move_little_more_than_plain(call):
    """At 1024x1024 and the published size, on tensors that say they are a GPU's and hold nothing."""
    with torch.no_grad(), FakeTensorMode():
        vae = AutoencoderKL(VAEConfig.from_dict(PUBLISHED["vae"], "here"), device="cuda", dtype=torch.bfloat16)
        shape = (1, 16, 128, 128) if call == "decode" else (1, 3, 1024, 1024)
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        with Traffic() as plain:
            getattr(vae, call)(x)
        with Traffic() as in_bands:
            out = getattr(vae_bands, call)(vae, x)
        with Traffic() as seen:
            x.cpu()
            torch.ones(1).to(device="cuda")  # a value that is asked for is an error of the mode itself
    assert out.device.type == "cuda"
    assert plain.waits == in_bands.waits == []
    assert len(seen.waits) >= 2
    assert plain.bytes < in_bands.bytes <= 1.35 * plain.bytes


def test_bands_are_as_high_as_memory_allows():
    vae = random_vae(TINY)
    row, maps = 16 * 1024 * 4, 2 * 8 * 1024 * 1024 * 4  # of the widest, and what is kept
    for rows in (8, 96, 512):
        free = maps + rows * row * vae_bands.BAND_MAPS
        assert vae_bands.rows_that_fit(vae, 1024, 1024, 4, free) == rows
        assert vae_bands.rows_that_fit(vae, 1024, 1024, 4, free - 1) == max(8, rows - 1)
    assert vae_bands.rows_that_fit(vae, 1024, 1024, 4, 0) == vae_bands.LEAST_ROWS
