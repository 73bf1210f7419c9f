"""Decoders whose queries are described: the numbers are those of the tensor of queries, by whichever way."""

import copy
import random

import pytest
import torch
from support import check_over_draws, megabytes, needs_extension, relative_error
from torch import nn

import perceiver_fast as pf
from perceiver_fast.layers.plan import Plan
from perceiver_fast.models import described
from perceiver_fast.ops.grid_query_attention import GRID_QUERY_ATTENTION

pytestmark = pytest.mark.skipif(**needs_extension)
LAYOUTS = ("perceiver-pytorch", "deepmind", "vecset")


def draw(seed, dtype, device_batch=None, **fixed):
    """A random model, its input, and described queries of it."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    case = (
        dict(
            axes=r.choice([1, 2, 3, 4]),
            bands=r.choice([1, 2, 5]),
            features=r.choice([0, 0, 1, 3]),
            embed=r.choice([None, 6, 40]),
            grid=r.random() < 0.5,
            shared=r.random() < 0.5,
            layout=r.choice(LAYOUTS),
            heads=r.choice([1, 2, 3]),
            dim_head=r.choice([4, 7, 16]),
            latents=r.choice([1, 2, 9, 70]),
            logits=r.choice([None, 1, 5, 33]),
            ff=r.random() < 0.3,
            batch=r.choice([1, 2]),
            sharp=1.0,
        )
        | fixed
    )
    batch = 1 if case["shared"] else case["batch"]
    sizes = [r.choice([1, 2, 3, 5]) for _ in range(case["axes"] - 1)] + [r.choice([1, 4, 17, 33])]
    channels = case["features"] + case["axes"] * (2 * case["bands"] + 1)
    embed = None if case["embed"] is None else nn.Linear(channels, case["embed"], dtype=dtype, bias=r.random() < 0.8)
    keywords = dict(num_freq_bands=case["bands"], max_freq=7.0, layout=case["layout"], embed=embed)
    shape = sizes if case["grid"] else [23]
    feat = torch.randn(batch, *shape, case["features"], dtype=dtype) if case["features"] else None
    if case["grid"]:
        queries = pf.grid_queries(sizes, feat=feat, **keywords)
    else:
        queries = pf.point_queries(torch.rand(batch, 23, case["axes"], dtype=dtype) * 2 - 1, feat=feat, **keywords)
    model = pf.PerceiverIO(
        depth=0, dim=4, queries_dim=queries.channels, logits_dim=case["logits"], num_latents=case["latents"], latent_dim=8,
        cross_heads=case["heads"], cross_dim_head=case["dim_head"], decoder_ff=case["ff"],
    ).to(dtype)  # fmt: skip
    with torch.no_grad():
        for p in model.decoder_cross_attn.parameters():
            p.normal_(std=0.5)
        model.decoder_cross_attn.fn.to_q.weight.mul_(case["sharp"])
    return case, model, torch.randn(case["batch"], 6, 4, dtype=dtype), queries


def in_dtype(queries, dtype):
    """A copy of queries whose tensors have a dtype."""
    values = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "frequencies" else value
        for name, value in vars(queries).items()
    }  # fmt: skip
    if queries.embed is not None:
        values["embed"] = copy.deepcopy(queries.embed).to(dtype)
    return type(queries)(**values)


def results(model, data, queries, built=False):
    """The output and the gradients of all parameters and of the queries' own channels."""
    feat = None if queries.feat is None else queries.feat.detach().requires_grad_()
    queries = type(queries)(**(vars(queries) | {"feat": feat}))
    out = model(data, queries=queries.tensor(data) if built else queries)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out.dtype)
    leaves = dict(model.named_parameters()) | ({} if feat is None else {"feat": feat})
    leaves |= {} if queries.embed is None else {f"embed.{name}": p for name, p in queries.embed.named_parameters()}
    grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True)
    return {"output": out.detach()} | {name: g for name, g in zip(leaves, grads) if g is not None}


@pytest.mark.parametrize("first", range(0, 60, 12))
def test_float64_is_that_of_the_tensor(first, monkeypatch):
    """The package's way is taken whatever it counts, and so is the sum of its parts."""
    always_described(monkeypatch)
    for seed in range(first, first + 12):
        case, model, data, queries = draw(seed, torch.float64)
        ours, theirs = results(model, data, queries), results(model, data, queries, built=True)
        assert ours.keys() == theirs.keys(), case
        whole = max(t.norm().item() for t in theirs.values())
        for name, t in theirs.items():
            assert (ours[name] - t).norm() <= 1e-10 * (t.norm() + 1e-3 * whole), (case, name)
        with torch.no_grad():
            monkeypatch.setattr(described, "PART", 28)
            assert relative_error(model(data, queries=queries), theirs["output"]) < 1e-10, case


def always_described(monkeypatch):
    plan = described.plan_decoder
    monkeypatch.setattr(described, "plan_decoder", lambda *args: forced(plan(*args)))


