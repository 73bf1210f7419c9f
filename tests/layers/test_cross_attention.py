"""The cross-attention layer: the way that is planned, that all ways agree, and queries that are tokens, too."""

from types import SimpleNamespace

import perceiver_pytorch
import pytest
import torch
from support import needs_extension, relative_error

import perceiver_fast as pf
from perceiver_fast.layers import Attention, PreNorm, axis_codes, cross_attention_ways, plan, small
from perceiver_fast.layers.plan import Layer, count_work, plan_cross_attention
from perceiver_fast.ops.cross_attention import CROSS_ATTENTION, cross_attention_unchecked
from perceiver_fast.ops.library import compute_dtype
from perceiver_fast.tokens import DenseTokens, GridTokens, PointTokens, TokenGroups
from perceiver_fast.tokens.describe import describe_points

CPU = torch.device("cpu")


def cross_attention(dim, context_dim, heads, dim_head, dropout=0.0):
    return PreNorm(dim, Attention(dim, context_dim, heads, dim_head, dropout), context_dim=context_dim)


def grid(sizes, features, bands=6):
    codes = tuple(axis_codes(n, bands, 10.0, torch.float32, torch.device("cpu")) for n in sizes)
    return GridTokens(torch.zeros(1, *sizes, features), codes)


def points(count, features, axes, bands):
    return PointTokens(
        torch.zeros(1, count, features),
        torch.zeros(1, count, axes, dtype=torch.float64),
        torch.zeros(axes, bands).double(),
    )


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize(
    "tokens, path",
    [
        (grid((224, 224), 3), "grid"),
        (grid((16, 64, 64), 3), "grid"),
        (grid((128, 128), 256), "projected"),  # a pair costs 2 F multiply-adds on the grid's way
        (grid((8, 8), 40), "grid"),  # small: the least rounding
        (DenseTokens(torch.zeros(1, 50_176, 32)), "absorbed"),
        (DenseTokens(torch.zeros(1, 50_176, 512)), "projected"),
        (points(50_000, 0, 3, 64), "projected"),
    ],
    ids=["image", "video", "wide channels", "small", "narrow", "wide", "points"],
)
def test_the_least_work_is_planned(tokens, path):
    layer = Layer(queries=512, heads=1, dim_head=64)
    plan = plan_cross_attention(tokens, layer)
    assert plan.path == path and plan.choice.backend == "cpu" and str(plan.choice.op) in str(plan)
    if path != "grid" or tokens.count > 100:
        assert all(plan.work[path].cost <= other.cost for other in plan.work.values())


def test_work_is_counted():
    layer = Layer(queries=10, heads=2, dim_head=4)
    tokens = DenseTokens(torch.zeros(1, 100, 6))
    assert count_work("absorbed", tokens, layer).arithmetic == 20 * 100 * (2 * 6 + 12) + 2 * 20 * 4 * 6
    assert count_work("projected", tokens, layer).arithmetic == 100 * 6 * 16 + 20 * 100 * (2 * 4 + 12)
    with pytest.raises(KeyError):
        count_work("sideways", tokens, layer)


