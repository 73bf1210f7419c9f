"""perceiver-pytorch's instances, and classes that are built like its own."""

import copy

import perceiver_pytorch
import pytest
import torch
from einops import rearrange
from torch import nn

import perceiver_fast as pf
from contract_cases import MODELS
from perceiver_fast.adapters.check import compare, run
from perceiver_fast.adapters.forwards import all_stand_ins, stand_ins


def doubled(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_perceiver_pytorch(name):
    theirs, _, keywords, draw = MODELS[name]
    torch.manual_seed(0)
    model, inputs = theirs(**keywords).double().eval(), doubled(draw(3))
    fast = copy.deepcopy(model)
    report = pf.accelerate(fast)
    assert report, name
    _, _, wrong = compare(run(model, (), inputs, True), run(fast, (), inputs, True), torch.float64)
    assert wrong is None
    assert any(row.way for row in report.rows)


def test_grids_are_described():
    model = perceiver_pytorch.Perceiver(
        num_freq_bands=4, depth=2, max_freq=8.0, num_latents=5, latent_dim=16, weight_tie_layers=True, attn_residual=True
    ).double()
    data = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    report = pf.accelerate(model, data)
    assert report.check.gradient_error < 1e-9
    assert "grid: grid_attention on cpu" in {row.way for row in report.rows}
    expected = pf.restore(copy.deepcopy(model))(data, return_hiddens=True)
    actual = model(data, return_hiddens=True)
    assert (expected[0] - actual[0]).abs().max() < 1e-12 and len(expected[1]) == len(actual[1])
    model.layers[0].cross_attn.fn.to_kv.register_forward_hook(lambda module, args, output: output * 2)
    other = pf.restore(copy.deepcopy(model))
    assert (other(data) - model(data)).abs().max() < 1e-12


class PreNorm(nn.Module):
    def __init__(self, dim, fn, context_dim=None):
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim) if context_dim else None

    def forward(self, x, **kwargs):
        x = self.norm(x)
        if self.norm_context is not None:
            kwargs.update(context=self.norm_context(kwargs["context"]))
        return self.fn(x, **kwargs)


class Attention(nn.Module):
    """A copy of perceiver-pytorch's, with biases, as forks have it."""

    def __init__(self, query_dim, context_dim=None, heads=2, dim_head=4, dropout=0.0):
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_q = nn.Linear(query_dim, heads * dim_head)
        self.to_kv = nn.Linear(context_dim or query_dim, heads * dim_head * 2)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, query_dim), nn.LeakyReLU(0.1))

    def weights(self, sim):
        return sim.softmax(-1)

    def forward(self, x, context=None, mask=None):
        q, (k, v) = self.to_q(x), self.to_kv(x if context is None else context).chunk(2, -1)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (q, k, v))
        sim = torch.einsum("bid,bjd->bij", q, k) * self.scale
        if mask is not None:
            sim = sim.masked_fill(~mask.repeat_interleave(self.heads, 0)[:, None], -torch.finfo(sim.dtype).max)
        out = torch.einsum("bij,bjd->bid", self.dropout(self.weights(sim)), v)
        return self.to_out(rearrange(out, "(b h) n d -> b n (h d)", h=self.heads))


class Sharper(Attention):
    """Looks the same and is not."""

    def weights(self, sim):
        return (sim * 1.5).softmax(-1)


class Fork(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.cross = PreNorm(8, attention(8, 12), 12)
        self.latent = PreNorm(8, attention(8))

    def forward(self, x, context, mask=None):
        x = x + self.cross(x, context=context, mask=mask)
        return x + self.latent(x)


def test_a_fork_is_tried_and_accelerated():
    model = Fork(Attention).double()
    inputs = dict(x=torch.randn(2, 5, 8).double(), context=torch.randn(2, 9, 12).double(), mask=torch.rand(2, 9) > 0.3)
    report = pf.accelerate(model, inputs)
    assert [row.kind for row in report.rows] == ["cross-attention", "self-attention"]
    assert all(row.way for row in report.rows) and report.check.gradient_error < 1e-9


def test_what_only_looks_alike_is_left_alone():
    model = Fork(Sharper)
    report = pf.accelerate(model)
    assert not list(all_stand_ins(model))
    assert {row.why for row in report.rows} == {"tried on random input, it computes something else"}
    assert {row.kind for row in report.rows} == {"looks like cross-attention", "looks like self-attention"}


def test_a_trial_leaves_no_trace():
    model = Fork(Attention)
    calls = []
    model.cross.register_forward_hook(lambda *_: calls.append(1))
    state, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    pf.accelerate(model)
    assert torch.equal(generator, torch.get_rng_state()) and not calls
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and "forward" in stand_ins(model.cross)