def forced(plan):
    """The plan that takes the description."""
    call = GRID_QUERY_ATTENTION.call(torch.float32, torch.device("cpu"))
    taken = plan.taken if plan.path == "described" else GRID_QUERY_ATTENTION.choose(call)
    return Plan("described", taken, plan.work)


@pytest.mark.parametrize("sharp", [1.0, 300.0])
def test_float32_error_is_that_of_the_tensor(sharp, monkeypatch):
    always_described(monkeypatch)
    rows = []
    for seed in range(100, 148):
        case, model, data, queries = draw(seed, torch.float64, sharp=sharp, latents=9, ff=False)
        truth = results(model, data, queries, built=True)
        model, data, queries = model.float(), data.float(), in_dtype(queries, torch.float32)
        ours, plain = results(model, data, queries), results(model, data, queries, built=True)
        whole = max(t.norm().item() for t in truth.values())
        for name, t in truth.items():
            size = t.norm().item() + 1e-3 * whole
            label = "gradients" if name != "output" else name
            rows.append((label, *(((r[name].double() - t).norm() / size).item() for r in (ours, plain))))
    check_over_draws(rows, 1e-7)


def small(**changes):
    queries = pf.grid_queries((3, 4), num_freq_bands=2, max_freq=4.0, **changes)
    model = pf.PerceiverIO(
        depth=0, dim=4, queries_dim=10, logits_dim=1, num_latents=40, latent_dim=8, cross_heads=2, cross_dim_head=16
    )
    return model, torch.randn(2, 6, 4), queries


def test_explain_says_which_way():
    model, data, queries = small()
    (found,) = (row for row in pf.explain(model, data, queries=queries).layers if row.layer == "decoder_cross_attn")
    assert (found.path, found.choice.op, found.choice.backend) == ("described", "grid_query_attention", "cpu")
    assert found.counts.exponentials >= 2 * 2 * 12 * 40 and found.original.multiply_adds > found.counts.multiply_adds
    model.decoder_cross_attn.fn.to_q.register_forward_hook(lambda module, args, out: None)
    (found,) = (row for row in pf.explain(model, data, queries=queries).layers if row.layer == "decoder_cross_attn")
    assert found.choice.op == "cross_attention"


def test_modules_that_are_more_than_their_parameters_are_called():
    model, data, queries = small()
    expected, seen = model(data, queries=queries), []
    handle = model.decoder_cross_attn.fn.to_q.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(data, queries=queries), expected)
    assert seen == [(2, 12, 32)]
    handle.remove()
    model.to_logits.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(model(data, queries=queries), expected + 1)
    model.decoder_cross_attn.register_forward_hook(lambda module, args, out: out * 0)
    assert model(data, queries=queries).unique().numel() == 1


