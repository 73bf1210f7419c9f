"""NaN and infinity go through every op: where the reference is NaN, so is the kernel's output, in all sizes.

Kernels may be NaN where the reference is not: where a masked token is not finite (its weight is zero, and its values
spoil the reference's output, too), and in a log-sum-exp that is infinite.
"""

import pytest
import torch
from support import grid_inputs, needs_extension

from perceiver_fast import ops, reference
from perceiver_fast.ops.grid_attention import grid_attention_unchecked

pytestmark = pytest.mark.skipif(**needs_extension)
VALUES = float("nan"), float("inf"), -float("inf")


def hidden(actual, expected):
    return bool((expected.isnan() & ~actual.isnan()).any())


def spoiled(inputs):
    """The inputs, with one element of one of them not finite."""
    for i, t in enumerate(inputs):
        for value in VALUES:
            for at in {0, t.numel() // 2, t.numel() - 1}:
                copies = [x.clone() for x in inputs]
                copies[i].view(-1)[at] = value
                yield (i, value, at), copies


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_attention(dtype, inverted):
    for queries in (1, 5, 33):
        for tokens in (1, 2, 7, 17, 130):
            shapes = (2, 1, queries, 4), (2, 1, tokens, 4), (2, 1, tokens, 4)
            for masked in (False, True):
                mask = torch.rand(2, tokens) > 0.5 if masked else None
                if masked:
                    mask[0], mask[1, 0] = False, True
                for where, (q, k, v) in spoiled([torch.randn(s, dtype=dtype) for s in shapes]):
                    actual = ops.cross_attention(q, k, v, mask, inverted=inverted)
                    expected, _ = reference.cross_attention(q, k, v, mask, inverted=inverted)
                    assert not hidden(actual, expected), (where, queries, tokens, masked)
                    if not masked and not inverted:
                        assert torch.equal(actual.isnan(), expected.isnan()), (where, queries, tokens)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_attention(dtype, inverted):
    for queries in (2, 5, 33):
        for sizes in ((1,), (7,), (17,), (3, 4), (4, 33), (2, 3, 5)):
            for masked in (False, True):
                q, feat, scale, mask = grid_inputs(2, queries, 3, sizes, dtype, masked)
                for where, inputs in spoiled([q, feat, scale]):
                    actual, lse, _ = grid_attention_unchecked(*inputs, mask, inverted=inverted)
                    expected, expected_lse, _ = reference.grid_attention(*inputs, mask, inverted=inverted)
                    assert not hidden(actual, expected), (where, queries, sizes, masked)
                    assert inverted or not hidden(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_others(dtype):
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype)

    def encoded(feat, coords, weight, bias):
        frequencies = torch.linspace(1, 2, 2, dtype=torch.float64).expand(2, 2)
        return reference.fourier_projection(feat, coords.double(), frequencies, weight, bias, 1e-5)

    options = dict(num_freq_bands=2, max_freq=4.0, norm_eps=1e-5)
    pairs = [
        (ops.geglu, reference.geglu, (randn(3, 38), randn(38))),
        (ops.add_layer_norm, lambda *a: reference.add_layer_norm(*a, 1e-5, dtype), (randn(5, 19), randn(5, 19), *randn(3, 19))),
        (lambda *a: ops.grid_scale(*a, [3, 2]), lambda *a: reference.grid_scale(*a, [3, 2], 1e-5), (randn(2, 4, 5, 3), randn(9), randn(9).exp())),
        (lambda f, c, w, b: ops.fourier_projection(c, w, feat=f, bias=b, **options), encoded, (randn(2, 17, 3), randn(2, 17, 2), randn(13, 20), randn(20))),
    ]  # fmt: skip
    for function, plain, inputs in pairs:
        for where, given in spoiled(list(inputs)):
            actual, expected = function(*given), plain(*given)
            actual, expected = (t if isinstance(t, tuple) else (t,) for t in (actual, expected))
            assert not any(hidden(a, e) for a, e in zip(actual, expected)), (function, where)
