"""Derivatives of every order and torch.func's transforms, of every op, on default settings and in bounded memory."""

import sys

import pytest
import torch
from support import grid_inputs, megabytes, needs_extension, relative_error
from torch.autograd import gradcheck, gradgradcheck

from perceiver_fast import ops, reference
from perceiver_fast.ops import blocks, derivatives
from perceiver_fast.ops.cross_attention import cross_attention
from perceiver_fast.ops.derivatives import Recomputed, gradients, transformed
from perceiver_fast.ops.fourier_projection import fourier_projection
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.ops.grid_query_attention import grid_query_attention_unchecked
from perceiver_fast.ops.linear import LinearFunction

pytestmark = pytest.mark.skipif(**needs_extension)
SEED = torch.tensor([7])


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_seed(monkeypatch):
    """Dropout that is the same function at every call, as numerical derivatives ask."""
    for module in ("cross_attention", "grid_attention", "grid_query_attention"):
        module = sys.modules[f"perceiver_fast.ops.{module}"]
        monkeypatch.setattr(module, "dropout_seed", lambda probability, device: SEED if probability > 0 else None)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, all recomputed, in spite of few tokens."""
    monkeypatch.setattr(blocks, "ELEMENTS", 64)
    monkeypatch.setattr(blocks, "LEAST", 3)
    monkeypatch.setattr(derivatives, "SMALL", 0)


def cross_case(**options):
    mask = torch.tensor([[False] * 7, [True, False, True, True, False, True, True]]) if options.pop("mask", 0) else None
    return lambda q, k, v: cross_attention(q, k, v, mask, **options), (
        randn(2, 2, 3, 2),
        randn(2, 2, 7, 2),
        randn(2, 2, 7, 2),
    )


def grid_case(sizes=(2, 4), heads=1, **options):
    masked = bool(options.pop("mask", 0))
    q, feat, scale, mask = grid_inputs(2, 3 * heads, 2, sizes, masked=masked)
    inverted = options.get("inverted", False)

    def run(q, feat, scale):
        o, lse, kept = grid_attention_unchecked(q, feat, scale, mask, heads=heads, **options)
        return tuple(t for t in (o, None if inverted else lse, kept) if t is not None)

    return run, (q, feat, scale)


def query_case(sizes=(2, 3), grid=True, bias=False, mask=False, **options):
    tables, feat, v = randn(2, 2, 4, 2 + (sum(sizes) if grid else 0)), randn(2, *sizes, 2), randn(2, 2, 4, 3)
    scale = randn(2, *sizes).abs() + 0.3
    options |= dict(grid=grid, mask=torch.tensor([[True, False, True, True]] * 2) if mask else None)
    inputs = tables, feat, v, scale, *((randn(2, 2, 4),) if bias else ())
    return lambda *inputs: grid_query_attention_unchecked(*inputs, **options), inputs


def fourier_case(grid):
    eps, options = 1e-5, dict(num_freq_bands=2, max_freq=4.0)
    if grid:
        return (
            lambda weight, bias, feat: fourier_projection(
                (2, 3), weight, feat=feat, bias=bias, norm_eps=eps, **options
            ),
            (randn(12, 3), randn(3), randn(2, 6, 2)),
        )
    return (
        lambda weight, bias, feat, coords: fourier_projection(
            coords, weight, feat=feat, bias=bias, norm_eps=eps, **options
        ),
        (randn(7, 3), randn(3), randn(2, 5, 2), torch.rand(2, 5, 1, dtype=torch.float64) - 0.5),
    )


CASES = {
    "cross_attention": lambda: cross_case(),
    "cross_attention lse": lambda: cross_case(return_lse=True, mask=True),
    "cross_attention masked": lambda: cross_case(mask=True),
    "cross_attention dropout": lambda: cross_case(mask=True, dropout=0.4, scale=0.7, return_lse=True),
    "cross_attention inverted": lambda: cross_case(mask=True, inverted=True),
    "cross_attention inverted dropout": lambda: cross_case(inverted=True, dropout=0.3),
    "grid_attention": lambda: grid_case(),
    "grid_attention masked": lambda: grid_case((5,), mask=True),
    "grid_attention dropout": lambda: grid_case((2, 1, 4), mask=True, dropout=0.4),
    "grid_attention inverted": lambda: grid_case(mask=True, inverted=True, heads=2),
    "grid_attention inverted dropout": lambda: grid_case((5,), inverted=True, dropout=0.3),
    "grid_query_attention": lambda: query_case(),
    "grid_query_attention options": lambda: query_case(bias=True, mask=True, dropout=0.3, sum_heads=True),
    "grid_query_attention points": lambda: query_case((5,), grid=False),
    "geglu": lambda: (ops.geglu, (randn(2, 3, 4), randn(4))),
    "geglu without bias": lambda: (ops.geglu, (randn(2, 3, 4),)),
    "feed_forward": lambda: (ops.feed_forward, (randn(2, 3, 2), randn(8, 2), randn(8), randn(2, 4))),
    "linear": lambda: (ops.linear, (randn(2, 3), randn(4, 3), randn(4))),
    "linear by a library": lambda: (LinearFunction.apply, (randn(2, 3), randn(4, 3))),
    "layer_norm": lambda: (ops.layer_norm, (randn(2, 3, 4), randn(4), randn(4))),
    "add_layer_norm": lambda: (ops.add_layer_norm, (randn(2, 4), randn(2, 4), randn(4), randn(4), randn(4))),
    "grid_scale": lambda: (
        lambda feat, mean, square: ops.grid_scale(feat, mean, square.exp(), [3, 2]), (randn(2, 2, 3, 2), randn(5), randn(5))
    ),
    "fourier_projection": lambda: fourier_case(False),
    "fourier_projection on a grid": lambda: fourier_case(True),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    function, inputs = CASES[request.param]()
    return request.param, function, inputs


def test_first_and_second_derivatives(case, small_blocks):
    name, function, inputs = case
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_forward_mode(case, small_blocks):
    name, function, inputs = case
    if "linear by" in name:
        pytest.skip("torch's own product takes its place")
    tangents = tuple(torch.randn_like(t) for t in inputs)
    out, forward = torch.func.jvp(function, inputs, tangents)
    out, forward = (t if isinstance(t, tuple) else (t,) for t in (out, forward))
    weights = [torch.randn_like(o) for o in out]
    leaves = [t.clone().requires_grad_() for t in inputs]
    plain = function(*leaves)
    plain = plain if isinstance(plain, tuple) else (plain,)
    for a, b in zip(out, plain):
        assert relative_error(a, b) < 1e-13
    by = torch.autograd.grad(sum((o * w).sum() for o, w in zip(plain, weights)), leaves, allow_unused=True)
    expected = sum((g * t).sum() for g, t in zip(by, tangents) if g is not None)
    assert relative_error(sum((f * w).sum() for f, w in zip(forward, weights)), expected) < 1e-9
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents)]
        found = function(*duals)
        found = [
            torch.autograd.forward_ad.unpack_dual(o).tangent for o in (found if isinstance(found, tuple) else [found])
        ]
    for a, b in zip(found, forward):
        assert (a - b).norm() <= 1e-11 * (1 + b.norm())


def test_gradients_of_samples(case, small_blocks):
    name, function, inputs = case
    if "linear by" in name:
        pytest.skip("torch's own product takes its place")
    batch, samples = 3, [torch.stack([t + 0.1 * torch.randn_like(t) for _ in range(3)]) for t in inputs]

    def loss(*sample):
        out = function(*sample)
        return sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))

    places = tuple(range(len(inputs)))
    together = torch.func.vmap(torch.func.grad(loss, places))(*samples)
    for i in range(batch):
        leaves = [t[i].clone().requires_grad_() for t in samples]
        alone = torch.autograd.grad(loss(*leaves), leaves)
        for a, b in zip(together, alone):
            assert (a[i] - b).norm() <= 1e-10 * (1 + b.norm())
    shared = torch.func.vmap(loss, (0, *[None] * (len(inputs) - 1)))(samples[0], *inputs[1:])
    for i in range(batch):
        assert relative_error(shared[i], loss(samples[0][i], *inputs[1:])) < 1e-12


@pytest.mark.parametrize("name", ["cross_attention masked", "grid_attention", "feed_forward", "add_layer_norm"])
def test_hessians(name):
    function, inputs = CASES[name]()

    def loss(x):
        out = function(x, *inputs[1:])
        return sum(o.sin().sum() for o in (out if isinstance(out, tuple) else (out,)))

    found = torch.func.hessian(loss)(inputs[0])
    assert relative_error(torch.func.jacrev(torch.func.jacrev(loss))(inputs[0]), found) < 1e-10
    assert relative_error(torch.autograd.functional.hessian(loss, inputs[0]), found) < 1e-10
    assert relative_error(torch.autograd.functional.hessian(loss, inputs[0], vectorize=True), found) < 1e-10


def test_third_derivative():
    x = torch.randn(3, dtype=torch.float64)
    q, k, v = randn(1, 1, 3, 2), randn(1, 1, 4, 2), randn(1, 1, 4, 2)

    def third(function):
        def along(t):
            return function(q * t, k, v).square().sum()

        t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        value = along(t)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        return value.detach()

    assert x.isfinite().all()
    assert relative_error(third(cross_attention), third(lambda *a: reference.cross_attention(*a)[0])) < 1e-10


def test_gradients_are_the_kernels_whether_differentiated_or_not(case):
    name, function, inputs = case
    leaves = [t.requires_grad_() for t in inputs]
    out = function(*leaves)
    loss = sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    for a, b in zip(once, again):
        assert relative_error(a, b) < 1e-14


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_the_reference(masked, dropout, inverted, small_blocks):
    q, k, v = randn(2, 2, 5, 3), randn(2, 2, 11, 3), randn(2, 2, 11, 4)
    mask = torch.rand(2, 11) > 0.4 if masked else None
    if masked:
        mask[0], mask[1, :4] = False, False  # a row, and the whole of a block
    args = mask, 0.5, dropout, SEED, inverted
    for actual, expected in zip(blocks.cross_attention(q, k, v, *args), reference.cross_attention(q, k, v, *args)):
        assert relative_error(actual, expected) < 1e-14
    assert torch.equal(blocks.cross_attention(q, k, v, *args, 11)[0], reference.cross_attention(q, k, v, *args)[0])
    q, feat, scale, mask = grid_inputs(2, 5, 3, (2, 6, 2), masked=masked)
    args = mask, dropout, SEED, inverted
    for actual, expected in zip(
        blocks.grid_attention(q, feat, scale, *args), reference.grid_attention(q, feat, scale, *args)
    ):
        assert relative_error(actual, expected) < 1e-14


def test_constants_have_no_gradient():
    """A softmax over one token or one query does not depend on the query: exactly, in derivatives of every order."""
    q, k, v = (t.requires_grad_() for t in (randn(2, 1, 3, 2), randn(2, 1, 1, 2), randn(2, 1, 1, 2)))
    mask = torch.tensor([[True], [False]])
    for masked in (None, mask):
        out = cross_attention(q, k, v, masked)
        dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        assert (dq == 0).all() and (dk == 0).all()
        (second,) = torch.autograd.grad(dv.square().sum() + dq.sum(), q, allow_unused=True)
        assert second is None or (second == 0).all()
        by_transform = torch.func.grad(lambda q: cross_attention(q, k, v, masked).square().sum())(q)
        assert (by_transform == 0).all()


@pytest.mark.parametrize("operation", ["cross", "grid"])
def test_memory_of_a_second_derivative(operation, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")  # what is freed goes back: glibc's heap would hold holes
    tokens = {"cross": "cross_attention(q, k, k)", "grid": "grid_attention_unchecked(q, k, s)[0]"}[operation]
    shape = "q, k = torch.randn(1, 4, 64, 8), torch.randn(1, 4, 250 * tokens, 8)"
    if operation == "grid":
        shape = (
            "q, k, s = torch.randn(1, 256, 253 + tokens), torch.randn(1, tokens, 250, 3), torch.ones(1, tokens, 250)"
        )
    prepare = f"""
