"""grid_attention's Triton kernels against the reference in float64: values, every gradient, all variants.

A kernel's error is at most twice that of plain PyTorch in the same dtype, as everywhere; the floors are what one rounding
of a logit is worth.
"""

from dataclasses import replace

import pytest
import torch
from grid_attention_cases import CASES, DTYPES, FLOOR, errors, gradients
from support import grid_inputs, relative_error

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.kernels.configs import config
from perceiver_fast.kernels.grid import Grid, blocks
from perceiver_fast.ops import grid_attention
from perceiver_fast.ops.grid_attention import GRID_ATTENTION, GridAttentionCall, grid_attention_unchecked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_that_of_plain_pytorch(device, case, dtype):
    for name, (kernel, plain) in errors(device, dtype, case).items():
        assert kernel <= 2 * plain + FLOOR[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[7]], ids=str)
def test_dropout_drops_what_the_reference_drops(device, case, dtype):
    for name, (kernel, plain) in errors(device, dtype, case, dropout=0.3).items():
        assert kernel <= 2 * plain + 2 * FLOOR[dtype], name


@pytest.mark.parametrize(
    "case, magnitude", [(CASES[4], 8.0), (CASES[4], 1e8), (CASES[7], 100.0), (CASES[7], 1e4)], ids=str
)
def test_extreme_logits(device, case, magnitude):
    for name, (kernel, plain) in errors(device, torch.float32, case, magnitude).items():
        assert kernel <= 2.5 * plain + 1e-6, name
    if magnitude <= 1e4:
        for name, (kernel, plain) in errors(device, torch.bfloat16, case, magnitude).items():
            assert kernel <= 2 * plain + 2e-2, name  # near-ties of rounded weights


def test_extreme_logits_with_dropout(device):
    """What is left of saturated weights' gradients is rounding times large queries: all kernels round alike."""
    for name, (kernel, plain) in errors(device, torch.float32, CASES[4], 1e4, dropout=0.3).items():
        assert kernel <= 2.5 * plain + 1e-6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [-600.0, 600.0])
def test_logits_all_far_from_zero(device, shift, dtype):
    """No weight of exp2(s) is finite and positive: every program takes its rows again with their maximum."""
    for name, (kernel, plain) in errors(device, dtype, CASES[4], shift=shift).items():
        assert kernel <= 2 * plain + max(1e-4, FLOOR[dtype]), name  # a logit of 1,000 knows 6e-5


def test_splits_whose_logits_are_far_apart(device):
    """Most programs' rows have no weight beside one row's; the parts are merged by their shifts."""
    q, feat, scale, _ = (t if t is None else t.to(device) for t in grid_inputs(1, 7, 2, (40, 33), torch.float32))
    q[..., 2 + 25] += 400.0
    cut = blocks(Grid(1, 7, 2, (40, 33), "fma"), config("grid_attention_forward[fma]", 90), device)
    assert cut.splits > 1 and cut.columns > 1
    o, lse, _ = grid_attention_unchecked(q, feat, scale)
    exact, exact_lse, _ = reference.grid_attention(q.double(), feat.double(), scale.double())
    assert relative_error(o, exact) < 1e-5 and relative_error(lse, exact_lse) < 1e-6


def test_same_result_every_time(device):
    q, feat, scale, mask = (t.to(device) for t in grid_inputs(2, 33, 3, (9, 40), torch.float32, masked=True))
    weights = [torch.randn_like(q), torch.randn(q.shape[:2], dtype=torch.float64, device=device)]
    first, second = (
        gradients(lambda *inputs: grid_attention_unchecked(*inputs, mask)[:2], (q, feat, scale), weights)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_set_of_queries_for_the_batch(device):
    q, feat, scale, _ = (t if t is None else t.to(device) for t in grid_inputs(3, 6, 3, (5, 34), torch.float32))
    shared = q[:1].expand(3, -1, -1)
    for mine, theirs in zip(
        grid_attention_unchecked(shared, feat, scale)[:2],
        grid_attention_unchecked(shared.contiguous(), feat, scale)[:2],
    ):
        assert torch.equal(mine, theirs)


def test_inputs_of_any_strides(device):
    q, feat, scale, _ = (t if t is None else t.to(device) for t in grid_inputs(2, 6, 3, (5, 34), torch.float32))
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (q, feat, scale)]
    for mine, theirs in zip(grid_attention_unchecked(*strided)[:2], grid_attention_unchecked(q, feat, scale)[:2]):
        assert torch.equal(mine, theirs)


