"""Attention's Triton kernels against the reference in float64: results, log-sum-exp and every gradient."""

import math

import pytest
import torch

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.kernels import cross_attention as kernels
from perceiver_fast.kernels.dense_tiles import cut
from perceiver_fast.kernels.launch import aligned_rows, share
from perceiver_fast.ops.cross_attention import (
    CROSS_ATTENTION,
    CrossAttentionCall,
    CrossAttentionFunction,
    cross_attention,
)
from perceiver_fast.reference.softmax import EMPTY_LSE

HALF = (torch.bfloat16, torch.float16)
NAMES = ("o", "lse", "dq", "dk", "dv")

# batch, heads, queries, tokens, channels of q and k, of v, masked, dropout
CASES = [
    (1, 1, 5, 7, 1, 1, False, 0.0),
    (2, 3, 17, 40, 8, 5, True, 0.0),
    (1, 2, 37, 70, 17, 33, False, 0.3),
    (2, 1, 33, 50, 96, 64, True, 0.3),
    (1, 1, 64, 128, 64, 64, False, 0.0),
    (1, 1, 9, 19, 261, 261, False, 0.0),
]
WIDE = [(1, 1, 3, 21, 322, 261, True, 0.2), (1, 1, 2, 17, 64, 704, False, 0.0), (1, 1, 2, 17, 512, 3, False, 0.0)]


