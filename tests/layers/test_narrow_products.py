"""Products of matrices rounded to bfloat16: results and derivatives are those of the rounded factors."""

import torch
from support import relative_error

from perceiver_fast.layers.narrow_products import NarrowProduct


def rounded(t):
    return t.bfloat16().double()


def test_results_and_derivatives():
    x, y = torch.randn(2, 5, 40, requires_grad=True), torch.randn(2, 40, 7).bfloat16().requires_grad_()
    d_out = torch.randn(2, 5, 7, requires_grad=True)
    out = NarrowProduct.apply(x, y)
    assert out.dtype == torch.float32 and relative_error(out, rounded(x) @ rounded(y)) < 1e-6
    d_x, d_y = torch.autograd.grad(out, (x, y), d_out, create_graph=True)
    assert d_y.dtype == y.dtype and relative_error(d_x, rounded(d_out) @ rounded(y).mT) < 1e-6
    assert relative_error(d_y, rounded(x).mT @ rounded(d_out)) < 3e-3
    again = torch.randn_like(d_x)
    (of_d_x,) = torch.autograd.grad(d_x, d_out, again, retain_graph=True)
    assert relative_error(of_d_x, rounded(again) @ rounded(y)) < 1e-6


def test_gpus_have_the_product():
    """Its outputs without content, which are all that can be asked for without a GPU."""
    x, y = torch.empty(2, 5, 40, device="meta", requires_grad=True), torch.empty(2, 40, 7, device="meta")
    out = NarrowProduct.apply(x, y)
    assert out.shape == (2, 5, 7) and out.dtype == torch.float32
    assert torch.autograd.grad(out, x, torch.empty_like(out))[0].shape == x.shape
