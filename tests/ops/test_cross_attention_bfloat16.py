"""Streaming attention in bfloat16: by products of pairs where the CPU has them, in float32 elsewhere, and the same bounds."""

import os

import pytest
import torch
from support import check_over_draws, needs_extension, relative_error
from warm_python import python

from perceiver_fast import extension, reference
from perceiver_fast.ops.cross_attention import CrossAttentionFunction, cross_attention

pytestmark = pytest.mark.skipif(**needs_extension)

BF16, SEED = torch.bfloat16, torch.tensor([12345])
# batch, heads, queries, tokens, channels of q and k, channels of v, masked
CASES = [
    (1, 1, 5, 7, 4, 4, False),  # an odd number of tokens: the last pair has one
    (2, 3, 40, 300, 8, 6, True),
    (1, 2, 70, 131, 18, 34, False),
    (1, 2, 70, 131, 17, 33, False),  # rows that are no pairs of channels
    (2, 1, 300, 50, 262, 2, True),
    (1, 1, 33, 1000, 64, 64, True),
    (1, 8, 512, 512, 64, 64, False),
    (3, 1, 31, 129, 130, 322, False),
    (2, 2, 16, 16, 64, 64, False),  # few latents: as columns
    (2, 2, 62, 62, 64, 64, False),  # as pairs
    (32, 4, 96, 96, 16, 16, False),
]


def inputs(case, magnitude=1.0, seed=0):
    """Rows of heads beside one another, as layers have them."""
    batch, heads, queries, tokens, dim, dim_v, masked = case
    generator = torch.Generator().manual_seed(sum(case) + 1000 * seed)

    def draw(rows, channels, factor=1.0):
        joint = factor * torch.randn(batch, rows, heads * channels, generator=generator, dtype=torch.float64)
        return joint.to(BF16).unflatten(-1, (heads, channels)).transpose(1, 2)

    mask = torch.rand(batch, tokens, generator=generator) > 0.3 if masked else None
    if masked:
        mask[0], mask[-1] = False, True
        mask[-1, -1] = False
    return (draw(queries, dim, magnitude), draw(tokens, dim), draw(tokens, dim_v)), mask, draw(queries, dim_v)


def run(function, tensors, mask, d_o, dtype, dropout=0.0, scale=None):
    tensors = [t.detach().to(dtype).requires_grad_() for t in tensors]
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    o, _ = function(*tensors, mask, scale, dropout, SEED if dropout else None, False)
    return dict(zip(("o", "dq", "dk", "dv"), [o, *torch.autograd.grad(o, tensors, d_o.to(o.dtype))]))


def errors(case, seed=0, magnitude=1.0, **options):
    tensors, mask, d_o = inputs(case, magnitude, seed)
    exact = run(reference.cross_attention, tensors, mask, d_o, torch.float64, **options)
    ours = run(CrossAttentionFunction.apply, tensors, mask, d_o, BF16, **options)
    plain = run(reference.cross_attention, tensors, mask, d_o, BF16, **options)
    for name, truth in exact.items():
        assert ours[name].dtype == BF16
        yield name, relative_error(ours[name], truth), relative_error(plain[name], truth)


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_plain_pytorchs(case, dropout, magnitude):
    draws = 16 if case[2] * case[3] < 5000 else 3
    check_over_draws((row for seed in range(draws) for row in errors(case, seed, magnitude, dropout=dropout)), 1e-4)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale):
    check_over_draws((row for seed in range(8) for row in errors(CASES[1], seed, scale=scale)), 1e-4)


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(case, threads):
    """Heads that are cut sum in another order; nothing else depends on the number of threads."""
    tensors, mask, d_o = inputs(case)
    one = run(CrossAttentionFunction.apply, tensors, mask, d_o, BF16)
    torch.set_num_threads(threads)
    try:
        several, again = (run(CrossAttentionFunction.apply, tensors, mask, d_o, BF16) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    for name, found in several.items():
        assert torch.equal(found, again[name])
        assert relative_error(found, one[name].double()) < 4e-3, name


def test_pairs_are_what_runs():
    """Where the CPU multiplies them: weights are rounded, so results are not float32's, rounded at the end."""
    if extension.module.active_isa() != "avx512" or not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU or PERCEIVER_FAST_CPU_ISA has no products of pairs: their kernels were NOT tested")
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("products of pairs are not taken beside AMX: their kernels were NOT tested")
    (q, k, v), mask, _ = inputs(CASES[5])
    assert not torch.equal(
        cross_attention(q, k, v, mask), cross_attention(q.float(), k.float(), v.float(), mask).to(BF16)
    )


def test_weights_add_up_to_one():
    """Values that are all alike are what comes out, but for the rounding of a result."""
    (q, k, v), *_ = inputs((2, 2, 50, 301, 16, 8, False), 3.0)
    out = cross_attention(q, k, torch.full_like(v, 1.2578125))
    assert (out == 1.2578125).all()


def test_gradients_of_a_saturated_softmax_are_zero():
    """Every query holds a token alone: nothing but rounding can be left, and that is taken out."""
    rows = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0][None, None].to(BF16)
    q, k = (rows.clone().requires_grad_() for _ in range(2))
    v, d_o = (torch.randn(1, 1, 64, 64).to(BF16) for _ in range(2))
    o = cross_attention(q, k, v, scale=1e4)
    dq, dk = torch.autograd.grad(o, (q, k), d_o)
    assert torch.equal(o, v) and dq.abs().max() < 1e-3 and dk.abs().max() < 1e-3  # d_o times the scale is 1e4


