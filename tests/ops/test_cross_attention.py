"""Streaming attention on built keys and values: errors against the reference in float64, on every option and shape."""

import math
import os
import subprocess
import sys

import pytest
import torch
from support import check_over_draws, needs_extension, relative_error
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.ops.cross_attention import CrossAttentionFunction, cross_attention
from perceiver_fast.reference.softmax import EMPTY_LSE

pytestmark = pytest.mark.skipif(**needs_extension)

# batch, heads, queries, tokens, channels of q and k, channels of v, masked
CASES = [
    (1, 1, 5, 7, 4, 4, False),
    (2, 3, 40, 300, 8, 5, True),
    (1, 2, 70, 130, 17, 33, False),
    (2, 1, 300, 50, 261, 3, True),
    (1, 1, 1, 513, 16, 16, False),
    (1, 2, 513, 1, 16, 16, False),
    (1, 1, 33, 1000, 64, 64, True),
    (1, 1, 64, 257, 1, 1, False),
    (3, 1, 31, 128, 322, 322, False),
    (1, 2, 17, 17, 8, 8, False),  # a few latents to one another: every head by itself
    (2, 3, 64, 64, 5, 5, False),
    (16, 4, 200, 200, 8, 8, False),  # and more of them, of many heads
]
WEIGHTS = [(0.0, False), (0.3, False), (0.0, True), (0.3, True)]  # dropout, inverted
SEED = torch.tensor([12345])


