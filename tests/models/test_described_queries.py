"""Decoders whose queries are described: the numbers are those of the tensor of queries, by whichever way."""

import copy
import random

import pytest
import torch
from support import check_over_draws, needs_extension, relative_error
from torch import nn

import perceiver_fast as pf
from perceiver_fast.models import described

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
            monkeypatch.setattr(described, "PART", 7)
            assert relative_error(model(data, queries=queries), theirs["output"]) < 1e-10, case


def always_described(monkeypatch):
    plan = described.plan_decoder
    monkeypatch.setattr(described, "plan_decoder", lambda *args: forced(plan(*args)))


def forced(plan):
    assert plan.path == "described" or plan.grid is not None or plan.work
    from perceiver_fast.layers.plan import Plan
    from perceiver_fast.ops.grid_query_attention import GRID_QUERY_ATTENTION

    taken = (
        plan.taken
        if plan.path == "described"
        else GRID_QUERY_ATTENTION.choose(GRID_QUERY_ATTENTION.call(torch.float32, torch.device("cpu")))
    )
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
