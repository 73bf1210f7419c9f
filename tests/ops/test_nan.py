"""NaN and infinity go through every op: where the reference is NaN, so is the kernel's output, in all sizes; and what a
masked token holds reaches no result that it does not reach in the reference, forward and backward.

Kernels may be NaN where the reference is not in a log-sum-exp that is infinite, and where a token that is attended to is
not finite, beyond the channel that is not.
"""

import math

import pytest
import torch
from support import grid_inputs, needs_extension

from perceiver_fast import ops, reference
from perceiver_fast.ops import blocks
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.reference.softmax import EMPTY_LSE

pytestmark = pytest.mark.skipif(**needs_extension)
VALUES = float("nan"), float("inf"), -float("inf")
LARGE = 1e19, 1e38, 3e38, *VALUES


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


def gradients(outputs, inputs):
    """By all inputs, of all outputs that have a gradient; None counts as zero."""
    outputs = [o for o in outputs if o is not None and o.requires_grad]
    found = torch.autograd.grad(outputs, inputs, [torch.full_like(o, 0.5) for o in outputs], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs)]


def check_masked(function, plain, inputs, tokens_of, mask, in_all=False):
    """No result of ``function`` is worse than that of ``plain`` when one masked token holds something.

    Args:
        function, plain: from the inputs to outputs, which are compared as far as both have them.
        inputs: tensors.
        tokens_of: from an input to its ``[B, M, ..]``, or None where it has no tokens.
        mask: bool ``[B, M]``. The first element is all masked.
        in_all: let all masked tokens of an element hold it.
    """
    for which, t in enumerate(inputs):
        if tokens_of(t) is None:
            continue
        for value in (1e19, 1e30, *VALUES) if in_all else LARGE:  # a sum of all is not to overflow
            for b in range(mask.shape[0]):
                changed = [x.clone() for x in inputs]
                masked = (~mask[b]).nonzero().flatten()
                rows = tokens_of(changed[which])[b]
                for m in masked if in_all else masked[masked.numel() // 2 :][:1]:
                    (rows[m] if rows.dim() == 1 else rows[m][..., -1]).fill_(value)
                leaves = [x.requires_grad_() for x in changed]
                actual, expected = function(*leaves), plain(*leaves)
                where = which, value, b
                for a, e in zip(actual, expected):
                    if a is not None:
                        assert torch.equal(a.isfinite(), e.isfinite()), where
                        there = e.isfinite()
                        torch.testing.assert_close(a[there], e[there], rtol=1e-4, atol=1e-5, check_dtype=False)
                grads = gradients(actual, leaves), gradients(expected, leaves)
                for name, (a, e) in enumerate(zip(*grads)):
                    worse = e.isfinite() & ~a.isfinite()
                    if name == 0 and not expected[0][b].isfinite().all():
                        worse[b] = False  # queries whose results are not finite have gradients that are not
                    assert not worse.any(), (*where, "gradient", name)


def random_mask(tokens):
    mask = torch.rand(3, tokens) > 0.4
    mask[0], mask[1:, 0], mask[1:, -1] = False, True, False
    return mask


@pytest.mark.parametrize("in_all", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("form", ["kernel", "blocks"])
def test_masked_tokens_of_cross_attention(form, inverted, in_all):
    for queries, tokens in ((5, 7), (33, 150)):
        mask = random_mask(tokens)
        inputs = [torch.randn(3, 2, n, 4) for n in (queries, tokens, tokens)]

        def function(q, k, v, mask=mask):
            if form == "blocks":
                return blocks.cross_attention(q, k, v, mask, 0.5, 0.0, None, inverted, size=3)[: 1 if inverted else 2]
            if inverted:
                return (ops.cross_attention(q, k, v, mask, inverted=True, scale=0.5),)
            return ops.cross_attention(q, k, v, mask, scale=0.5, return_lse=True)

        def plain(q, k, v, mask=mask):
            return reference.cross_attention(q, k, v, mask, 0.5, inverted=inverted)

        def tokens_of(t, tokens=tokens):
            return t.transpose(1, 2) if t.shape[2] == tokens else None

        check_masked(function, plain, inputs, tokens_of, mask, in_all)


@pytest.mark.parametrize("in_all", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("form", ["kernel", "blocks"])
def test_masked_tokens_of_grid_attention(form, inverted, in_all):
    for queries, sizes, features in ((5, (7,), 1), (33, (4, 33), 3), (6, (2, 3, 5), 6)):
        heads = 2 if inverted else 1
        q, feat, scale, _ = grid_inputs(3, heads * queries, features, sizes, torch.float32)
        mask = random_mask(scale[0].numel())
        on_grid = mask.unflatten(1, sizes)

        def function(q, feat, scale, mask=on_grid, heads=heads):
            if form == "kernel":
                o, lse, _ = grid_attention_unchecked(q, feat, scale, mask, inverted=inverted, heads=heads)
            else:
                shape = q.shape
                q = q.unflatten(1, (heads, -1)).flatten(0, 1)
                o, lse, _ = blocks.grid_attention(q, feat, scale, mask, 0.0, None, inverted, size=3)
                o = o.view(shape)
            return (o,) if inverted else (o, lse)

        def plain(q, feat, scale, mask=on_grid, heads=heads):
            shape = q.shape
            q = q.unflatten(1, (heads, -1)).flatten(0, 1)
            o, lse, _ = reference.grid_attention(q, feat, scale, mask, inverted=inverted)
            return o.view(shape), lse

        def tokens_of(t, sizes=sizes):
            return t.flatten(1, len(sizes)) if t.shape[1 : 1 + len(sizes)] == sizes else None

        check_masked(function, plain, [q, feat, scale], tokens_of, mask, in_all)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_without_any_token(dtype):
    """Their log-sum-exp is one number, in every dtype, by kernels, blocks and the reference; inverted, they are zero."""
    mask = torch.tensor([[False] * 6, [True] * 6])
    q, k, v = (torch.randn(2, 2, n, 4, dtype=dtype) for n in (3, 6, 6))
    compute = dtype if dtype == torch.float64 else torch.float32
    found = {
        "kernel": ops.cross_attention(q, k, v, mask, return_lse=True),
        "reference": reference.cross_attention(q, k, v, mask),
        "blocks": blocks.cross_attention(
            q.to(compute), k.to(compute), v.to(compute), mask, 0.5, 0.0, None, False, size=2
        ),
        "raw": torch.ops.perceiver_fast.cross_attention_forward(
            q.to(compute), k.to(compute), v.to(compute), mask, 0.5, 0.0, None, False
        ),
    }
    on_grid, feat, scale = (
        torch.randn(2, 3, 2 + 6, dtype=dtype),
        torch.randn(2, 6, 2, dtype=dtype),
        torch.ones(2, 6, dtype=dtype),
    )
    grid = {
        "kernel": grid_attention_unchecked(on_grid, feat, scale, mask),
        "reference": reference.grid_attention(on_grid, feat, scale, mask),
        "blocks": blocks.grid_attention(
            on_grid.to(compute), feat.to(compute), scale.to(compute), mask, 0.0, None, False, size=2
        ),
    }
    for name, (o, lse, *_) in (*found.items(), *((f"grid {name}", values) for name, values in grid.items())):
        assert lse.dtype == torch.float64 and (lse[0] == EMPTY_LSE).all() and (lse[1].abs() < 100).all(), name
        assert o.isfinite().all(), name
    for name, (o, *_) in found.items():
        torch.testing.assert_close(
            o[0], v[0].mean(1, keepdim=True).expand_as(o[0]), rtol=1e-2, atol=1e-2, check_dtype=False
        )
    for o, lse in (
        reference.cross_attention(q, k, v, mask, inverted=True),
        reference.grid_attention(on_grid, feat, scale, mask, inverted=True)[:2],
        grid_attention_unchecked(on_grid, feat, scale, mask, inverted=True)[:2],
    ):
        assert (o[0] == 0).all() and o.isfinite().all() and (lse[0] < math.log(1e-30)).all() and lse.isfinite().all()
    assert (ops.cross_attention(q, k, v, mask, inverted=True)[0] == 0).all()