def test_an_embedding_with_a_hook_is_called():
    embed = nn.Linear(10, 10)
    model, data, queries = small(embed=embed)
    embed.register_forward_hook(lambda module, args, out: out * 2 + 1)
    torch.testing.assert_close(model(data, queries=queries), model(data, queries=queries.tensor(data)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_tensor(dtype):
    model, data, queries = small()
    expected = model(data, queries=queries)
    out = model.to(dtype)(data.to(dtype), queries=queries)
    assert out.dtype == dtype and relative_error(out, expected) < 0.02
    model.float()
    with torch.autocast("cpu", dtype):
        out = model(data, queries=queries)
    assert out.dtype == dtype and relative_error(out, expected) < 0.02


def test_ranges_of_variance_do_not_depend_on_how_many_channels_an_embedding_has():
    """An embedding of fewer channels than the codes, of equal columns, and of columns of zeros."""
    for width, change in ((3, None), (40, lambda w: w.copy_(w[:, :1].expand_as(w))), (40, lambda w: w[:, 2:].zero_())):
        torch.manual_seed(0)
        embed = nn.Linear(10, width, dtype=torch.float64)
        if change is not None:
            with torch.no_grad():
                change(embed.weight)
        keywords = dict(num_freq_bands=2, max_freq=4.0, embed=embed)
        model = pf.PerceiverIO(depth=0, dim=4, queries_dim=width, logits_dim=1, num_latents=40, latent_dim=8).double()
        data = torch.randn(1, 6, 4, dtype=torch.float64)
        for queries in (pf.grid_queries((3, 4), **keywords), pf.point_queries(torch.rand(9, 2), **keywords)):
            ours, theirs = results(model, data, queries), results(model, data, queries, built=True)
            for name, expected in theirs.items():
                assert (ours[name] - expected).norm() <= 1e-9 * (1 + expected.norm()), (width, name)


def test_a_second_derivative_is_that_of_the_tensor():
    embed = nn.Linear(10, 14, dtype=torch.float64)
    model = pf.PerceiverIO(depth=0, dim=4, queries_dim=14, logits_dim=1, num_latents=20, latent_dim=8).double()
    data = torch.randn(1, 6, 4, dtype=torch.float64)
    for queries in (
        pf.grid_queries((3, 4), num_freq_bands=2, max_freq=4.0, embed=embed),
        pf.point_queries(torch.rand(9, 2), num_freq_bands=2, max_freq=4.0, embed=embed),
    ):
        found = []
        for given in (queries, queries.tensor(data)):
            leaves = [embed.weight, model.latents]
            first = torch.autograd.grad(model(data, queries=given).square().sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        for ours, expected in zip(*found):
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_wrong_descriptions_are_told():
    model, data, _ = small()
    with pytest.raises(ValueError, match="expected queries of 10 channels.*got 14; change their frequencies"):
        model(data, queries=pf.grid_queries((3, 4), num_freq_bands=3, max_freq=4.0))
    with pytest.raises(ValueError, match="expected queries for a batch of 2, got feat"):
        model(data, queries=pf.grid_queries((3,), num_freq_bands=2, max_freq=4.0, feat=torch.randn(3, 3, 5)))
    with pytest.raises(ValueError, match="expected embed to take 10 channels"):
        pf.grid_queries((3, 4), num_freq_bands=2, max_freq=4.0, embed=nn.Linear(9, 10))
    with pytest.raises(ValueError, match="expected num_freq_bands and max_freq, or frequencies"):
        pf.grid_queries((3, 4), num_freq_bands=2)
    with pytest.raises(ValueError, match="expected sizes of at least one axis, each at least 1"):
        pf.grid_queries((3, 0), num_freq_bands=2, max_freq=4.0)
    with pytest.raises(ValueError, match="layout: expected one of"):
        pf.grid_queries((3,), num_freq_bands=2, max_freq=4.0, layout="mine")
    with pytest.raises(TypeError, match="expected coords as a tensor of floating point, got torch.int64"):
        pf.point_queries(torch.zeros(3, 2, dtype=torch.int64), num_freq_bands=2, max_freq=4.0)
    with pytest.raises(ValueError, match=r"expected feat \[3, 4, F\] or \[B, 3, 4, F\]"):
        pf.grid_queries((3, 4), num_freq_bands=2, max_freq=4.0, feat=torch.randn(4, 3, 1))


def test_a_million_queries_need_little_memory():
    """In a process of its own: 100^3 queries at 64 latents, of which nothing but the output and a scale each exists."""
    prepare = """
model = pf.PerceiverIO(depth=0, dim=4, queries_dim=39, logits_dim=1, num_latents=64, latent_dim=32).eval()
queries = pf.grid_queries((100, 100, 100), num_freq_bands=6, max_freq=64.0)
data = torch.randn(1, 6, 4)
with torch.no_grad():
    model(data, queries=pf.grid_queries((4, 4, 4), num_freq_bands=6, max_freq=64.0))
"""
    run = "with torch.no_grad():\n    out = model(data, queries=queries)"
    assert megabytes(prepare, run)[0] < 60


@pytest.mark.parametrize("ff", [False, True])
def test_output_goes_into_a_file(tmp_path, monkeypatch, ff, capsys):
    numpy = pytest.importorskip("numpy")
    monkeypatch.setattr(described, "PART", 36)
    queries = pf.grid_queries((3, 4), num_freq_bands=2, max_freq=4.0)
    model = pf.PerceiverIO(depth=1, dim=4, queries_dim=10, logits_dim=2, num_latents=40, latent_dim=8, decoder_ff=ff)
    data = torch.randn(2, 6, 4)
    with torch.no_grad():
        expected = model(data, queries=queries)
    field = numpy.memmap(tmp_path / "field", dtype="float32", mode="w+", shape=(2, 3, 4, 2))
    model.decode_into(field, data, queries, progress=True)
    assert "decoding" in capsys.readouterr().err
    torch.testing.assert_close(torch.from_numpy(numpy.asarray(field)).view(2, 12, 2), expected)
    out = torch.full((2, 12, 2), float("nan"))
    model.decode_into(out, data, queries)
    torch.testing.assert_close(out, expected)
    for wrong in (
        torch.empty(2, 4, 3, 2),
        torch.empty(1, 12, 2),
        torch.empty(2, 12, 4)[..., ::2],
        torch.empty(2, 12, 3),
    ):
        with pytest.raises((ValueError, RuntimeError), match="expected"):
            model.decode_into(wrong, data, queries)
    frozen = numpy.zeros((2, 12, 2), dtype="float32")
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="expected out to be writable"):
        model.decode_into(frozen, data, queries)
    with pytest.raises(TypeError, match="expected out of floating point, got torch.int64"):
        model.decode_into(torch.zeros(2, 12, 2, dtype=torch.int64), data, queries)
    with pytest.raises(TypeError, match="expected out as a tensor or a numpy array, got list"):
        model.decode_into([0.0], data, queries)


def test_channels_of_another_dtype_are_not_converted():
    model, data, _ = small()
    queries = pf.grid_queries((3,), num_freq_bands=2, max_freq=4.0, feat=torch.randn(3, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="expected feat of queries of dtype torch.float32, like the model's"):
        model(data, queries=queries)
