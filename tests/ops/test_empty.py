"""Batches of nothing, and tensors without content: every op gives shapes, forward and backward."""

import pytest
import torch
from support import needs_extension

from perceiver_fast import ops
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.ops.grid_query_attention import grid_query_attention_unchecked

pytestmark = pytest.mark.skipif(**needs_extension)


def cross(batch, **options):
    mask = torch.ones(batch, 7, dtype=torch.bool) if options.pop("masked", False) else None
    shapes = (batch, 2, 3, 4), (batch, 2, 7, 4), (batch, 2, 7, 5)
    return (
        lambda q, k, v: ops.cross_attention(q, k, v, None if mask is None else mask.to(q.device), **options)
    ), shapes


def grid(batch, heads=1, **options):
    mask = torch.ones(batch, 2, 4, dtype=torch.bool) if options.pop("masked", False) else None

    def run(q, feat, scale):
        return grid_attention_unchecked(
            q, feat, scale, None if mask is None else mask.to(q.device), heads=heads, **options
        )

    return run, ((batch, 3 * heads, 2 + 6), (batch, 2, 4, 2), (batch, 2, 4))


def grid_queries(batch, **options):
    mask = torch.ones(batch, 5, dtype=torch.bool) if options.pop("masked", False) else None

    def run(tables, feat, v, scale, bias):
        return grid_query_attention_unchecked(
            tables, feat, v, scale, bias, None if mask is None else mask.to(tables.device), **options
        )

    return run, ((batch, 2, 5, 8), (batch, 2, 4, 2), (batch, 2, 5, 3), (batch, 2, 4), (batch, 2, 5))


def add_norm(x, branch, branch_bias, weight, bias):
    return ops.add_layer_norm(x, branch, branch_bias, weight, bias)


def projection(feat, weight, bias):
    coords = torch.zeros(6, 1, device=feat.device)
    return ops.fourier_projection(coords, weight, feat=feat, bias=bias, num_freq_bands=2, max_freq=4.0, norm_eps=1e-5)


def projection_on_grid(feat, weight, bias):
    return ops.fourier_projection((2, 3), weight, feat=feat, bias=bias, num_freq_bands=2, max_freq=4.0, norm_eps=1e-5)


CASES = {
    "cross_attention": lambda b: cross(b),
    "cross_attention masked": lambda b: cross(b, masked=True, return_lse=True),
    "cross_attention dropout": lambda b: cross(b, masked=True, dropout=0.5),
    "cross_attention inverted": lambda b: cross(b, masked=True, inverted=True),
    "grid_attention": lambda b: grid(b),
    "grid_attention masked": lambda b: grid(b, masked=True, dropout=0.5),
    "grid_attention inverted": lambda b: grid(b, heads=2, inverted=True, masked=True),
    "grid_query_attention": lambda b: grid_queries(b),
    "grid_query_attention options": lambda b: grid_queries(b, masked=True, dropout=0.5, sum_heads=True),
    "geglu": lambda b: (ops.geglu, ((b, 3, 4), (4,))),
    "feed_forward": lambda b: (ops.feed_forward, ((b, 3, 2), (8, 2), (8,), (2, 4))),
    "linear": lambda b: (ops.linear, ((b, 2, 3), (4, 3), (4,))),
    "layer_norm": lambda b: (ops.layer_norm, ((b, 3, 4), (4,), (4,))),
    "add_layer_norm": lambda b: (add_norm, ((b, 3, 4), (b, 3, 4), (4,), (4,), (4,))),
    "grid_scale": lambda b: (lambda f, m, s: ops.grid_scale(f, m, s, [3, 2]), ((b, 2, 3, 2), (5,), (5,))),
    "fourier_projection": lambda b: (projection, ((b, 6, 2), (7, 3), (3,))),
    "fourier_projection on a grid": lambda b: (projection_on_grid, ((b, 6, 2), (12, 3), (3,))),
}


def outputs(function, leaves):
    out = function(*leaves)
    return [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]


@pytest.mark.parametrize("name", CASES)
def test_empty_batch(name):
    function, shapes = CASES[name](0)
    _, shapes_of_two = CASES[name](2)
    expected = [o.shape for o in outputs(CASES[name](2)[0], [torch.randn(s) for s in shapes_of_two])]
    leaves = [torch.randn(s, requires_grad=True) for s in shapes]
    for again in (False, True):
        outs = outputs(function, leaves)
        assert [o.shape[1:] for o in outs] == [s[1:] for s in expected] and all(o.shape[0] == 0 for o in outs)
        loss = sum(o.sum() for o in outs if o.requires_grad)
        grads = torch.autograd.grad(loss, leaves, create_graph=again, allow_unused=True)
        for leaf, grad in zip(leaves, grads):
            assert grad is None or (grad.shape == leaf.shape and (grad == 0).all())
        if again:
            twice = torch.autograd.grad(sum(g.sum() for g in grads if g is not None), leaves, allow_unused=True)
            assert all(t is None or (t == 0).all() for t in twice)
    with torch.no_grad():
        outputs(function, leaves)


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors_give_shapes(name):
    function, shapes = CASES[name](2)
    leaves = [torch.randn(s, requires_grad=True) for s in shapes]
    expected = outputs(function, leaves)
    on_meta = [leaf.detach().to("meta").requires_grad_() for leaf in leaves]
    found = outputs(function, on_meta)
    for a, b in zip(found, expected):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype
    grads = torch.autograd.grad(sum(o.sum() for o in found if o.requires_grad), on_meta, allow_unused=True)
    assert all(g is None or g.shape == leaf.shape for g, leaf in zip(grads, leaves))
