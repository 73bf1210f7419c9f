"""Linear layers on every library against torch's in float64, and which library is taken."""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from warm_python import python

import perceiver_fast as pf
from perceiver_fast.layers import FeedForward
from perceiver_fast.ops import linear, linear_choice, linear_libraries
from perceiver_fast.ops.linear import LARGE, is_large, linear_library, product_dtype

MODULE = importlib.import_module("perceiver_fast.ops.linear")
NAMES = [name for name in linear_libraries.NAMES if name != "auto" and not linear_libraries.reasons(name)]
SHAPES = [((3, 100), 257, 300), ((1,), 1000, 1001), ((256,), 512, 512), ((5, 7), 8, 9)]


def operands(rows, channels, out_channels, dtype=torch.float64):
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight, bias = draw(*rows, channels), draw(out_channels, channels), draw(out_channels)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


def gradients(run, tensors):
    out = run(*tensors)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, d_out)]


@pytest.mark.parametrize("library", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, library, monkeypatch):
    monkeypatch.setattr(MODULE, "LARGE", 1)  # a small product is as good a test
    low = operands(*shape, dtype)
    high = [t.detach().double().requires_grad_() for t in low]
    want = gradients(F.linear, high)
    plain = gradients(F.linear, low)
    with pf.use_linear(library):
        got = gradients(linear, low)
    floor = {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 1e-3}[dtype]
    for mine, theirs, exact in zip(got, plain, want):
        assert mine.dtype == dtype and mine.shape == exact.shape
        assert relative_error(mine, exact) <= 2 * relative_error(theirs, exact) + floor


@pytest.mark.parametrize("library", NAMES)
def test_any_strides(library, monkeypatch):
    monkeypatch.setattr(MODULE, "LARGE", 1)
    wide, weight = torch.randn(7, 6, 40), torch.randn(9, 20)
    for x in (wide[..., 10:30], wide.transpose(0, 1)[..., ::2], torch.randn(20, 5).T, torch.randn(1, 20).expand(3, 20)):
        with torch.no_grad(), pf.use_linear(library):
            for w in (weight, torch.randn(20, 9).T):
                assert relative_error(linear(x, w), F.linear(x, w)) < 1e-6


def test_only_some_gradients():
    x, weight, _ = operands((256,), 512, 512, torch.float32)
    with pf.use_linear("auto"):
        for library in NAMES:
            with pf.use_linear(library):
                (dx,) = torch.autograd.grad(linear(x, weight.detach()).sum(), (x,))
                (dw,) = torch.autograd.grad(linear(x.detach(), weight).sum(), (weight,))  # an expanded gradient, too
    assert relative_error(dx, weight.sum(0).expand_as(x)) < 1e-5
    assert relative_error(dw, x.sum(0).expand_as(weight)) < 1e-5


@pytest.mark.skipif("onednn" not in NAMES, reason="no oneDNN: it did NOT run")
def test_float32_is_float32():
    """Also on CPUs with tiles for bfloat16: nothing is rounded to it unless torch's own setting says so."""
    x, weight, _ = (t.detach() for t in operands((256,), 512, 512, torch.float32))
    want = F.linear(x.double(), weight.double())
    with pf.use_linear("onednn"):
        assert relative_error(linear(x, weight), want) < 1e-6


def test_what_explain_says():
    cpu = torch.device("cpu")
    found = linear_library(256, 512, 4096, torch.float32, cpu)
    verdict = linear_choice.verdict("forward")
    assert found.op == "linear" and found.backend.startswith(f"{verdict.chosen} (") and verdict.how in found.backend
    assert set(found.rejected) == set(verdict.gflops) - {verdict.chosen}
    assert linear_library(2, 3, 4, torch.float32, cpu).backend == "torch"
    assert linear_library(256, 512, 4096, torch.float16, cpu).backend == "torch"
    with pf.use_linear("torch"):
        assert linear_library(256, 512, 4096, torch.float32, cpu).backend == "torch (torch is forced)"
        assert linear_library(256, 512, 4096, torch.bfloat16, cpu).backend == "torch (torch is forced)"


def test_products_under_autocast():
    x = torch.randn(256, 512)
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        wide = linear_choice.wide_bfloat16()
        assert product_dtype(x) == (torch.float32 if wide else torch.bfloat16)
        assert product_dtype(x[:1]) == torch.bfloat16 and product_dtype(x.double()) == torch.float64
        with pf.use_linear("torch"):
            assert product_dtype(x) == torch.bfloat16
        assert linear(x, torch.randn(512, 512)).dtype == torch.float32  # callers say the dtype


@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_no_rows_are_no_product(library):
    weight = torch.randn(1024, 1024, requires_grad=True)
    x = torch.randn(0, 1024, requires_grad=True)
    with pf.use_linear(library):
        out = linear(x, weight)
        grads = torch.autograd.grad(out.sum(), (x, weight))
        assert out.shape == (0, 1024) and grads[0].shape == x.shape and not grads[1].any()
        layer = FeedForward(256)
        layer(torch.randn(0, 4, 256)).sum().backward()
        assert not layer.net[0].weight.grad.any()


def test_when_it_matters():
    cpu = torch.device("cpu")
    assert is_large(256, 256, 256, cpu) and not is_large(256, 256, 255, cpu) and LARGE == 256**3
    assert is_large(1, 1024, 512, cpu) and not is_large(1, 1024, 511, cpu)  # a weight that takes as long to read
    assert not is_large(1000, 1000, 1000, torch.device("cuda"))
    with pf.use_backend("reference"):
        assert not is_large(256, 256, 256, cpu)


def test_bad_input_is_explained(monkeypatch):
    with pytest.raises(ValueError, match=r"expected x \[.., 5\] for weight \(3, 5\), got \(2, 4\)"):
        linear(torch.randn(2, 4), torch.randn(3, 5))
    with pytest.raises(ValueError, match="expected one of 'auto', 'torch', 'onednn', got 'blis'"):
        pf.use_linear("blis")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch was built without oneDNN; take 'auto'"):
        pf.use_linear("onednn")
    code = "import perceiver_fast"
    found = python("-c", code, env=os.environ | {"PERCEIVER_FAST_LINEAR": "blas"})
    assert "PERCEIVER_FAST_LINEAR: expected one of" in found.stderr