def inputs(case, dtype, device, magnitude=1.0, seed=0):
    batch, heads, queries, tokens, dim, value_dim, masked, _ = case
    generator = torch.Generator().manual_seed(sum(case[:6]) + 1000 * seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    q = draw(batch, heads, queries, dim) * magnitude
    k, v = draw(batch, heads, tokens, dim), draw(batch, heads, tokens, value_dim)
    mask = draw(batch, tokens) > -0.5 if masked else None
    if masked:
        mask[:, 0] = True
    return [t.to(dtype) for t in (q, k, v)], mask, draw(batch, heads, queries, value_dim), draw(batch, heads, queries)


def run(function, tensors, mask, d_o, d_lse, dropout, dtype, inverted=False):
    """Output, log-sum-exp and gradients of one implementation in ``dtype``."""
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    seed = torch.tensor([12345, 7], device=d_o.device) if dropout else None
    o, lse = function(*tensors, mask, tensors[0].shape[-1] ** -0.5, dropout, seed, inverted)
    loss = (o * d_o.to(dtype)).sum() + (lse * d_lse).sum()
    return dict(zip(NAMES, [o, lse, *torch.autograd.grad(loss, tensors)]))


def errors(tensors, mask, d_o, d_lse, dropout, dtype, inverted=False):
    """Per result: error of the kernel and of plain PyTorch in the same dtype, in units of the truth's norm."""
    args = tensors, mask, d_o.to(dtype), d_lse, dropout
    exact = run(reference.cross_attention, *args, torch.float64, inverted)
    kernel, plain = (run(f, *args, dtype, inverted) for f in (CrossAttentionFunction.apply, reference.cross_attention))
    whole = math.sqrt(sum(exact[name].norm().item() ** 2 for name in NAMES[2:]))
    for name, truth in exact.items():
        size = max(truth.norm().item(), 1e-9 * whole)
        yield name, *((result[name].double() - truth).norm().item() / size for result in (kernel, plain))


def check(case, dtype, device, magnitude=1.0, inverted=False):
    floor = 5e-7 if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    for name, kernel, plain in errors(*inputs(case, dtype, device, magnitude), case[-1], dtype, inverted):
        assert kernel <= 2 * plain + floor, (name, kernel, plain)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_those_of_plain_pytorch(case, dtype, inverted, device):
    if inverted and case[2] * case[3] < 100:
        pytest.skip("so few weights, of which plain PyTorch may find the right bits by chance")
    check(case, dtype, device, inverted=inverted)


@pytest.mark.parametrize("case, inverted", [*((case, False) for case in WIDE), (WIDE[0], True)], ids=str)
def test_channels_beyond_what_registers_hold(case, inverted, device):
    check(case, torch.bfloat16, device, inverted=inverted)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_large_logits(case, inverted, device):
    check(case, torch.float32, device, 30.0, inverted)


@pytest.mark.parametrize("inverted", [False, True])
def test_extreme_logits(inverted, device):
    """Logits of thousands: a result hangs on how a few near-ties round, so the errors are compared over draws."""
    ratios = {}
    for seed in range(4):
        case = (1, 1, 32, 96, 16, 16, False, 0.0)
        drawn = inputs(case, torch.float32, device, 3000.0, seed)
        for name, kernel, plain in errors(*drawn, 0.0, torch.float32, inverted):
            ratios.setdefault(name, []).append(math.log((kernel + 5e-7) / (plain + 5e-7)))
    for name, logs in ratios.items():
        assert math.exp(sum(logs) / len(logs)) < 2, (name, logs)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("level", [1e4, -1e4, 1e8, -1e8])
def test_logits_all_far_from_zero(level, dtype, device):
    """No weight vanishes or overflows, whatever comes first; nor behind tokens that are masked."""
    q = torch.full((1, 1, 3, 4), math.sqrt(abs(level)) / 2, dtype=dtype, device=device)
    k = torch.full((1, 1, 90, 4), math.copysign(math.sqrt(abs(level)) / 2, level), dtype=dtype, device=device)
    v = torch.randn(1, 1, 90, 2, device=device).to(dtype)
    mask = torch.arange(90, device=device)[None] >= 70
    for hidden in (None, mask):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        o, lse = CrossAttentionFunction.apply(*tensors, hidden, 1.0, 0.0, None, False)
        exact, exact_lse = reference.cross_attention(q.double(), k.double(), v.double(), hidden, 1.0)
        assert (o - exact).abs().max() < 4 * torch.finfo(dtype).eps and (lse / exact_lse - 1).abs().max() < 1e-6
        for grad in torch.autograd.grad(o.square().sum() + lse.sum(), tensors):
            assert grad.isfinite().all()


def test_saturated_softmax_has_the_gradients_of_plain_pytorch(device):
    """One token far above the others: weights of one, whose tiny gradients must not drown in rounding."""
    (q, k, v), _, d_o, d_lse = inputs((1, 1, 40, 100, 16, 16, False, 0.0), torch.float32, device)
    q, k = q.abs(), k * 0.1
    k[0, 0, 7] = 6.0  # all queries agree on token 7
    for name, kernel, plain in errors([q, k, v], None, d_o, 0 * d_lse, 0.0, torch.float32):
        assert kernel <= 2 * plain + 5e-7, (name, kernel, plain)


def test_one_visible_token_has_no_gradient(device):
    """P is one, to the bit, or the correction makes it so: what the others would get is rounding."""
    (q, k, v), _, d_o, _ = inputs((1, 2, 20, 40, 16, 16, False, 0.0), torch.float32, device)
    mask = torch.arange(40, device=device)[None] == 7
    result = run(CrossAttentionFunction.apply, (q, k, v), mask, d_o, torch.zeros(1, 2, 20, device=device), 0.0, q.dtype)
    assert result["dq"].abs().max() < 1e-12 and result["dk"].abs().max() < 1e-12


def test_splits_cover_every_token():
    for length, tile, programs in ((1, 16, 1), (50176, 64, 8), (50176, 64, 300), (100, 64, 1), (4097, 32, 7)):
        splits, each = share(length, tile, programs, torch.device("cpu"))
        assert each % tile == 0 and (splits - 1) * each < length <= splits * each
        assert splits == 1 or splits * programs <= 2 * 132


def test_pieces_cover_every_channel():
    for channels in range(1, 800):
        for chunk, most in ((64, 256), (64, 192), (32, 128), (32, None)):
            pieces = cut(channels, chunk, most)
            covered = pieces.groups * (pieces.count * chunk + pieces.tail)
            assert channels <= covered < channels + max(16, pieces.groups * chunk, chunk)
            assert most is None or covered <= pieces.groups * (most + 16)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("queries, tokens", [(3, 1000), (300, 5)])
def test_split_walks_are_merged_the_same_way_every_time(queries, tokens, inverted, device):
    """Few queries: tokens are split; few tokens: queries are, for the gradients of keys and values."""
    case = (1, 1, queries, tokens, 8, 8, False, 0.1)
    check(case, torch.bfloat16, device, inverted=inverted)
    args = *inputs(case, torch.bfloat16, device), 0.1, torch.bfloat16, inverted
    first, second = (run(CrossAttentionFunction.apply, *args) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_views_are_read_as_they_lie(device):
    kv = torch.randn(2, 40, 2, 3, 16, device=device)
    k, v = kv.permute(2, 0, 3, 1, 4)
    q = torch.randn(1, 20, 3, 16, device=device).transpose(1, 2).expand(2, -1, -1, -1)
    assert all(aligned_rows(t) is t for t in (q, k, v))
    with pf.use_backend("triton"):
        expected = cross_attention(*(t.contiguous() for t in (q, k, v)))
        assert torch.equal(cross_attention(q, k, v), expected)
        flipped = torch.randn(2, 3, 16, 40, device=device).transpose(2, 3)  # channels are not dense
        assert torch.equal(cross_attention(q, k, flipped), cross_attention(q, k, flipped.contiguous()))
        mask = torch.rand(40, 2, device=device).T > 0.5
        assert torch.equal(cross_attention(q, k, v, mask), cross_attention(q, k, v, mask.contiguous()))


def test_scales_of_any_sign(device):
    q, k, v = (torch.randn(1, 2, n, 8, device=device) for n in (6, 30, 30))
    with pf.use_backend("triton"):
        for scale in (0.0, -0.7):
            expected, _ = reference.cross_attention(q.double(), k.double(), v.double(), None, scale)
            assert (cross_attention(q, k, v, scale=scale) - expected).abs().max() < 1e-5


def test_masked_rows_and_single_tokens(device):
    q, k, v = (torch.randn(3, 2, n, 8, device=device, requires_grad=True) for n in (6, 50, 50))
    mask = torch.zeros(3, 50, dtype=torch.bool, device=device)
    mask[1, 4] = mask[2, 10:] = True
    with pf.use_backend("triton"):
        o, lse = cross_attention(q, k, v, mask, return_lse=True)
    exact, exact_lse = reference.cross_attention(*(t.detach().double() for t in (q, k, v)), mask)
    assert (o - exact).abs().max() < 1e-5 and (lse - exact_lse)[1:].abs().max() < 1e-5
    assert (lse[0] == EMPTY_LSE).all()
    dq, dk = torch.autograd.grad(o.square().sum(), (q, k))
    assert dq[0].abs().max() < 1e-12 and dk[0].abs().max() < 1e-12 and not dk[2, :, :10].any()


def test_inverted_attention_to_nothing_is_zero(device):
    """Of an element that is all masked; a normaliser of less than 1e-8 counts as that."""
    q, k, v = (torch.randn(2, 1, n, 8, device=device) for n in (6, 50, 50))
    mask = torch.ones(2, 50, dtype=torch.bool, device=device)
    mask[0] = False
    k[1, ..., 0] = 3.0
    q[1, 0, 0] = -22 * torch.eye(8, device=device)[0]  # the last that any token belongs to
    tensors = [t.requires_grad_() for t in (q, k, v)]
    with pf.use_backend("triton"):
        out = cross_attention(*tensors, mask, inverted=True)
    grads = torch.autograd.grad(out.square().sum(), tensors)
    assert not out[0].any() and all(not grad[0].any() for grad in grads)
    twins = [t.detach()[1:].double().requires_grad_() for t in tensors]
    exact, lse = reference.cross_attention(*twins, inverted=True)
    assert lse[0, 0, 0] < math.log(1e-8)
    for mine, true in zip((out, *grads), (exact, *torch.autograd.grad(exact.square().sum(), twins))):
        assert (mine[1] - true[0]).norm() <= 1e-5 * true.norm()


def test_a_token_that_one_query_has_all_of_has_no_gradient(device):
    """A is one up to rounding, and what the softmax over the queries leaves of the gradients is rounding, times 1 / T."""
    q, k, v = (torch.randn(1, 1, n, 8, device=device) for n in (6, 50, 50))
    q[..., 2, :] = 2000 * torch.eye(8, device=device)[0]
    k[..., 0] = 1.0
    tensors = [t.requires_grad_() for t in (q, k, v)]
    out, _ = CrossAttentionFunction.apply(*tensors, None, 1.0, 0.0, None, True)
    dq, dk, dv = torch.autograd.grad((out * torch.randn_like(out)).sum(), tensors)
    assert dq.abs().max() < 1e-12 * dv.abs().max() and dk.abs().max() < 1e-9 * dv.abs().max() > 0


@pytest.mark.parametrize("inverted", [False, True])
def test_nothing_to_attend(inverted, device):
    k = torch.randn(2, 1, 5, 4, device=device)
    with pf.use_backend("triton"):
        assert cross_attention(torch.randn(2, 1, 0, 4, device=device), k, k, inverted=inverted).shape == (2, 1, 0, 4)
        q = torch.randn(0, 1, 3, 4, device=device, requires_grad=True)
        cross_attention(q, k[:0], k[:0], inverted=inverted).sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("dropout, inverted", [(0.0, False), (0.3, False), (0.3, True)])
def test_opcheck(dropout, inverted, device):
    (q, k, v), mask, _, _ = inputs((2, 2, 5, 9, 4, 3, True, dropout), torch.float32, device)
    args = (q, k, v, mask, 0.5, dropout, torch.tensor([7], device=device) if dropout else None, inverted)
    ops = torch.ops.perceiver_fast
    torch.library.opcheck(ops.cross_attention_forward.default, args)
    o, lse, token_lse = ops.cross_attention_forward(*args)
    for d_lse in (None,) if inverted else (None, torch.randn_like(lse)):
        for to_tokens in (False, True):
            call = (torch.randn_like(o), d_lse, *args, o, lse, token_lse, to_tokens)
            torch.library.opcheck(ops.cross_attention_backward.default, call)


@pytest.mark.parametrize("inverted", [False, True])
def test_tokens_that_do_not_learn(inverted, device):
    """The queries' gradients are the same; those of keys and values are not computed."""
    (q, k, v), mask, _, _ = inputs((2, 2, 5, 40, 4, 3, True, 0.0), torch.float32, device)
    q.requires_grad_()
    (alone,) = torch.autograd.grad(cross_attention(q, k, v, mask, inverted=inverted).square().sum(), q)
    k, v = k.clone().requires_grad_(), v.clone().requires_grad_()
    with_others, *_ = torch.autograd.grad(cross_attention(q, k, v, mask, inverted=inverted).square().sum(), (q, k, v))
    assert torch.equal(alone, with_others)


def test_compiles_in_one_graph(device):
    q, k, v = (torch.randn(1, 2, n, 8, device=device, requires_grad=True) for n in (6, 20, 20))

    def loss(q, k, v):
        o, lse = cross_attention(q, k, v, return_lse=True)
        return o.square().sum() + lse.sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    actual = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(q, k, v), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(actual, expected))


def test_the_registered_op_refuses_what_it_cannot_compute(device):
    q, k = torch.randn(2, 1, 5, 4, device=device), torch.randn(2, 1, 9, 4, device=device)
    forward = torch.ops.perceiver_fast.cross_attention_forward
    for bad in ((q, k, k, None, 1.0, 0.5, None, True), (q, k, k, None, -1.0, 0.0, None, False)):
        with pytest.raises(RuntimeError, match="expected"):
            forward(*bad)


def test_double_precision_goes_to_the_reference(device):
    assert CROSS_ATTENTION.choose(CrossAttentionCall(torch.float32, device, inverted=True)).backend == "triton"
    double = CROSS_ATTENTION.choose(CrossAttentionCall(torch.float64, device, lse=True))
    assert double.backend == "reference" and "float64" in double.rejected["triton"][0]


def test_launches_are_the_same_on_tensors_without_content():
    """What is compiled ahead of time is made from them."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (torch.empty(1, 1, n, 64, dtype=dtype, device="meta") for n in (4, 640))
        o, lse, launches = kernels.forward_launches(q, k, k, None, 1.0, 0.0, None, 90)
        assert o.shape == q.shape and lse.shape == q.shape[:3]
        assert [launch.kernel.__name__ for launch in launches] == [
            "cross_attention_fwd_kernel",
            "cross_attention_merge_kernel",
        ]