def test_nothing_to_attend_with(device):
    q, feat, scale, _ = (t if t is None else t.to(device) for t in grid_inputs(2, 0, 3, (5, 6), torch.float32))
    q.requires_grad_()
    o, lse, _ = grid_attention_unchecked(q, feat, scale)
    assert o.shape == q.shape and lse.shape == (2, 0)
    o.sum().backward()
    assert q.grad.shape == q.shape


def test_public_op(device):
    q_feat, q_axes = torch.randn(2, 5, 3, device=device), tuple(torch.randn(2, 5, n, device=device) for n in (4, 6))
    feat, scale = torch.randn(2, 24, 3, device=device), torch.rand(2, 24, device=device) + 0.5
    o_feat, o_axes, lse = grid_attention(q_feat, q_axes, feat, scale)
    with pf.use_backend("reference"):
        e_feat, e_axes, e_lse = grid_attention(q_feat, q_axes, feat, scale)
    for mine, theirs in zip((o_feat, *o_axes, lse), (e_feat, *e_axes, e_lse)):
        assert mine.dtype == theirs.dtype and relative_error(mine, theirs) < 1e-5
    halves = [t.bfloat16() for t in (q_feat, *q_axes, feat, scale)]
    o_feat, _, lse = grid_attention(halves[0], halves[1:3], *halves[3:])
    assert o_feat.dtype == torch.bfloat16 and lse.dtype == torch.float64
    assert relative_error(o_feat, e_feat) < 2e-2


def test_backend_and_reasons(device):
    call = GridAttentionCall(torch.float32, device, (8, 8), features=3)
    assert (
        GRID_ATTENTION.choose(call).backend == "triton" == GRID_ATTENTION.choose(replace(call, inverted=True)).backend
    )
    for other, said in (
        (GridAttentionCall(torch.float64, device, (8, 8)), "float64"),
        (GridAttentionCall(torch.float32, device, (8, 8), features=65), "65"),
    ):
        choice = GRID_ATTENTION.choose(other)
        assert choice.backend == "reference" and said in " ".join(choice.rejected["triton"])
    with pf.use_backend("triton"), pytest.raises(pf.backends.BackendError, match="float64"):
        q, feat, scale, _ = grid_inputs(1, 2, 3, (4, 4), torch.float64)
        grid_attention_unchecked(q.to(device), feat.to(device), scale.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registered_ops(device, dtype):
    q, feat, scale, mask = (t.to(device) for t in grid_inputs(2, 4, 3, (5, 7), torch.float32, masked=True))
    feat, seed = feat.to(dtype), torch.tensor([3], device=device)
    ops = torch.ops.perceiver_fast
    for dropout in (0.0, 0.2):
        torch.library.opcheck(
            ops.grid_attention_forward, (q, feat, scale, mask, dropout, seed, False), test_utils=("test_schema", "test_faketensor")
        )  # fmt: skip
        saved = ops.grid_attention_forward(q, feat, scale, mask, dropout, seed, False)
        d_kept = torch.randn_like(saved[2]) if dropout else None
        inputs = (torch.randn_like(q), None, d_kept, q, feat, scale, mask, dropout, seed, False, *saved, True)
        torch.library.opcheck(ops.grid_attention_backward, inputs, test_utils=("test_schema", "test_faketensor"))
    meta = [t.to("meta") for t in (q, feat, scale, mask)]
    o, lse, kept, _ = ops.grid_attention_forward(*meta, 0.0, None, False)
    assert o.shape == q.shape and lse.dtype == torch.float64 and kept.numel() == 0


def test_compiles_without_a_graph_break(device):
    q, feat, scale, _ = (t if t is None else t.to(device) for t in grid_inputs(1, 4, 3, (5, 7), torch.float32))

    def attend(q):
        return grid_attention_unchecked(q, feat, scale)[0].square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = []
    for function in (attend, compiled):
        leaf = q.clone().requires_grad_()
        found.append(torch.autograd.grad(function(leaf), leaf)[0])
    assert torch.equal(*found)
