"""Grid attention with dropout and inverted attention: the kernels' errors against the reference in float64."""

import math
import os

import pytest
import torch
from support import check_over_draws, grid_inputs, needs_extension, relative_error
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.ops.grid_attention import GridAttentionFunction, grid_attention, grid_attention_unchecked

pytestmark = pytest.mark.skipif(**needs_extension)

# batch, heads, queries, features, sizes, masked
CASES = [
    (1, 1, 5, 4, (7,), False),
    (2, 3, 9, 3, (13, 5), True),
    (1, 2, 70, 1, (40, 37), False),
    (2, 1, 33, 5, (3, 4, 17), True),
    (1, 1, 16, 3, (60, 70), True),
]
WEIGHTS = [(0.3, False), (0.0, True), (0.3, True)]  # dropout, inverted
SEED = torch.tensor([12345])


def errors(case, dropout, inverted, dtype, magnitude=1.0, seed=0):
    """Per result: error of the kernel and of plain PyTorch in ``dtype``, relative to the truth."""
    batch, heads, queries, features, sizes, masked = case
    q, feat, scale, mask = grid_inputs(batch, heads * queries, features, sizes, dtype, masked, magnitude, seed)
    if inverted:
        q = q.unflatten(1, (heads, queries)).flatten(0, 1)
    d_o, d_lse, d_kept = torch.randn(q.shape), torch.randn(q.shape[:2]).double(), torch.randn(q.shape[:2])
    if masked and batch > 1:
        d_lse[: 1 if not inverted else heads] = 0  # the first batch element is all masked: its lse is a sentinel

    def run(function, dtype):
        tensors = [t.to(dtype).requires_grad_() for t in (q, feat, scale)]
        o, lse, kept = function(*tensors, mask, dropout, SEED if dropout else None, inverted)
        loss = (o * d_o.to(dtype)).sum() + (kept * d_kept.to(dtype)).sum()
        if not inverted:
            loss = loss + (lse * d_lse).sum()
        if masked and batch > 1:
            lse = lse[1:]
        return dict(
            zip(("o", "lse", "kept", "dq", "dfeat", "dscale"), [o, lse, kept, *torch.autograd.grad(loss, tensors)])
        )

    exact = run(reference.grid_attention, torch.float64)
    kernel, plain = run(GridAttentionFunction.apply, dtype), run(reference.grid_attention, dtype)
    # Gradients that are a millionth of the others are the rounding of the others.
    whole = math.sqrt(sum(exact[name].norm().item() ** 2 for name in ("dq", "dfeat", "dscale")))
    for name, truth in exact.items():
        size = max(truth.norm().item(), 1e-6 * whole)
        yield name, *((result[name].double() - truth).norm().item() / size for result in (kernel, plain))


@pytest.mark.parametrize("dropout, inverted", WEIGHTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_exact(case, dropout, inverted):
    for name, kernel, _ in errors(case, dropout, inverted, torch.float64):
        assert kernel < 1e-12, name


@pytest.mark.parametrize("dropout, inverted", WEIGHTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_error_is_that_of_plain_pytorch(case, dropout, inverted):
    rows = (row for seed in range(4) for row in errors(case, dropout, inverted, torch.float32, seed=seed))
    check_over_draws(rows, 1e-6)


@pytest.mark.parametrize("magnitude", [10.0, 1000.0])
@pytest.mark.parametrize("dropout, inverted", WEIGHTS[:2])
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_large_logits(case, dropout, inverted, magnitude):
    """Logits of thousands: a result hangs on how a few near-ties round, so the errors are compared over many draws."""
    seeds = range(16)
    rows = (row for seed in seeds for row in errors(case, dropout, inverted, torch.float32, magnitude, seed))
    check_over_draws(rows, 1e-6)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if isa not in pf.extension.module.available_isas():
        pytest.skip(f"this CPU or build has no {isa}")
    code = "import torch, test_grid_attention_weights as t; torch.set_num_threads(1)\n"
    code += "for case in t.CASES:\n  for weights in t.WEIGHTS:\n    t.test_float64_is_exact(case, *weights)\n"
    code += "    t.test_float32_error_is_that_of_plain_pytorch(case, *weights)\n"
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PERCEIVER_FAST_CPU_ISA": isa, "PYTHONPATH": path}
    done = python("-c", code, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("dropout, inverted", WEIGHTS)
def test_any_number_of_threads(threads, dropout, inverted):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for case in ((1, 1, 9, 3, (90, 80), True), (1, 1, 40, 1, (3000,), False)):
            for name, kernel, plain in errors(case, dropout, inverted, torch.float32):
                assert kernel < 1e-5, name
    finally:
        torch.set_num_threads(before)


def test_the_same_weights_fall_as_on_built_keys():
    """For one seed grid attention and attention over built keys and values drop the same weights."""
    q, feat, scale, _ = grid_inputs(2, 6, 2, (5, 4), torch.float64)
    torch.manual_seed(5)
    o, _, kept = grid_attention_unchecked(q, feat, scale, dropout=0.4)
    keys = _basis(feat) * scale.flatten(1).unsqueeze(-1)
    torch.manual_seed(5)
    expected = pf.ops.cross_attention(q[:, None], keys[:, None], keys[:, None], dropout=0.4, scale=1.0)[:, 0]
    assert relative_error(o, expected) < 1e-12
    assert (kept - 1).abs().max() > 0.01


def test_inverted_attention_to_nothing_is_zero():
    q, feat, scale, mask = grid_inputs(2, 6, 3, (5, 4), torch.float64, masked=True)
    o, _, kept = grid_attention_unchecked(q, feat, scale, mask, inverted=True)
    assert not o[0].any() and not kept[0].any() and relative_error(kept[1], torch.ones_like(kept[1])) < 1e-12


def test_one_query_alone_has_no_gradient():
    q, feat, scale, _ = grid_inputs(1, 2, 3, (5, 4), torch.float32)
    q.requires_grad_()
    grid_attention_unchecked(q, feat, scale, inverted=True, heads=2)[0].square().sum().backward()
    assert not q.grad.any()


def test_public_op():
    q_feat, q_axes = torch.randn(2, 5, 3), (torch.randn(2, 5, 4), torch.randn(2, 5, 6))
    feat, scale = torch.randn(2, 24, 3), torch.rand(2, 24) + 0.5
    torch.manual_seed(1)
    kernel = grid_attention(q_feat, q_axes, feat, scale, dropout=0.3, inverted=True)
    torch.manual_seed(1)
    with pf.use_backend("reference"):
        plain = grid_attention(q_feat, q_axes, feat, scale, dropout=0.3, inverted=True)
    assert relative_error(kernel[0], plain[0]) < 1e-5 and relative_error(kernel[1][1], plain[1][1]) < 1e-5
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        grid_attention(q_feat, q_axes, feat, scale, dropout=-0.1)


def _basis(feat):
    """``[feat, onehot(row), onehot(column)]`` of every token of a 2-d grid, ``[B, M, L]``."""
    batch, rows, columns, _ = feat.shape
    row = torch.eye(rows, dtype=feat.dtype).view(1, rows, 1, rows).expand(batch, rows, columns, rows)
    column = torch.eye(columns, dtype=feat.dtype).view(1, 1, columns, columns).expand(batch, rows, columns, columns)
    return torch.cat([feat, row, column], -1).flatten(1, 2)
