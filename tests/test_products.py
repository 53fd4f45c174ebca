"""Matmuls on a CPU: every way that a processor may choose, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zimage_core.backends import matmul

FLOAT8 = torch.float8_e4m3fn
DTYPES = [  # (of activations, of the weight, largest ||error|| / ||result|| beside the rounding of the inputs)
    (torch.float32, torch.float32, 1e-6),
    (torch.float32, torch.bfloat16, 1e-6),
    (torch.float32, torch.float16, 1e-6),
    (torch.float32, FLOAT8, 1e-6),
    (torch.bfloat16, torch.bfloat16, 2**-8),
    (torch.float16, torch.float16, 2**-11),
    (torch.bfloat16, torch.float32, 2**-7),  # the weight is rounded, too
    (torch.float64, torch.float64, 1e-14),
]
SHAPES = [((70,), 1040, 1100), ((2, 5), 3000, 700), ((5,), 1024, 1030), ((3,), 16, 24)]  # the last one is small
PROCESSORS = {"as it is": {}, "no short products": {"_supports": False}, "AMD": {"_onednn_is_faster": True}}
PROCESSORS["Intel"] = {"_onednn_is_faster": False, "_supports": True}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch) -> str:
    if PROCESSORS[request.param].get("_onednn_is_faster") and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch comes without oneDNN")
    for name, answer in PROCESSORS[request.param].items():
        monkeypatch.setattr(matmul, name, lambda *_, answer=answer: answer)
    return request.param


def tensors(shape, width, rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, width, generator=generator)
    return x, torch.randn(rows, width, generator=generator) / width**0.5, torch.randn(rows, generator=generator)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@torch.no_grad()
def test_equals_float64(processor, dtypes, shape, biased):
    x, weight, bias = tensors(*shape)
    x, weight, bias = x.to(dtypes[0]), weight.to(dtypes[1]), bias.to(dtypes[0]) if biased else None
    result = matmul.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert result.dtype == x.dtype and result.shape == exact.shape
    assert (result.double() - exact).norm() / exact.norm() <= dtypes[2]


@torch.no_grad()
def test_short_products_are_float32s_where_the_processor_has_none(monkeypatch):
    """Nearer to the exact result than any sum in bfloat16 could be: rounded once."""
    x, weight, _ = tensors(*SHAPES[0])
    x, weight = x.bfloat16(), weight.bfloat16()
    called = []
    panels = matmul._in_panels
    monkeypatch.setattr(matmul, "_in_panels", lambda *given: called.append(given) or panels(*given))
    monkeypatch.setattr(matmul, "_supports", lambda _: False)
    once = F.linear(x.double(), weight.double()).bfloat16()
    result = matmul.linear(x, weight)
    assert len(called) == 1
    assert (result != once).float().mean() < 0.02  # sums that fall between two values of bfloat16
    monkeypatch.setattr(matmul, "_supports", lambda _: True)
    matmul.linear(x, weight)
    assert len(called) == 1


def test_panels_cover_every_row_once(monkeypatch):
    """Also where the last one is short, and where a single row is more than a panel."""
    monkeypatch.setattr(matmul, "PANEL", 100)
    monkeypatch.setattr(matmul, "WHOLE", 1)
    x, weight, bias = tensors((4,), 30, 11)
    with torch.no_grad():
        for width in (30, 7):
            result = matmul._in_panels(x[:, :width], weight[:, :width].bfloat16(), bias)
            exact = F.linear(x[:, :width], weight[:, :width].bfloat16().float(), bias)
            torch.testing.assert_close(result, exact)


def test_gradients_go_torchs_way(processor):
    x, weight, bias = tensors(*SHAPES[0])
    layer = matmul.Linear(1040, 1100)
    layer.weight.data, layer.bias.data = weight, bias
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand_as(weight), rtol=1e-4, atol=1e-4)


def test_inside_torch_compile_torchs_own_is_used(monkeypatch):
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: pytest.fail("asked while compiling"))
    x, weight, _ = tensors(*SHAPES[0])
    with torch.no_grad():
        compiled = torch.compile(matmul.linear, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))


def test_few_multiplications_are_not_worth_a_question(monkeypatch):
    monkeypatch.setattr(matmul, "_is_ours", lambda *_: pytest.fail("asked"))
    x, weight, _ = tensors(*SHAPES[3])
    torch.testing.assert_close(matmul.linear(x, weight.bfloat16()), F.linear(x, weight.bfloat16().float()))


@pytest.mark.parametrize(
    ("told", "expected"), [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False)]
)
def test_onednn_is_chosen_by_the_maker(monkeypatch, told, expected):
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        pytest.skip("this torch has no choice")
    monkeypatch.setattr(matmul, "_processor", lambda: told)
    assert matmul._onednn_is_faster.__wrapped__() is expected