from perceiver_fast.ops import cross_attention
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
torch.set_num_threads(1)
torch.manual_seed(0)
def twice(q, k, s=None):
    (first,) = torch.autograd.grad({tokens}.square().sum(), q, create_graph=True)
    return torch.autograd.grad(first.square().sum(), (q, k))[1]
def leaves(tokens):
    {shape}
    return [t.requires_grad_() for t in (q, k{", s" if operation == "grid" else ""})]
twice(*leaves(20))  # loads what the first call loads
given = leaves(300)
"""
    added, _ = megabytes(prepare, "out = twice(*given)")
    whole = 256 * 75_000 * 4 / 2**20  # one copy of the weights, of which plain PyTorch holds a dozen at once
    assert added < 2 * whole, (added, whole)


def test_recomputed_takes_what_is_not_differentiable():
    x, index = torch.randn(4, requires_grad=True), torch.tensor([1, 3])
    out = Recomputed.apply(lambda x, index, none: x[index].sin(), x, index, None)
    assert torch.allclose(torch.autograd.grad(out.sum(), x)[0], torch.zeros(4).index_put((index,), x[index].cos()))


def test_gradients_by_an_ancestor_of_another_input():
    """The gradient by each input alone, though one is computed from the other."""
    x = torch.tensor(3.0, requires_grad=True)
    y = x**2
    assert gradients(torch.mul, (x, y), (torch.tensor(1.0),), (True, True)) == (9.0, 3.0)


def test_transforms_are_noticed():
    assert not transformed()
    assert torch.func.vmap(lambda x: x * transformed())(torch.ones(2)).sum() == 2
    with torch.autograd.forward_ad.dual_level():
        assert transformed()


@pytest.mark.parametrize("order", [3, 4])
def test_layer_norm_beyond_what_torchs_own_has(order):
    """torch's is wrong from the third derivative on; the truth is mean and variance written out."""

    def plain(x, weight, bias):
        x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias

    results = []
    for function in (ops.layer_norm, plain):
        generator = torch.Generator().manual_seed(0)
        inputs = [
            torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((2, 6), (6,), (6,))
        ]
        value = function(*inputs).sin().sum()
        for _ in range(order):
            found = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((g * g.detach().cos()).sum() for g in found)
        results.append(found)
    for actual, expected in zip(*results):
        assert (actual - expected).abs().max() <= 1e-11 * expected.abs().max()