def inputs(case, dtype, magnitude=1.0, seed=0):
    batch, heads, queries, tokens, dim, dim_v, masked = case
    generator = torch.Generator().manual_seed(sum(case) + 1000 * seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (
        draw(batch, heads, queries, dim) * magnitude,
        draw(batch, heads, tokens, dim),
        draw(batch, heads, tokens, dim_v),
    )
    mask = draw(batch, tokens) > -0.5 if masked else None
    if masked:
        mask[:, 0] = True
    return (
        (q.to(dtype), k.to(dtype), v.to(dtype)),
        mask,
        draw(batch, heads, queries, dim_v),
        draw(batch, heads, queries),
    )


def run(function, tensors, mask, d_o, d_lse, dropout, inverted, dtype):
    """Output, log-sum-exp and gradients of one implementation in ``dtype``."""
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    o, lse = function(*tensors, mask, tensors[0].shape[-1] ** -0.5, dropout, SEED if dropout else None, inverted)
    loss = (o * d_o.to(dtype)).sum()
    if not inverted:
        loss = loss + (lse * d_lse).sum()
    return dict(zip(("o", "lse", "dq", "dk", "dv"), [o, lse, *torch.autograd.grad(loss, tensors)]))


def errors(case, dropout, inverted, dtype, magnitude=1.0, seed=0):
    """Per result: norm of the truth, error of the kernel and of plain PyTorch in the same dtype, in units of it."""
    tensors, mask, d_o, d_lse = inputs(case, dtype, magnitude, seed)
    args = (tensors, mask, d_o, d_lse, dropout, inverted)
    exact = run(reference.cross_attention, *args, torch.float64)
    kernel, plain = run(CrossAttentionFunction.apply, *args, dtype), run(reference.cross_attention, *args, dtype)
    whole = math.sqrt(sum(exact[name].norm().item() ** 2 for name in ("dq", "dk", "dv")))
    for name, truth in exact.items():
        size = max(truth.norm().item(), 1e-9 * whole)
        yield name, *((result[name].double() - truth).norm().item() / size for result in (kernel, plain))


@pytest.mark.parametrize("dropout, inverted", WEIGHTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_exact(case, dropout, inverted):
    for name, kernel, _ in errors(case, dropout, inverted, torch.float64):
        # Where one query or one token leaves nothing to choose, gradients are rounding, here against 1e-9 of the whole.
        assert kernel < (1e-12 if min(case[2:4]) > 1 else 1e-6), name


ORDINARY = [case for case in CASES if min(case[2:4]) > 1]


def check(case, dropout, inverted, magnitude, draws):
    seeds = range(draws)
    rows = (row for seed in seeds for row in errors(case, dropout, inverted, torch.float32, magnitude, seed))
    check_over_draws(rows, 5e-7)


@pytest.mark.parametrize("magnitude", [1.0, 30.0])
@pytest.mark.parametrize("dropout, inverted", WEIGHTS)
@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_float32_error_is_that_of_plain_pytorch(case, dropout, inverted, magnitude):
    """Over few draws, and over many of a few dozen weights, where plain PyTorch may find the right bits by chance."""
    check(case, dropout, inverted, magnitude, 32 if case[2] * case[3] < 100 else 4)


# Not both: a query that holds a single token then has a gradient of zero, which plain PyTorch finds exactly and the kernel
# up to rounding of the weights' gradients.
@pytest.mark.parametrize("dropout, inverted", WEIGHTS[:3])
@pytest.mark.parametrize("case", [case for case in ORDINARY if case[3] > 100], ids=str)
def test_extreme_logits(case, dropout, inverted):
    """Logits of thousands: a result hangs on how a few near-ties round, so the errors are compared over many draws, and
    where there are many tokens."""
    check(case, dropout, inverted, 3000.0, 32)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if isa not in pf.extension.module.available_isas():
        pytest.skip(f"this CPU or build has no {isa}")
    if isa == pf.extension.module.active_isa():
        return  # what this process runs
    code = "import torch, test_cross_attention as t; torch.set_num_threads(1)\n"
    code += "for case in t.CASES:\n  for weights in t.WEIGHTS:\n"
    code += "    if min(case[2:4]) > 1: t.test_float64_is_exact(case, *weights)\n"
    code += "    if min(case[2:4]) > 1: t.test_float32_error_is_that_of_plain_pytorch(case, *weights, 30.0)\n"
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PERCEIVER_FAST_CPU_ISA": isa, "PYTHONPATH": path}
    done = python("-c", code, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_saturated_softmax_has_the_gradients_of_plain_pytorch():
    """One token far above the others: weights of one, whose tiny gradients must not drown in rounding."""
    tensors, mask, d_o, d_lse = inputs((1, 1, 40, 200, 16, 16, False), torch.float32)
    q, k, v = tensors
    q, k = q.abs(), k * 0.1
    k[0, 0, 7] = 6.0  # all queries agree on token 7
    args = ((q, k, v), None, d_o, 0 * d_lse, 0.0, False)
    exact = run(reference.cross_attention, *args, torch.float64)
    kernel, plain = (run(f, *args, torch.float32) for f in (CrossAttentionFunction.apply, reference.cross_attention))
    for name in ("dq", "dk"):
        assert 0 < exact[name].norm() < 1e-2 * exact["dv"].norm()
        assert relative_error(kernel[name], exact[name]) <= 2 * relative_error(plain[name], exact[name]) + 5e-7


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("dropout, inverted", WEIGHTS)
def test_any_number_of_threads(threads, dropout, inverted):
    """The same bits for the same number of threads, the same weights dropped for any, and no token lost."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for case in ((1, 1, 9, 5000, 8, 8, True), (1, 1, 3000, 40, 8, 8, False), (2, 2, 70, 700, 8, 8, True)):
            tensors, mask, d_o, d_lse = inputs(case, torch.float32)
            args = (tensors, mask, d_o, d_lse, dropout, inverted)
            first, second = (run(CrossAttentionFunction.apply, *args, torch.float32) for _ in range(2))
            exact = run(reference.cross_attention, *args, torch.float64)
            for name in exact:
                assert torch.equal(first[name], second[name])
                assert relative_error(first[name], exact[name]) < 1e-5
    finally:
        torch.set_num_threads(before)


def test_dropout_statistics():
    """Every weight falls with the probability asked for, independently of its neighbours and of other heads."""
    rows, tokens, p = 512, 2048, 0.2
    keep = reference.dropout_keep(torch.tensor([7]), rows, tokens, p).double()
    dropped = 1 - keep
    assert abs(dropped.mean() - p) < 5 * math.sqrt(p * (1 - p) / dropped.numel())
    spread = math.sqrt(p * (1 - p))
    for along in (0, 1):  # means of rows and of columns scatter as those of independent draws
        means = dropped.mean(along)
        ratio = means.std() / (spread / math.sqrt(dropped.shape[along]))
        assert abs(ratio - 1) < 5 / math.sqrt(2 * means.numel())
    z = (dropped - p) / spread
    for shift in ((0, 1), (1, 0), (1, 1), (0, 16), (16, 0), (3, 5)):
        correlation = (z * torch.roll(z, shift, (0, 1))).mean()
        assert abs(correlation) < 5 / math.sqrt(z.numel()), shift
    other = reference.dropout_keep(torch.tensor([8]), rows, tokens, p).double()
    assert abs(((1 - other - p) / spread * z).mean()) < 5 / math.sqrt(z.numel())


def test_dropout_follows_torchs_generator():
    q, k, v = (torch.randn(1, 2, n, 8) for n in (6, 50, 50))
    torch.manual_seed(3)
    first, second = cross_attention(q, k, v, dropout=0.5), cross_attention(q, k, v, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(cross_attention(q, k, v, dropout=0.5), first) and not torch.equal(first, second)
    torch.manual_seed(3)
    with pf.use_backend("reference"):  # drops the same weights
        assert relative_error(cross_attention(q, k, v, dropout=0.5), first) < 1e-6
    mean = sum(cross_attention(q, k, v, dropout=0.5) for _ in range(400)) / 400
    assert relative_error(mean, cross_attention(q, k, v)) < 0.25


def test_inverted_attention_to_nothing_is_zero():
    q, k, v = (torch.randn(2, 1, n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 50, 50))
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0] = False
    out = cross_attention(q, k, v, mask, inverted=True)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and not out[1].eq(0).any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.square().sum(), (q, k, v)))


@pytest.mark.parametrize("return_lse", [False, True])
def test_masked_rows_and_single_tokens(return_lse):
    """A row that is all masked is uniform and has no gradient in q; so does one token, but for its log-sum-exp."""
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 50, 50))
    mask = torch.zeros(3, 50, dtype=torch.bool)
    mask[1, 4] = mask[2, 10:] = True
    result = cross_attention(q, k, v, mask, return_lse=return_lse)
    o, lse = result if return_lse else (result, None)
    assert relative_error(o[0], v[0].mean(1, keepdim=True).expand_as(o[0])) < 1e-14
    assert relative_error(o[1], v[1, :, 4:5].expand_as(o[1])) < 1e-14
    dq, dk = torch.autograd.grad(o.square().sum(), (q, k))
    assert dq[:2].abs().max() < 1e-14 and dk[:2].abs().max() < 1e-14
    if return_lse:
        exact_o, exact_lse = reference.cross_attention(q, k, v, mask)
        assert relative_error(lse[1:], exact_lse[1:]) < 1e-14 and (lse[0] == EMPTY_LSE).all()
    else:
        assert dq[:2].abs().max() == 0


def test_gradcheck():
    (q, k, v), mask, _, _ = inputs((2, 2, 5, 9, 4, 3, True), torch.float64)
    grads = tuple(t.requires_grad_() for t in (q, k, v))
    assert torch.autograd.gradcheck(lambda *a: cross_attention(*a, mask, return_lse=True), grads)
    assert torch.autograd.gradcheck(lambda *a: cross_attention(*a, mask, inverted=True), grads)


def test_memory_is_linear():
    """An N x M matrix of these would be 1 GiB."""
    code = """
import resource, torch
from perceiver_fast.ops import cross_attention
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 1, 16384, 16, requires_grad=True) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cross_attention(q, k, v, dropout=0.1).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < 200, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [-60.0, -90.0, -1e3, -1e4, 1e4])
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_logits_all_far_from_zero(tokens, level, dtype):
    """A first tile of weights that vanish beside one, or overflow, without a shift; also behind tiles that are masked."""
    q = torch.ones(1, 1, 3, 4, dtype=dtype, requires_grad=True)
    k = (
        (torch.full((1, 1, tokens + 256, 4), level / 4) + torch.randn(1, 1, tokens + 256, 1) * 1e-2)
        .to(dtype)
        .requires_grad_()
    )
    v = torch.randn(1, 1, tokens + 256, 2, dtype=dtype, requires_grad=True)
    hidden = torch.ones(1, tokens + 256, dtype=torch.bool)
    hidden[:, :256] = False
    for mask in (None, hidden):
        out, lse = cross_attention(q, k, v, mask, scale=1.0, return_lse=True)
        exact, exact_lse = reference.cross_attention(q.double(), k.double(), v.double(), mask, 1.0)
        tolerance = max(abs(level), 1) * torch.finfo(dtype).eps * 16
        assert relative_error(out, exact) < tolerance and relative_error(lse, exact_lse) < tolerance
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v)))


def test_one_query_alone_has_no_gradient_when_inverted():
    q, k = torch.randn(1, 2, 1, 4, requires_grad=True), torch.randn(1, 2, 50, 4, requires_grad=True)
    dq, dk = torch.autograd.grad(cross_attention(q, k, k.detach(), inverted=True).square().sum(), (q, k))
    assert not dq.any() and not dk.any()


@pytest.mark.parametrize("dropout, inverted", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_that_do_not_learn(case, dtype, dropout, inverted, threads):
    """The queries' gradients, bit for bit; those of keys and values are not computed."""
    (q, k, v), mask, *_ = inputs(case, dtype)

    def grads(*leaves):
        torch.manual_seed(5)
        if inverted:  # its log-sum-exp has no gradient
            return torch.autograd.grad(cross_attention(q, k, v, mask, dropout, inverted).square().sum(), leaves)
        o, lse = cross_attention(q, k, v, mask, dropout, return_lse=True)
        return torch.autograd.grad(o.square().sum() + lse.clamp(min=-1e30).sum(), leaves)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q.requires_grad_()
        (alone,) = grads(q)
        k.requires_grad_(), v.requires_grad_()
        assert torch.equal(alone, grads(q, k, v)[0])
    finally:
        torch.set_num_threads(before)
