"""Attention to keys and values that are projected piece by piece: the same as to all of them at once."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import perceiver_fast as pf
from perceiver_fast.layers import cross_attention_ways
from perceiver_fast.ops import blocks, projected_attention
from perceiver_fast.ops.library import learns
from perceiver_fast.ops.projected_attention import Projection, pieces, rows_of_pieces
from perceiver_fast.ops.projected_attention import projected_attention as attend
from perceiver_fast.tokens import dense

HEADS, DIM, QUERIES = 2, 4, 3

# Elements and tokens: several elements a piece, parts of elements, a last piece that is shorter.
SHAPES = {"elements": (7, 9), "parts": (2, 53), "one element": (1, 40)}


ROWS = 20  # tokens of a piece


def inputs(batch, tokens, dtype=torch.float64, shared=True, features=2, axes=1, bands=3):
    """Queries, and all that keys and values are made of, with gradients."""
    torch.manual_seed(0)
    channels = features + axes * (2 * bands + 1)
    q = torch.randn(batch, HEADS, QUERIES, DIM, dtype=dtype)
    feat = torch.randn(batch, tokens, features, dtype=dtype)
    coords = torch.rand(1 if shared else batch, tokens, axes, dtype=torch.float64) * 2 - 1
    frequencies = torch.linspace(1, 2, bands, dtype=torch.float64).expand(axes, bands).contiguous()
    weight = torch.randn(channels, 2 * HEADS * DIM, dtype=dtype)
    bias = torch.randn(2 * HEADS * DIM, dtype=dtype)
    leaves = [t.requires_grad_() for t in (q, feat, coords, weight, bias)]
    return leaves, frequencies


def in_pieces(leaves, frequencies, mask):
    q, feat, coords, weight, bias = leaves
    projection = Projection(feat, coords, frequencies, weight, bias, 1e-5, q.dtype)
    return attend(q, projection, ROWS, mask, 0.7, with_lse=True)


def at_once(leaves, frequencies, mask):
    """The differentiable form, which tests of its own hold against the reference."""
    q, feat, coords, weight, bias = leaves
    kv = blocks.fourier_projection(feat, coords, frequencies, weight, bias, 1e-5)
    k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in kv.chunk(2, -1))
    return blocks.cross_attention(q, k, v, mask, 0.7, 0.0, None, False)


def mask_of(batch, tokens):
    mask = torch.rand(batch, tokens) > 0.3
    mask[0] = False  # attends uniformly
    mask[-1] = torch.arange(tokens) == 4 if batch > 1 else mask[-1]
    return mask


@pytest.mark.parametrize("shape", SHAPES)
def test_all_tokens_once_and_in_order(shape):
    batch, tokens = SHAPES[shape]
    found = torch.zeros(batch, tokens)
    last = (0, -1)
    for piece in pieces(batch, tokens, ROWS):
        piece.of(found).add_(1)
        now = piece.elements.start, piece.tokens.start
        assert now > last
        last = now
        size = (piece.elements.stop - piece.elements.start) * (piece.tokens.stop - piece.tokens.start)
        assert 0 < size <= ROWS
    assert (found == 1).all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape, masked", [(shape, False) for shape in SHAPES] + [("elements", True)])
def test_values_and_gradients(shape, masked, shared):
    batch, tokens = SHAPES[shape]
    leaves, frequencies = inputs(batch, tokens, shared=shared)
    mask = mask_of(batch, tokens) if masked else None
    weights = torch.randn(batch, HEADS, QUERIES, DIM, dtype=torch.float64), torch.randn(batch, HEADS, QUERIES)

    def gradients(function):
        o, lse = function(leaves, frequencies, mask)
        kept_lse = lse.masked_fill(lse < -1e300, 0.0)  # of nobody
        return o, kept_lse, *torch.autograd.grad((o * weights[0]).sum() + (kept_lse * weights[1]).sum(), leaves)

    for found, wanted in zip(gradients(in_pieces), gradients(at_once), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", ["elements", "parts"])
def test_second_derivatives(shape):
    batch, tokens = SHAPES[shape]
    leaves, frequencies = inputs(batch, tokens)

    def second(function):
        o, _ = function(leaves, frequencies, None)
        first = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

    for found, wanted in zip(second(in_pieces), second(at_once), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_at_most_those_of_keys_and_values_at_once(dtype):
    """Averaged over draws; extreme logits too."""
    errors = [0.0, 0.0]
    for size in (1.0, 1.0, 30.0):
        leaves, frequencies = inputs(2, 200, torch.float32)
        leaves[0].data *= size
        exact, _ = at_once([t.detach().double() for t in leaves], frequencies, None)
        q, feat, coords, weight, bias = leaves
        projection = Projection(feat, coords, frequencies, weight, bias, 1e-5, dtype)
        mine, _ = attend(q.to(dtype), projection, ROWS, None, 0.7)
        k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in projection.keys_values().chunk(2, -1))
        theirs = torch.softmax(0.7 * q.to(dtype) @ k.transpose(-1, -2), -1) @ v
        assert mine.dtype == dtype
        errors = [e + float((o.detach().double() - exact).norm()) for e, o in zip(errors, (mine, theirs))]
    assert 0 < errors[0] <= 2 * errors[1]


def test_no_keys_and_values_are_saved():
    leaves, frequencies = inputs(1, 53)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        in_pieces(leaves, frequencies, None)
    assert saved and max(shape.numel() for shape in saved) < 53 * HEADS * DIM
    with torch.no_grad():
        o, _ = in_pieces(leaves, frequencies, None)
    assert not o.requires_grad


def test_threads_may_change_before_the_backward():
    leaves, frequencies = inputs(1, 40_000, torch.float32, bands=1)
    q, feat, coords, weight, bias = leaves
    projection = Projection(feat, coords, frequencies, weight, bias, 1e-5, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for later in (1, 2):
            torch.set_num_threads(1)
            o, _ = attend(q, projection, 9_000, None, 0.7)
            torch.set_num_threads(later)
            found.append(torch.autograd.grad(o.square().sum(), leaves))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_who_sees_a_single_token_has_no_gradient():
    leaves, frequencies = inputs(7, 9)
    mask = torch.arange(9).expand(7, 9) == 4
    q, feat, coords, weight, bias = leaves
    o, _ = attend(q, Projection(feat, coords, frequencies, weight, bias, 1e-5, q.dtype), ROWS, mask, 0.7)
    by_query, by_weight = torch.autograd.grad(o.square().sum(), (q, weight))
    assert not by_query.any() and by_weight.any()


def test_where_it_runs(monkeypatch):
    monkeypatch.setattr(projected_attention, "PIECE", ROWS * 2 * HEADS * DIM // torch.get_num_threads())
    monkeypatch.setattr(projected_attention, "LEAST_PIECES", 3)
    leaves, frequencies = inputs(4, 53)
    q, feat, coords, weight, bias = (t.detach() for t in leaves)
    q = q.transpose(1, 2).flatten(2)
    projection = Projection(feat, coords, frequencies, weight, bias, 1e-5, feat.dtype)
    rows = rows_of_pieces(*q.shape[-2:], q.requires_grad, projection, None)
    assert 0 < rows <= ROWS
    assert (
        rows_of_pieces(10 * q.shape[-2], q.shape[-1], False, projection, None) == 20 * QUERIES
    )  # results of parts are saved

    def runs(q=q, mask=None, **other):
        return rows_of_pieces(*q.shape[-2:], learns(q), projection._replace(**other), mask) > 0

    assert not runs(mask=torch.ones(4, 53, dtype=torch.bool))
    assert not runs(q=q[..., 1:])
    assert not runs(weight=weight.new_zeros(projected_attention.MOST_CHANNELS + 1, 2 * HEADS * DIM))
    assert not runs(feat=feat[:, :1]) and not runs(feat=feat[:0]) and not runs(feat=feat[:1])
    learning = q.clone().requires_grad_()
    assert not runs(q=learning) and runs(q=learning, bias=bias.clone().requires_grad_())
    with torch.no_grad():
        assert runs(q=learning)
    with FlopCounterMode(display=False):
        assert not runs()
    with pf.use_backend("reference"):
        assert not runs()
    seen = []
    torch.func.vmap(lambda x: seen.append(runs()) or x)(torch.zeros(2))
    assert seen == [False] and runs()


@pytest.mark.parametrize("kind", ["points", "shared points", "dense"])
@pytest.mark.parametrize("masked", [False, True])
def test_models_take_it(kind, masked, monkeypatch):
    """The same logits and gradients as where all keys and values are built at once."""
    torch.manual_seed(0)
    options = dict(
        depth=2, num_latents=6, latent_dim=16, cross_dim_head=8, cross_heads=2, latent_heads=2, num_classes=3
    )
    points = None
    if kind == "dense":
        options |= dict(fourier_encode_data=False, input_axis=1, input_channels=60)
    else:
        options |= dict(input_axis=3, input_channels=2)
        points = torch.rand(*(() if kind == "shared points" else (3,)), 60, 3) * 2 - 1
    model = pf.Perceiver(num_freq_bands=14, max_freq=8.0, **options)
    x = torch.randn(3, 60, options["input_channels"])
    mask = torch.rand(3, 60) > 0.4 if masked else None
    calls = []

    def counted(*arguments):
        calls.append(projected_attention.OP)
        return attend(*arguments)

    monkeypatch.setattr(cross_attention_ways, "projected_attention", counted)
    monkeypatch.setattr(projected_attention, "PIECE", 64 * 32 // torch.get_num_threads())
    monkeypatch.setattr(projected_attention, "LEAST_PIECES", 1)
    monkeypatch.setattr(dense, "is_for", lambda *sizes: False)  # so little work is not for pieces

    def run():
        data = x.clone().requires_grad_()
        model.zero_grad()
        out = model(data, mask, coords=points)
        out.square().sum().backward()
        return out.detach(), data.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)

    found = run()
    assert len(calls) == 2
    monkeypatch.setattr(projected_attention, "LEAST_PIECES", 1000)
    wanted = run()
    assert len(calls) == 2
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
