"""A token that is huge or not finite, masked or not, on every way of a cross-attention: where perceiver-pytorch's results
and gradients are finite, ours are, and its outputs that are not finite are not hidden.
"""

from contextlib import contextmanager

import perceiver_pytorch.perceiver_pytorch as original
import pytest
import torch
from support import needs_extension

import perceiver_fast as pf
from perceiver_fast.layers import Attention, PreNorm, axis_codes, small
from perceiver_fast.layers import cross_attention as module
from perceiver_fast.tokens import DenseTokens, GridTokens, PointTokens, TokenGroups

SIZES, FEATURES, CHANNELS = (7, 6), 3, 29
TOKENS, AT = 42, 10  # how many there are, and which one holds the value
VALUES = 1e10, 1e19, 1e38, 3e38, float("inf"), float("nan")
WAYS = [("grid", "grid"), ("grid", "projected"), ("points", "projected"), ("dense", "absorbed"), ("dense", "projected")]
WAYS += [(kind, "projected in one op") for kind in ("grid", "points", "dense")]
WAYS = [(*way, inverted) for way in WAYS for inverted in (False, True)]
WAYS += [("groups", "absorbed", False), ("groups", "projected", False)]  # which have no inverted attention


def codes():
    return tuple(axis_codes(size, 6, 10.0, torch.float32, torch.device("cpu")) for size in SIZES)


def described(kind, feat, mask):
    """The same tokens in each way of describing them, and the mask that goes beside them."""
    grid = GridTokens(feat.unflatten(1, SIZES), codes())
    if kind == "grid":
        return grid, mask
    if kind == "points":
        positions = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in SIZES]
        coords = torch.stack(torch.meshgrid(*positions, indexing="ij"), -1).view(1, TOKENS, 2)
        frequencies = torch.linspace(1, 5, 6, dtype=torch.float64).expand(2, 6).contiguous()
        return PointTokens(feat, coords, frequencies), mask
    tokens = grid.materialize()
    if kind == "dense":
        return DenseTokens(tokens), mask
    masks = None if mask is None else mask.split([20, TOKENS - 20], 1)
    return TokenGroups([DenseTokens(part) for part in tokens.split([20, TOKENS - 20], 1)], masks), None


@contextmanager
def way_taken(path, monkeypatch):
    plan, path, in_one = module.plan_cross_attention, path.removesuffix(" in one op"), path.endswith(" in one op")
    with monkeypatch.context() as patch:
        if not in_one:
            patch.setattr(small, "are_few", lambda latents, channels: False)
        patch.setattr(module, "plan_cross_attention", lambda t, call: type(plan(t, call))(path, plan(t, call).taken))
        yield


def results(layer, x, context, mask, inverted, feat):
    out = layer(x, context=context, mask=mask, inverted_attention=inverted)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    names, leaves = zip(*layer.named_parameters())
    grads = torch.autograd.grad((out * weight).sum(), [feat, *leaves], allow_unused=True)
    return {"out": out.detach()} | {name: g for name, g in zip(("feat", *names), grads) if g is not None}


@pytest.mark.parametrize("backend", [pytest.param("auto", marks=pytest.mark.skipif(**needs_extension)), "reference"])
@pytest.mark.parametrize("kind,path,inverted", WAYS)
def test_one_token(kind, path, inverted, backend, monkeypatch):
    theirs = original.PreNorm(16, original.Attention(16, CHANNELS, heads=2, dim_head=5), context_dim=CHANNELS)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = PreNorm(16, Attention(16, CHANNELS, 2, 5), context_dim=CHANNELS)
    ours.load_state_dict(theirs.state_dict())
    x, visible = torch.randn(2, 9, 16), torch.rand(2, TOKENS) > 0.3
    for value in VALUES:
        for masked in (None, False, True):
            mask = None if masked is None else visible.clone()
            if masked is not None:
                mask[0, AT] = not masked
            feat = torch.randn(2, TOKENS, FEATURES)
            feat[0, AT, 1] = value
            feat.requires_grad_()
            context = GridTokens(feat.unflatten(1, SIZES), codes()).materialize()
            expected = results(theirs, x, context, mask, inverted, feat)
            with way_taken(path, monkeypatch), pf.use_backend(backend):
                actual = results(ours, x, *described(kind, feat, mask), inverted, feat)
            whole = max(e[e.isfinite()].norm() for e in expected.values())
            for name, e in expected.items():
                where, a, there = (value, masked, name), actual[name], e.isfinite()
                assert a[there].isfinite().all(), where
                assert (there | ~a.isfinite()).all() or name != "out", where
                assert (a - e)[there].norm() <= 1e-3 * e[there].norm() + 1e-5 * whole, where