def outputs(layer, x, tokens, mask, path, inverted, monkeypatch):
    """The layer's output and gradients when it takes the way ``path``."""
    from perceiver_fast.layers import cross_attention as module

    plan, path, in_one = module.plan_cross_attention, path.removesuffix(" in one op"), path.endswith(" in one op")
    with monkeypatch.context() as patch:
        if not in_one:
            patch.setattr(small, "are_few", lambda latents, channels: False)
        patch.setattr(module, "plan_cross_attention", lambda t, call: type(plan(t, call))(path, plan(t, call).choice))
        torch.manual_seed(7)  # of dropout
        out = layer(x, context=tokens, mask=mask, inverted_attention=inverted)
    return [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_all_ways_are_one(monkeypatch, heads, inverted, dropout):
    """All ways give the same numbers, whatever the biases of LayerNorm, and drop the same weights."""
    layer = cross_attention(16, 29, heads, 5, dropout).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    codes = tuple(axis_codes(n, 6, 10.0, torch.float64, torch.device("cpu")) for n in (7, 6))
    described = GridTokens(torch.randn(2, 7, 6, 3, dtype=torch.float64), codes)
    built = DenseTokens(described.materialize())
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    mask = torch.rand(2, 42) > 0.3
    ways = [(described, "grid"), (described, "projected"), (built, "absorbed"), (built, "projected")]
    ways += [(described, "projected in one op"), (built, "projected in one op")]
    expected, *others = (outputs(layer, x, tokens, mask, path, inverted, monkeypatch) for tokens, path in ways)
    whole = torch.stack([t.norm() for t in expected]).norm()
    for other in others:
        for a, b in zip(other, expected):
            assert (a - b).norm() <= 1e-10 * b.norm() + 1e-13 * whole


@pytest.mark.parametrize("masked", [False, True])
def test_queries_contribute_keys_and_values(masked):
    keywords = dict(dim=16, context_dim=16, cross_heads=2, cross_dim_head=5, latent_heads=2, latent_dim_head=4)
    theirs = perceiver_pytorch.PerceiverBlock(**keywords, queries_contribute_kv=True).double()
    ours = pf.PerceiverBlock(**keywords, queries_contribute_kv=True).double()
    ours.load_state_dict(theirs.state_dict())
    x, context = torch.randn(2, 7, 16).double(), torch.randn(2, 30, 16).double()
    mask = torch.rand(2, 30) > 0.4 if masked else None
    expected, actual = theirs(x, context, mask=mask), ours(x, context, mask=mask)
    assert relative_error(actual, expected) < 1e-13
    for a, b in zip(
        *(torch.autograd.grad(o.square().sum(), list(m.parameters())) for o, m in ((actual, ours), (expected, theirs)))
    ):
        assert (a - b).norm() <= 1e-11 * b.norm() + 1e-13
    with pytest.raises(ValueError, match="context_dim == dim"):
        pf.PerceiverBlock(dim=16, context_dim=9, queries_contribute_kv=True)
    with pytest.raises(ValueError, match="attention to tokens alone"):
        ours.cross_attn(x, context=TokenGroups([DenseTokens(context)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["grid", "absorbed", "projected", "points"])
def test_narrow_models_on_every_way(way, dtype):
    """Weights and input in 16 bits: errors no greater than perceiver-pytorch's arithmetic in 16 bits has."""
    torch.manual_seed(1)
    layer = cross_attention(32, 29 if way in ("grid", "points") else {"absorbed": 8, "projected": 96}[way], 1, 16)
    if way == "grid":
        codes = tuple(axis_codes(n, 6, 10.0, torch.float32, torch.device("cpu")) for n in (7, 6))
        tokens = [GridTokens(torch.randn(2, 7, 6, 3), codes)]
        tokens.append(GridTokens(tokens[0].feat.to(dtype), codes))
    elif way == "points":
        feat, coords, f = (
            torch.randn(2, 42, 3),
            torch.rand(2, 42, 2).double(),
            torch.linspace(1, 5, 6).double().expand(2, -1),
        )
        tokens = [PointTokens(feat, coords, f), PointTokens(feat.to(dtype), coords, f)]
    else:
        context = torch.randn(2, 42, layer.norm_context.normalized_shape[0])
        tokens = [DenseTokens(context), DenseTokens(context.to(dtype))]
    x = torch.randn(2, 9, 32)
    exact = layer(x, context=tokens[0])
    narrow = layer.to(dtype)(x.to(dtype), context=tokens[1])
    assert narrow.dtype == dtype and relative_error(narrow.float(), exact) < (
        0.03 if dtype == torch.bfloat16 else 0.005
    )
    narrow.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("way", ["grid", "dense"])
def test_caches_know_the_grad_mode(way):
    """What tokens cached without gradients is not used where gradients are recorded; blocks can be checkpointed."""
    from torch.utils.checkpoint import checkpoint

    keywords = dict(
        num_freq_bands=3, depth=2, max_freq=8.0, num_latents=5, latent_dim=16, latent_heads=2, num_classes=4
    )
    model = pf.Perceiver(**keywords, input_channels=3, fourier_encode_data=way == "grid")
    data = torch.randn(2, 6, 5, 3, requires_grad=True)
    tokens, x = model.describe(data), torch.randn(1, 5, 16)
    with torch.no_grad():
        model.layers[0](x, tokens)
    fresh = model.layers[0](x, model.describe(data))
    (expected,) = torch.autograd.grad(fresh.square().sum(), data)
    (actual,) = torch.autograd.grad(model.layers[0](x, tokens).square().sum(), data)
    assert relative_error(actual, expected) < 1e-5

    (expected,) = torch.autograd.grad(model(data).square().sum(), data)
    for block in model.layers:
        run = block.forward
        block.forward = lambda *args, run=run, **kw: checkpoint(run, *args, use_reentrant=False, **kw)
    (actual,) = torch.autograd.grad(model(data).square().sum(), data)
    assert relative_error(actual, expected) < 1e-5


KINDS = {
    "grid": lambda dtype: GridTokens(
        torch.randn(2, 40, 41, 3, dtype=dtype),
        tuple(axis_codes(n, 4, 8.0, compute_dtype(dtype), CPU) for n in (40, 41)),
    ),
    "points": lambda dtype: describe_points(
        torch.randn(2, 1500, 3, dtype=dtype), torch.rand(2, 1500, 2).double(), 4, 8.0
    ),
    "dense": lambda dtype: DenseTokens(torch.randn(2, 300, 48, dtype=dtype)),
    "narrow": lambda dtype: DenseTokens(torch.randn(2, 300, 4, dtype=dtype)),
}


@pytest.mark.parametrize("contributes", [False, True], ids=["", "queries contribute"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planned_for_is_what_arrives(kind, dtype, autocast, contributes, monkeypatch):
    """The backend is chosen by the plan, for tensors that do not exist yet, and handed to the op."""
    asked, arrived = {}, []

    def choose(call):
        asked[compute_dtype(call.dtype), call.heads, call.queries, call.dim] = call
        return CROSS_ATTENTION.choose(call)

    def attend(q, k, v, *args):
        arrived.append((compute_dtype(q.dtype), q.shape[1], q.shape[2], q.shape[3]))
        assert k.dtype == v.dtype == q.dtype and k.shape[3] == q.shape[3]
        return cross_attention_unchecked(q, k, v, *args)

    monkeypatch.setattr(small, "are_few", lambda latents, channels: False)
    monkeypatch.setattr(plan, "CROSS_ATTENTION", SimpleNamespace(choose=choose))
    monkeypatch.setattr(cross_attention_ways, "cross_attention_unchecked", attend)
    tokens = KINDS[kind](dtype)
    attention = Attention(32, tokens.channels, heads=2, dim_head=16)
    attention.queries_contribute_kv = contributes
    if contributes:
        attention.to_kv = torch.nn.Linear(32, 64, bias=False)
        tokens = DenseTokens(torch.randn(2, 300, 32, dtype=dtype))
    layer = PreNorm(32, attention, context_dim=tokens.channels).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(torch.randn(2, 7, 32, dtype=dtype), context=tokens)
    assert out.isfinite().all() and set(arrived) <= set(asked)
    assert arrived or kind == "grid"


def test_queries_of_other_channels_are_refused():
    """What stands in the place of to_q is called, whatever it is."""
    for width in (16, 64):
        layer = PreNorm(32, Attention(32, 48, heads=2, dim_head=16), context_dim=48)
        layer.fn.to_q = torch.nn.Linear(32, width, bias=False)
        with pytest.raises(ValueError, match=f"expected 32 channels of fn.to_q.*got {width}"):
            layer(torch.randn(2, 256, 32), context=torch.randn(2, 60, 48))
