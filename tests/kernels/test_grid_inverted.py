"""Inverted grid attention's Triton kernels against the reference in float64: results, weight sums and every gradient."""

import math

import pytest
import torch
from support import check_over_draws

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.ops.grid_attention import GridAttentionFunction, grid_attention_unchecked

NAMES = ("o", "lse", "kept", "dq", "dfeat", "dscale")
# batch, heads, queries, features, sizes, masked, dropout
CASES = [
    (1, 1, 5, 3, (7,), False, 0.0),
    (2, 2, 13, 3, (9, 13), True, 0.0),
    (1, 1, 40, 3, (3, 34), False, 0.3),  # more than a block of queries and of columns
    (1, 2, 8, 6, (3, 4, 5), True, 0.2),
    (2, 1, 9, 12, (4, 35), True, 0.0),  # channels in products
    (1, 1, 3, 1, (40, 3), False, 0.0),  # splits of the rows
]


def inputs(case, device, magnitude=1.0, seed=0):
    batch, heads, queries, features, sizes, masked, dropout = case
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    q = draw(batch * heads, queries, features + sum(sizes)) * magnitude
    feat = draw(batch, *sizes, features).bfloat16().float()  # exact in all dtypes: what is measured is the arithmetic
    mask = draw(batch, *sizes) > -0.5 if masked else None
    return (q, feat, draw(batch, *sizes).abs() + 0.5), mask, (draw(*q.shape), draw(*q.shape[:2]), draw(*q.shape[:2]))


def run(function, tensors, mask, weights, dropout, dtype, raw=None):
    """Results and gradients of one implementation in ``dtype``, and of raw channels in ``raw``."""
    q, feat, scale = (t.to(dtype).requires_grad_() for t in tensors)
    seed = torch.tensor([12345, 7], device=q.device) if dropout else None  # of tokens from the eighth on
    o, lse, kept = function(q, feat.to(raw or dtype), scale, mask, dropout, seed, True)
    loss = (o * weights[0].to(dtype)).sum() + (kept * weights[1].to(dtype)).sum() + (lse * weights[2]).sum()
    return dict(zip(NAMES, (o, lse, kept, *torch.autograd.grad(loss, (q, feat, scale)))))


def errors(case, device, magnitude=1.0, raw=torch.float32, seed=0):
    """Per result: error of the kernels and of plain PyTorch, of raw channels in ``raw``, in units of the truth's norm."""
    given = *inputs(case, device, magnitude, seed), case[-1]
    exact = run(reference.grid_attention, *given, torch.float64)
    kernel = run(GridAttentionFunction.apply, *given, torch.float32, raw)
    plain = run(reference.grid_attention, *given, raw)
    whole = math.sqrt(sum(exact[name].norm().item() ** 2 for name in NAMES[3:]))
    for name, truth in exact.items():
        size = max(truth.norm().item(), 1e-9 * whole)
        yield name, *((result[name].double() - truth).norm().item() / size for result in (kernel, plain))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_those_of_plain_pytorch(case, device):
    for name, kernel, plain in errors(case, device):
        assert kernel <= 2 * plain + 5e-7, (name, kernel, plain)


@pytest.mark.parametrize("case", CASES[2:4], ids=str)
def test_raw_channels_in_half_precision(case, device):
    for name, kernel, plain in errors(case, device, raw=torch.bfloat16):
        assert kernel <= plain + 2e-3, (name, kernel, plain)


@pytest.mark.parametrize("magnitude", [30.0, 3000.0])
def test_large_logits(magnitude, device):
    """A result hangs on how a few near-ties round, so the errors are compared over draws."""
    check_over_draws((row for seed in range(4) for row in errors(CASES[2], device, magnitude, seed=seed)), 5e-7)


def test_nothing_seen_is_nothing(device):
    """Of an element that is all masked, whatever its tokens are."""
    (q, feat, scale), mask, weights = inputs(CASES[1], device)
    mask[0] = False
    feat[0, 0, 0], scale[0] = math.nan, math.inf
    found = run(GridAttentionFunction.apply, (q, feat, scale), mask, weights, 0.0, torch.float32)
    assert not found["o"][:2].any() and not found["kept"][:2].any()
    assert not any(found[name][:1].any() for name in ("dq", "dfeat", "dscale")) and found["dq"][2:].any()
    assert (found["lse"][:2] - math.log(torch.finfo(torch.float32).tiny)).abs().max() < 1e-4


def test_the_same_every_time_and_queries_shared_by_the_batch(device):
    (q, feat, scale), mask, _ = inputs(CASES[4], device)
    with pf.use_backend("triton"):
        first, second, alone = (
            grid_attention_unchecked(t, feat, scale, mask, inverted=True)[0]
            for t in (q[:1].expand(2, -1, -1), q[:1].repeat(2, 1, 1), q[:1].repeat(2, 1, 1))
        )
    assert torch.equal(first, second) and torch.equal(second, alone)


def test_registered_ops(device):
    (q, feat, scale), mask, _ = inputs((1, 2, 3, 2, (2, 3), True, 0.2), device)
    ops, tests = torch.ops.perceiver_fast, ("test_schema", "test_faketensor")
    call = (q, feat, scale, mask, 0.2, torch.tensor([3], device=device), True)
    torch.library.opcheck(ops.grid_attention_forward, call, test_utils=tests)
    saved = ops.grid_attention_forward(*call)
    for d_kept in (None, torch.randn_like(saved[2])):
        backward = (
            torch.randn_like(q),
            None if d_kept is None else torch.randn_like(saved[1]),
            d_kept,
            *call,
            *saved,
            d_kept is None,
        )  # with gradients of tokens, and without
        torch.library.opcheck(ops.grid_attention_backward, backward, test_utils=tests)


def test_nothing_to_attend_with(device):
    (q, feat, scale), _, _ = inputs(CASES[1], device)
    with pf.use_backend("triton"):
        o, lse, kept = grid_attention_unchecked(q[:, :0].requires_grad_(), feat, scale, inverted=True, heads=2)
    assert o.shape == (4, 0, q.shape[2]) and lse.shape == kept.shape == (4, 0)
