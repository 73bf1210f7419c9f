"""perceiver-pytorch's instances, and classes that are built like its own."""

import copy

import perceiver_pytorch
import pytest
import torch
from contract_cases import MODELS
from einops import rearrange
from support import needs_extension
from torch import nn

import perceiver_fast as pf
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


@pytest.mark.skipif(**needs_extension)
def test_grids_are_described():
    model = perceiver_pytorch.Perceiver(
        num_freq_bands=4,
        depth=2,
        max_freq=8.0,
        num_latents=5,
        latent_dim=16,
        weight_tie_layers=True,
        attn_residual=True,
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


class ModuleOutput(dict):
    """As perceiver-io's: a dict with attributes."""

    def __init__(self, **values):
        super().__init__(values)
        self.__dict__.update(values)


class MultiHeadAttention(nn.Module):
    """Attention with the names, the arguments and the result of perceiver-io 0.11's, written for this test."""

    def __init__(self, heads, q_channels, kv_channels, qk, v, causal=False, power=1):
        super().__init__()
        self.num_heads, self.dp_scale, self.causal_attention, self.power = heads, (qk // heads) ** -0.5, causal, power
        self.q_proj, self.k_proj = nn.Linear(q_channels, qk), nn.Linear(kv_channels, qk)
        self.v_proj, self.o_proj = nn.Linear(kv_channels, v), nn.Linear(v, q_channels)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x_q, x_kv, pad_mask=None, rot_pos_emb_q=None, rot_pos_emb_k=None, kv_cache=None):
        q, k, v = self.q_proj(x_q), self.k_proj(x_kv), self.v_proj(x_kv)
        q, k, v = (rearrange(t, "b n (h c) -> b h n c", h=self.num_heads) for t in (q, k, v))
        q = q * self.dp_scale
        attn = q @ k.mT
        if rot_pos_emb_q is not None:
            attn = attn * rot_pos_emb_q
        if pad_mask is not None:
            attn = attn.masked_fill(pad_mask[:, None, None], -torch.finfo(attn.dtype).max)
        if self.causal_attention:
            later = torch.ones(attn.shape[-2:], dtype=torch.bool).triu(1)
            attn = attn.masked_fill(later, -torch.finfo(attn.dtype).max)
        out = self.dropout((attn * self.power).softmax(-1)) @ v
        out = self.o_proj(rearrange(out, "b h n c -> b n (h c)"))
        return ModuleOutput(last_hidden_state=out, kv_cache=kv_cache)


class CrossAttention(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.attention = MultiHeadAttention(*args, **kwargs)
        self.q_norm, self.kv_norm = nn.LayerNorm(args[1]), nn.LayerNorm(args[2])

    def forward(self, x_q, x_kv, pad_mask=None, rot_pos_emb_q=None, rot_pos_emb_k=None, kv_cache=None):
        return self.attention(self.q_norm(x_q), self.kv_norm(x_kv), pad_mask, rot_pos_emb_q, rot_pos_emb_k, kv_cache)


def test_projected_attention():
    for kind in (MultiHeadAttention, CrossAttention):
        model = kind(2, 8, 12, 16, 4).double().eval()
        inputs = dict(
            x_q=torch.randn(2, 5, 8).double(), x_kv=torch.randn(2, 9, 12).double(), pad_mask=torch.rand(2, 9) > 0.7
        )
        fast = copy.deepcopy(model)
        report = pf.accelerate(fast, inputs)
        assert report.check.gradient_error < 1e-9 and type(fast(**inputs)) is ModuleOutput
        assert [row.why for row in report.rows] == [None]
        shared = inputs | dict(x_q=inputs["x_q"][:1])  # the batch shares its latents, as in perceiver-io
        assert compare(run(model, (), shared, True), run(fast, (), shared, True), torch.float64)[2] is None
        turned = inputs | dict(rot_pos_emb_q=torch.tensor(0.3).double())
        assert torch.equal(model(**turned)["last_hidden_state"], fast(**turned)["last_hidden_state"])
        assert {row.why for row in report.rows} == {"arguments rot_pos_emb_q"}


def test_projected_attention_that_is_left_alone():
    causal, sharper = CrossAttention(2, 8, 8, 8, 8, causal=True), CrossAttention(2, 8, 8, 8, 8, power=2)
    report = pf.accelerate(nn.ModuleList([causal, sharper]))
    whys = {(row.name, row.why) for row in report.rows}
    assert not report and {("0", "it is causal"), ("1", "tried on random input, it computes something else")} <= whys


def copied_from_transformers(power=1):
    """A class with the structure of transformers' PerceiverSelfAttention, as a copy of its file has it."""

    class PerceiverSelfAttention(nn.Module):
        def __init__(self, width, context, qk, v, heads):
            super().__init__()
            self.num_heads, self.qk_channels_per_head = heads, qk // heads
            self.layernorm1 = nn.LayerNorm(width)
            self.layernorm2 = nn.LayerNorm(context) if context else nn.Identity()
            self.query, self.key = nn.Linear(width, qk), nn.Linear(context or width, qk)
            self.value, self.dropout = nn.Linear(context or width, v), nn.Dropout(0.1)

        def forward(
            self, hidden_states, attention_mask=None, inputs=None, inputs_mask=None, output_attentions=False
        ):  # fmt: skip
            x, tokens = self.layernorm1(hidden_states), self.layernorm2(inputs)
            tokens, mask = (x, attention_mask) if tokens is None else (tokens, inputs_mask)
            q, k, v = self.query(x), self.key(tokens), self.value(tokens)
            q, k, v = (rearrange(t, "b n (h c) -> b h n c", h=self.num_heads) for t in (q, k, v))
            logits = q @ k.mT / self.qk_channels_per_head**0.5
            weights = self.dropout(((logits if mask is None else logits + mask) * power).softmax(-1))
            out = rearrange(weights @ v, "b h n c -> b n (h c)")
            return (out, weights) if output_attentions else (out,)

    return PerceiverSelfAttention


def test_copies_of_transformers_attention():
    kind = copied_from_transformers()
    model = nn.ModuleList([kind(8, 12, 16, 4, 2), kind(8, None, 8, 8, 4)]).double().eval()
    fast = copy.deepcopy(model)
    report = pf.accelerate(fast)
    assert [row.kind for row in report.rows] == ["cross-attention", "self-attention"]
    x, tokens = torch.randn(2, 5, 8).double(), torch.randn(2, 9, 12).double()
    mask = x.new_zeros(2, 1, 1, 9).masked_fill(torch.rand(2, 1, 1, 9) > 0.7, torch.finfo(x.dtype).min)
    for at, inputs in ((0, dict(inputs=tokens)), (0, dict(inputs=tokens, inputs_mask=mask)), (1, {})):
        inputs = dict(hidden_states=x) | inputs
        results = (run(m[at], (), inputs, True) for m in (model, fast))
        assert compare(*results, torch.float64)[2] is None and stand_ins(fast[at])["forward"].way
    asked = dict(hidden_states=x, inputs=tokens, output_attentions=True)
    assert torch.equal(model[0](**asked)[1], fast[0](**asked)[1])
    sharper = copied_from_transformers(power=2)(8, 12, 16, 4, 2)
    report = pf.accelerate(sharper)
    assert not report and report.rows[0].why == "tried on random input, it computes something else"
