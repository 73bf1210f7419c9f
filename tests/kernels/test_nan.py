"""What a masked token holds, however large or not finite, reaches no result of a Triton kernel that it does not reach in
the reference. (Grid attention's kernels do not read it at all, so that they may be finite where the reference is NaN.)
"""

import pytest
import torch

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.ops.cross_attention import cross_attention
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.reference.softmax import EMPTY_LSE

VALUES = 3e38, float("inf"), float("nan")


def with_gradients(function, inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    o, lse = function(*leaves)[:2]
    grads = torch.autograd.grad(
        [o, lse], leaves, [torch.full_like(o, 0.5), torch.full_like(lse, 0.5)], allow_unused=True
    )
    return o, lse, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves))


def check(function, plain, inputs, where):
    with pf.use_backend("triton"):
        actual = with_gradients(function, inputs)
    expected = with_gradients(plain, inputs)
    assert not torch.equal(actual[0], torch.zeros_like(actual[0]))
    for i, (a, e) in enumerate(zip(actual, expected)):
        there = e.isfinite()
        if i == 2 and not expected[0].isfinite().all():
            continue  # queries whose results are not finite have gradients that are not
        assert a[there].isfinite().all(), (where, i)
        if expected[0].isfinite().all():
            torch.testing.assert_close(a[there], e[there], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_cross_attention(value, inverted, device):
    def mine(*tensors):
        if not inverted:
            return cross_attention(*tensors, mask, return_lse=True)
        o = cross_attention(*tensors, mask, inverted=True)
        return o, o.double()  # it has no log-sum-exp

    def plain(*tensors):
        o, lse = reference.cross_attention(*tensors, mask, inverted=inverted)
        return o, o.double() if inverted else lse

    mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    mask[:, 5::7] = False
    for which in (1, 2):
        inputs = [torch.randn(2, 1, n, 8, device=device) for n in (6, 20, 20)]
        inputs[which][1, 0, 5, 3] = value
        check(mine, plain, inputs, (which, value))


@pytest.mark.parametrize("features", [3, 12])
@pytest.mark.parametrize("value", VALUES)
def test_grid_attention(value, features, device):
    mask = torch.ones(2, 3, 9, dtype=torch.bool, device=device)
    mask[:, 2, 5:7] = False
    for which in (1, 2):
        inputs = [torch.randn(2, 6, features + 12), torch.randn(2, 3, 9, features), torch.rand(2, 3, 9) + 0.5]
        inputs = [t.to(device) for t in inputs]
        inputs[which][1, 2, 5] = value
        check(
            lambda *t: grid_attention_unchecked(*t, mask), lambda *t: reference.grid_attention(*t, mask), inputs, value
        )


def test_rows_without_any_token(device):
    mask = torch.zeros(2, 6, dtype=torch.bool, device=device)
    mask[1] = True
    q, k, v = (torch.randn(2, 1, n, 4, device=device) for n in (3, 6, 6))
    with pf.use_backend("triton"):
        results = [cross_attention(q, k, v, mask, return_lse=True)]
        results.append(
            grid_attention_unchecked(q[:, 0].repeat(1, 1, 2), k[:, 0, :, :2], torch.ones_like(k[:, 0, :, 0]), mask)
        )
    for o, lse, *_ in results:
        assert (lse[0] == EMPTY_LSE).all() and (lse[1].abs() < 100).all() and o.isfinite().all()
