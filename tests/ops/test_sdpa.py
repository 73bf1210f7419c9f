"""torch's attention for the latents: the same numbers, derivatives of every order, and softmax's NaN."""

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from perceiver_fast.ops.sdpa import sdpa

NAN, INF = float("nan"), float("inf")


def plain(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def qkv(queries=5, tokens=5, dtype=torch.float64, grad=True):
    return tuple(randn(2, 3, n, 4, dtype=dtype).requires_grad_(grad) for n in (queries, tokens, tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_numbers_as_torch(dtype):
    q, k, v = qkv(9, 20, dtype)
    out, expected = sdpa(q, k, v, scale=0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert torch.equal(out, expected)
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v))):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(sdpa(q, k, v, scale=0.3), expected)


def test_derivatives():
    inputs = qkv(3, 6)
    assert gradcheck(sdpa, inputs, fast_mode=True)
    assert gradgradcheck(sdpa, inputs, fast_mode=True)
    mask = torch.rand(2, 6) > 0.3
    mask[:, 0] = True
    assert gradgradcheck(lambda *a: sdpa(*a, mask, scale=0.6), inputs, fast_mode=True)
    assert gradgradcheck(lambda q: sdpa(q, *(t.detach() for t in inputs[1:])), inputs[:1], fast_mode=True)


def test_derivatives_inside_checkpoint():
    inputs = qkv(3, 6)
    assert gradgradcheck(lambda *a: checkpoint(sdpa, *a, use_reentrant=False), inputs, fast_mode=True)


def test_transforms():
    q, k, v = (t.detach() for t in qkv())

    def loss(function):
        return lambda q: function(q, k, v).square().sum()

    assert relative_error(torch.func.hessian(loss(sdpa))(q), torch.func.hessian(loss(plain))(q)) < 1e-12
    found = torch.func.vmap(torch.func.grad(lambda q, k, v: sdpa(q, k, v).square().sum()), (1, 1, 1))(
        *(t.unsqueeze(2) for t in (q, k, v))
    )
    for head in range(3):
        q_head = q[:, head : head + 1].clone().requires_grad_()
        loss_head = sdpa(q_head, k[:, head : head + 1], v[:, head : head + 1]).square().sum()
        assert relative_error(found[head], torch.autograd.grad(loss_head, q_head)[0]) < 1e-12
    torch.func.vmap(lambda q: sdpa(q, k, v, dropout=0.5), randomness="different")(torch.stack([q, q]))


def test_dropout():
    q, k, v = qkv(40, 40)
    v = torch.ones_like(v)
    out = sdpa(q, k, v, dropout=0.5)
    assert (out - 1).abs().max() > 0.01 and abs(out.mean().item() - 1) < 0.1
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert torch.autograd.grad(first.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_never_hidden(dtype, grad):
    for queries in (1, 5, 40):
        for tokens in (1, 2, 7, 8, 15, 16, 17, 33, 100):
            for name in range(3):
                for value in (NAN, INF, -INF):
                    for everywhere in (False, True):
                        inputs = [t.detach() for t in qkv(queries, tokens, dtype, False)]
                        rows = inputs[name].shape[2]
                        inputs[name][1, 2, slice(None) if everywhere else rows // 2, 3] = value
                        expected = plain(
                            *(t.float() if dtype in (torch.bfloat16, torch.float16) else t for t in inputs)
                        )
                        out = sdpa(*(t.requires_grad_(grad) for t in inputs))
                        where = dtype, queries, tokens, name, value, everywhere
                        assert not (expected.isnan() & ~out.isnan()).any(), where
                        if dtype.itemsize > 2:
                            assert torch.equal(out.isnan(), expected.isnan()), where


def test_gradients_of_nan_are_nan():
    q, k, v = qkv(3, 3)
    with torch.no_grad():
        q[1, 1, 2, 0] = NAN
    dq, _, dv = torch.autograd.grad(sdpa(q, k, v).sum(), (q, k, v))
    assert dq[1, 1, 2].isnan().all() and dv[1, 1].isnan().all() and dq[0].isfinite().all()


def test_empty_batch():
    q, k, v = (t[:0].detach().requires_grad_() for t in qkv())
    out = sdpa(q, k, v)
    assert out.shape == q.shape and torch.autograd.grad(out.sum(), q, create_graph=True)[0].shape == q.shape
    assert sdpa(*(t.detach().to("meta") for t in qkv())).shape == (2, 3, 5, 4)