def test_a_constant_has_no_gradient():
    """Tokens that are all alike leave nothing to choose."""
    (q, k, v), _, d_o = inputs((1, 2, 40, 90, 16, 16, False))
    k = k[:, :, :1].expand_as(k)
    exact = run(reference.cross_attention, (q, k, v), None, d_o, torch.float64)
    ours = run(CrossAttentionFunction.apply, (q, k, v), None, d_o, BF16)
    plain = run(reference.cross_attention, (q, k, v), None, d_o, BF16)
    for name in ("dq", "dk"):
        theirs = (plain[name].double() - exact[name]).norm()
        assert (ours[name].double() - exact[name]).norm() <= 2 * theirs + 1e-3 * exact["dv"].norm(), name


@pytest.mark.parametrize("queries", [1, 16, 64])
def test_rows_that_begin_anywhere(queries):
    """Storage that begins at an odd number of bfloat16, and rows whose distance is odd."""
    for step in (64, 65):
        flat = torch.randn(3, 100 * step + 1).to(BF16)
        q, k, v = (t[1:].as_strided((1, 2, n, 16), (0, 32, step, 1)) for t, n in zip(flat, (queries, 70, 70)))
        expected = cross_attention(q.double(), k.double(), v.double())
        assert relative_error(cross_attention(q, k, v), expected) < 5e-3


@pytest.mark.parametrize("more", [1, 2, 3])
@pytest.mark.parametrize("queries, tokens", [(40, 90), (70, 131), (64, 64)])
def test_gradients_that_come_in_rows_of_any_distance(queries, tokens, more):
    """As those of a part of what was joined: rows that are no pairs of channels, and begin anywhere."""
    tensors, mask, d_o = inputs((1, 2, queries, tokens, 16, 16, False))
    wide = torch.randn(1, 2, queries, 16 + more).to(BF16)
    wide[..., more:] = d_o
    exact = run(reference.cross_attention, tensors, mask, d_o, torch.float64)
    for grad in (wide[..., more:], wide.transpose(1, 2).contiguous().transpose(1, 2)[..., more:]):
        ours = run(CrossAttentionFunction.apply, tensors, mask, grad, BF16)
        dense = run(CrossAttentionFunction.apply, tensors, mask, d_o, BF16)
        for name, found in ours.items():
            assert torch.equal(found, dense[name]) and relative_error(found, exact[name]) < 1e-2, name


def test_the_log_sum_exp_is_of_float32():
    (q, k, v), mask, _ = inputs(CASES[5])
    _, lse = cross_attention(q, k, v, mask, return_lse=True)
    exact = cross_attention(q.double(), k.double(), v.double(), mask, return_lse=True)[1]
    assert (lse - exact).abs().max() < 1e-5


def test_second_derivatives():
    (q, k, v), _, _ = inputs((1, 1, 6, 10, 4, 4, False))
    inputs_ = [t.requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in inputs_]
    found = []
    for tensors in (inputs_, exact):
        (dq,) = torch.autograd.grad(cross_attention(*tensors).float().square().sum(), tensors[0], create_graph=True)
        found.append(torch.autograd.grad(dq.float().square().sum(), tensors[1])[0])
    assert found[0].dtype == BF16 and relative_error(*found) < 5e-2


def test_the_registered_op_is_what_it_says():
    (q, k, v), mask, d_o = inputs(CASES[1])
    ops = torch.ops.perceiver_fast
    arguments = (q, k, v, mask, 0.3, 0.0, None, False)
    torch.library.opcheck(ops.cross_attention_forward.default, arguments)
    o, lse, token_lse = ops.cross_attention_forward(*arguments)
    assert o.dtype == torch.float32 and lse.dtype == torch.float64  # o is not rounded: the backward has use for it
    for to_tokens in (True, False):
        torch.library.opcheck(
            ops.cross_attention_backward.default, (d_o, None, *arguments, o, lse, token_lse, to_tokens)
        )
    with pytest.raises(RuntimeError, match="o in Float, got BFloat16"):
        ops.cross_attention_backward(d_o, None, *arguments, o.to(BF16), lse, token_lse, True)
    with pytest.raises(RuntimeError, match="d_o in BFloat16, got Float"):
        ops.cross_attention_backward(d_o.float(), None, *arguments, o, lse, token_lse, True)


def test_without_products_of_pairs():
    """What a CPU without them runs: float32, rounded at the end."""
    code = """
import torch, test_cross_attention_bfloat16 as t
from perceiver_fast.ops import cross_attention
for case in t.CASES:
    (q, k, v), mask, _ = t.inputs(case)
    found = cross_attention(q, k, v, mask)
    expected = cross_attention(q.float(), k.float(), v.float(), mask)
    assert torch.equal(found, expected.bfloat16()), case
    if case[2] * case[3] < 5000:
        t.check_over_draws((row for seed in range(8) for row in t.errors(case, seed)), 1e-4)
"""
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    done = python("-c", code, env=os.environ | {"PERCEIVER_FAST_CPU_ISA": "baseline", "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
