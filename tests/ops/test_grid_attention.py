"""The op against its reference in float64: values, gradients, every ISA, and everything around the kernel."""

import math
import os
import threading

import pytest
import torch
from support import check_over_draws, grid_inputs, needs_extension, relative_error
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import extension, reference
from perceiver_fast.ops import grid_attention
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.reference.softmax import EMPTY_LSE

pytestmark = pytest.mark.skipif(**needs_extension)

# batch, queries, features, sizes, masked
CASES = [
    (1, 1, 1, (1,), False),
    (1, 1, 1, (1, 1), True),
    (2, 5, 3, (7,), False),
    (1, 16, 3, (16, 16), False),
    (2, 37, 3, (9, 13), True),
    (1, 17, 4, (31, 140), False),
    (2, 33, 2, (130, 33), True),
    (1, 8, 5, (3, 4, 5), False),
    (1, 7, 1, (1, 5, 1, 6), True),
    (1, 4, 65, (5, 2, 3, 4), False),
    (3, 18, 9, (6, 129), True),
    (1, 3, 3, (2, 3, 1, 2, 2), False),
]


def run(function, q, feat, scale, mask, d_o, d_lse):
    q, feat, scale = (t.clone().requires_grad_() for t in (q, feat, scale))
    o, lse = function(q, feat, scale, mask)[:2]
    gradients = torch.autograd.grad((o * d_o).sum() + (lse * d_lse).sum(), (q, feat, scale))
    return {"o": o, "lse": lse, **dict(zip(("dq", "dfeat", "dscale"), gradients))}


def errors(dtype, case, magnitude=1.0, seed=0):
    """Errors of the kernel and of plain PyTorch in ``dtype``, both against the reference in float64."""
    batch, queries, features, sizes, masked = case
    q, feat, scale, mask = grid_inputs(batch, queries, features, sizes, dtype, masked, magnitude, seed)
    d_o = torch.randn(q.shape, dtype=torch.float64).to(dtype)
    d_lse = torch.randn(q.shape[:2], dtype=torch.float64)
    visible = torch.ones(batch, dtype=torch.bool) if mask is None else mask.flatten(1).any(1)
    d_lse[~visible] = 0  # the lse of an all-masked row is a sentinel
    exact = run(reference.grid_attention, *(t.double() for t in (q, feat, scale)), mask, d_o.double(), d_lse)
    kernel = run(grid_attention_unchecked, q, feat, scale, mask, d_o, d_lse)
    plain = run(reference.grid_attention, q, feat, scale, mask, d_o, d_lse)
    for result in (exact, kernel, plain):
        result["lse"] = result["lse"][visible]
    return {k: (relative_error(kernel[k], exact[k]), relative_error(plain[k], exact[k])) for k in exact}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_exact(case):
    for name, (kernel, _) in errors(torch.float64, case).items():
        assert kernel < 1e-13, name


def check(case, magnitude, floor, draws):
    found = [errors(torch.float32, case, magnitude, seed) for seed in range(draws)]
    check_over_draws(((name, *pair) for rows in found for name, pair in rows.items()), floor)


@pytest.mark.parametrize("magnitude", [1.0, 8.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_error_is_that_of_plain_pytorch(case, magnitude):
    """Over few draws, and over many of a few weights, where plain PyTorch may find the right bits by chance."""
    weights = case[1] * math.prod(case[3])
    # A logit knows eps times its size.
    check(case, magnitude, 5e-7 * magnitude, 32 if weights < 100 else 8 if weights < 5000 else 2)


@pytest.mark.parametrize("magnitude", [100.0, 1e4, 1e8])
def test_extreme_logits(magnitude):
    case = (2, 19, 3, (23, 12), True)
    for name, (kernel, _) in errors(torch.float64, case, magnitude).items():
        assert kernel < 1e-12, name
    check(case, magnitude, 1e-6, 8)


def test_logits_far_below_their_bound():
    """Every axis peaks where the channels forbid it: the cheap bound misses the true maximum by 4e4."""
    q = torch.zeros(1, 2, 1 + 4 + 4)
    feat = torch.zeros(1, 4, 4, 1)
    feat[0, 0, 0] = -1.0
    q[0, :, 0] = 4e4  # times -1 at the token where both axes peak
    q[0, :, [1, 5]] = 2e4
    q, feat, scale = q.double(), feat.double(), torch.ones(1, 4, 4, dtype=torch.float64)
    exact, exact_lse, _ = reference.grid_attention(q, feat, scale)
    for dtype in (torch.float64, torch.float32):
        o, lse, _ = grid_attention_unchecked(q.to(dtype), feat.to(dtype), scale.to(dtype))
        assert relative_error(o, exact) < 1e-6
        assert relative_error(lse, exact_lse) < 1e-6


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The accuracy tests again in a process that runs another instruction set."""
    if isa not in extension.module.available_isas():
        pytest.skip(f"this CPU has no {isa}")
    if isa == extension.module.active_isa():
        return  # what this process runs
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "exact or plain_pytorch or extreme or bound or active_isa or uniform",
    ]
    env = os.environ | {"PERCEIVER_FAST_CPU_ISA": isa}
    done = python(*command, env=env, cwd=os.path.dirname(__file__))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_active_isa_is_the_one_asked_for():
    wish = os.environ.get("PERCEIVER_FAST_CPU_ISA")
    assert extension.module.active_isa() == (wish or extension.module.available_isas()[-1])


def test_unknown_isa_is_a_reason_not_a_crash():
    code = "import perceiver_fast as pf; from perceiver_fast import extension; print(extension.error)"
    env = os.environ | {"PERCEIVER_FAST_CPU_ISA": "sse9"}
    done = python("-c", code, env=env)
    assert "expected one of baseline" in done.stdout and "sse9" in done.stdout
    assert "failed to load" in done.stderr  # and it is said once, aloud


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    q, feat, scale, mask = grid_inputs(2, 3, 2, (3, 4), masked=masked)
    if masked:
        mask[0, 0] = True  # the sentinel lse of an all-masked row is no function to differentiate
    inputs = tuple(t.requires_grad_() for t in (q, feat, scale))
    assert torch.autograd.gradcheck(lambda *a: grid_attention_unchecked(*a, mask)[:2], inputs)


def test_token_gradients_only_when_asked():
    q, feat, scale, _ = grid_inputs(1, 5, 3, (4, 6), torch.float32)
    inputs = (q, feat, scale, None, 0.0, None, False)
    out = torch.ops.perceiver_fast.grid_attention_forward(*inputs)
    d_q, d_feat, d_scale = torch.ops.perceiver_fast.grid_attention_backward(q, None, None, *inputs, *out, False)
    assert d_q.shape == q.shape and d_feat.numel() == 0 and d_scale.numel() == 0


def test_all_masked_rows_are_uniform():
    q, feat, scale, mask = grid_inputs(2, 5, 3, (4, 6), masked=True)
    o, lse, _ = grid_attention_unchecked(q, feat, scale, mask)
    expected = (scale[0].unsqueeze(-1) * feat[0]).mean((0, 1))
    assert relative_error(o[0, :, :3], expected.expand(5, 3)) < 1e-14
    assert (lse[0] == EMPTY_LSE).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate(value):
    q, feat, scale, mask = grid_inputs(1, 5, 3, (4, 6), torch.float32, True)
    feat[0, 2, 2, 1] = value
    mask[0, 2, 2] = True
    o, *_ = grid_attention_unchecked(q, feat, scale, mask)
    assert torch.equal(o.isnan(), reference.grid_attention(q, feat, scale, mask)[0].isnan())
    mask[0, 2, 2] = (
        False  # a masked value is multiplied by zero, which keeps a NaN: it reaches every query, in its channel
    )
    o, *_ = grid_attention_unchecked(q, feat, scale, mask)
    assert torch.equal(o.isnan(), reference.grid_attention(q, feat, scale, mask)[0].isnan()) and o[..., 1].isnan().all()


def test_strides_and_shared_queries():
    q, feat, scale, mask = grid_inputs(3, 6, 3, (5, 7), masked=True)
    expected = grid_attention_unchecked(q, feat, scale, mask)[0]
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (q, feat, scale, mask)]
    assert not strided[0].is_contiguous()
    assert torch.equal(grid_attention_unchecked(*strided)[0], expected)
    shared = q[:1].expand(3, -1, -1)
    assert torch.equal(
        grid_attention_unchecked(shared, feat, scale)[0], grid_attention_unchecked(shared.clone(), feat, scale)[0]
    )
    reversed_axis = feat.flip(1), scale.flip(1)
    assert torch.equal(
        grid_attention_unchecked(shared, *reversed_axis)[1],
        grid_attention_unchecked(shared.contiguous(), *reversed_axis)[1],
    )


def test_empty_batch_and_no_queries():
    q, feat, scale, _ = grid_inputs(1, 4, 3, (5, 7))
    assert grid_attention_unchecked(q[:0], feat[:0], scale[:0])[0].shape == (0, 4, 15)
    assert grid_attention_unchecked(q[:, :0], feat, scale)[0].shape == (1, 0, 15)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("queries", [3, 40])  # few queries: the tokens are split among the threads instead
def test_deterministic_for_a_thread_count(threads, queries):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, feat, scale, mask = grid_inputs(1, queries, 3, (90, 111), torch.float32, True)
        args = (q, feat, scale, mask, torch.randn_like(q), torch.zeros(q.shape[:2], dtype=torch.float64))
        first, second = run(grid_attention_unchecked, *args), run(grid_attention_unchecked, *args)
        exact = run(reference.grid_attention, *(t.double() for t in args[:3]), mask, args[4].double(), args[5])
        for name in first:
            assert torch.equal(first[name], second[name]), name
            assert relative_error(first[name], exact[name]) < 5e-6, name
    finally:
        torch.set_num_threads(before)


def test_one_axis_split_by_columns():
    q, feat, scale, _ = grid_inputs(1, 3, 3, (9001,))
    assert (
        relative_error(grid_attention_unchecked(q, feat, scale)[0], reference.grid_attention(q, feat, scale)[0]) < 1e-13
    )


def test_more_than_two_to_the_31_pairs():
    """16.8 M tokens; with logits that separate, softmax is an outer product and the answer is known."""
    side, queries = 4096, 136
    assert side * side * queries > 2**31
    rows, columns = torch.randn(1, queries, side), torch.randn(1, queries, side)
    feat = torch.randn(1, side, side, 1)
    q = torch.cat([torch.zeros(1, queries, 1), rows, columns], -1)
    o, lse, _ = grid_attention_unchecked(q, feat, torch.ones(1, side, side))
    p_rows, p_columns = rows.double().softmax(-1), columns.double().softmax(-1)
    assert relative_error(o[..., 1 : 1 + side], p_rows) < 1e-6
    assert relative_error(o[..., 1 + side :], p_columns) < 1e-6
    expected = ((p_rows[0] @ feat[0, ..., 0].double()) * p_columns[0]).sum(-1)
    assert relative_error(o[0, :, 0], expected) < 1e-4  # a mean of 16.8 M numbers about zero
    assert relative_error(lse, rows.double().logsumexp(-1) + columns.double().logsumexp(-1)) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    q, feat, scale, _ = grid_inputs(1, 5, 3, (4, 6), dtype)
    o, lse, _ = grid_attention_unchecked(q, feat, scale)
    wide = grid_attention_unchecked(q.float(), feat.float(), scale.float())
    assert o.dtype == dtype and torch.equal(o, wide[0].to(dtype)) and torch.equal(lse, wide[1])


def test_autocast_computes_in_float32_and_returns_its_dtype():
    q, feat, scale, _ = grid_inputs(1, 5, 3, (4, 6), torch.float32)
    plain, *_ = grid_attention_unchecked(q, feat, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, *_ = grid_attention_unchecked(q.requires_grad_(), feat, scale)
    assert o.dtype == torch.bfloat16 and torch.equal(o, plain.bfloat16())
    o.sum().backward()
    assert q.grad.dtype == torch.float32


def test_separate_tables_give_the_joined_result():
    q, feat, scale, mask = grid_inputs(2, 5, 3, (4, 6), masked=True)
    o_feat, o_axes, lse = grid_attention(
        q[..., :3], (q[..., 3:7], q[..., 7:]), feat.flatten(1, 2), scale.flatten(1), mask.flatten(1)
    )
    o, joined_lse, _ = grid_attention_unchecked(q, feat, scale, mask)
    assert torch.equal(torch.cat([o_feat, *o_axes], -1), o) and torch.equal(lse, joined_lse)


def good_call():
    return dict(
        q_feat=torch.randn(1, 5, 3),
        q_axes=(torch.randn(1, 5, 4), torch.randn(1, 5, 6)),
        feat=torch.randn(1, 24, 3),
        scale=torch.ones(1, 24),
        mask=torch.ones(1, 24, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(q_axes=()), ValueError, "at least one axis"),
        (dict(feat=torch.randn(1, 23, 3)), ValueError, r"feat of shape \(1, 24, 3\).*\(1, 23, 3\).*4 x 6"),
        (dict(feat=torch.randn(24, 3)), ValueError, r"\[B, M, F\]"),
        (dict(scale=torch.ones(2, 24)), ValueError, r"scale of shape \(1, 24\)"),
        (dict(mask=torch.ones(1, 24)), TypeError, r"bool mask.*float32.*mask\.bool"),
        (dict(mask=torch.ones(1, 4, 6, dtype=torch.bool)), ValueError, r"mask of shape \(1, 24\)"),
        (dict(q_feat=torch.ones(1, 5, 3, dtype=torch.long)), TypeError, "floating point.*int64"),
        (dict(scale=torch.ones(1, 24, dtype=torch.float64)), TypeError, "scale to be torch.float32.*float64"),
        (dict(q_axes=(torch.randn(1, 4, 4), torch.randn(1, 5, 6))), ValueError, r"q_axes\[0\]"),
        (dict(q_axes=(torch.randn(1, 5, 0), torch.randn(1, 5, 6))), ValueError, "at least 1"),
        (dict(feat=torch.randn(1, 24, 3, device="meta")), ValueError, "feat on cpu.*meta"),
        (dict(q_feat=torch.randn(1, 5, 0)), ValueError, "at least one feature"),
    ],
)
def test_bad_input_is_explained(change, error, words):
    grid_attention(**good_call())
    with pytest.raises(error, match=words):
        grid_attention(**(good_call() | change))


def test_forced_backends():
    call = good_call()
    with pf.use_backend("reference"):
        expected = grid_attention(**call)[0]
    with pf.use_backend("cpu"):
        assert relative_error(grid_attention(**call)[0], expected) < 1e-6
        call = {k: v.to("meta") if k != "q_axes" else tuple(t.to("meta") for t in v) for k, v in call.items()}
        with pytest.raises(pf.BackendError, match="cpu.*forced.*not meta"):
            grid_attention(**call)


@pytest.mark.parametrize("threads, queries", [(2, 3), (3, 3), (16, 3), (12, 250)])
@pytest.mark.parametrize("sizes", [(3, 8192), (5, 8192), (2, 3, 4096)])
def test_no_token_is_lost_when_few_rows_are_split(threads, queries, sizes):
    """Tokens are cut into parts by rows and, where rows are few, by columns too: the parts must cover the grid."""
    torch.set_num_threads(threads)
    try:
        q, feat, scale, _ = grid_inputs(1, queries, 1, sizes)
        d_o, d_lse = torch.randn_like(q), torch.randn(q.shape[:2], dtype=torch.float64)
        actual = run(grid_attention_unchecked, q, feat, scale, None, d_o, d_lse)
        exact = run(reference.grid_attention, q, feat, scale, None, d_o, d_lse)
        for name, value in exact.items():
            assert relative_error(actual[name], value) < 1e-12, name
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [1, 2, 3, 4, 5])
def test_a_mask_that_masks_nothing_changes_no_bit(features, dtype):
    q, feat, scale, _ = grid_inputs(1, 9, features, (13, 22), dtype, magnitude=3.0)
    everything = torch.ones(1, 13, 22, dtype=torch.bool)
    plain, masked = (grid_attention_unchecked(q, feat, scale, mask) for mask in (None, everything))
    assert torch.equal(plain[0], masked[0]) and torch.equal(plain[1], masked[1])


def test_the_registered_op_refuses_what_it_cannot_read():
    q, feat, scale, mask = grid_inputs(1, 5, 3, (4, 6), torch.float32, True)
    forward = torch.ops.perceiver_fast.grid_attention_forward
    plain = (0.0, None, False)
    o, lse, kept, token_lse = forward(q, feat, scale, mask, *plain)
    for bad in (
        (q.half(), feat.half(), scale.half(), None),
        (q, feat, scale[:, :2], None),
        (q, feat, scale, mask.to(torch.uint8)),
        (q, feat, scale, mask[:, :2]),
        (q[..., 1:], feat, scale, None),
        (q.expand(2, -1, -1), feat, scale, None),
    ):
        with pytest.raises(RuntimeError, match="grid_attention: expected"):
            forward(*bad, *plain)
    backward = torch.ops.perceiver_fast.grid_attention_backward
    for d_o, d_lse in ((o[:, :2], None), (o.double(), None), (o, lse.float())):
        with pytest.raises(RuntimeError, match="grid_attention: expected"):
            backward(d_o, d_lse, None, q, feat, scale, None, *plain, o, lse, kept, token_lse, False)


@pytest.mark.skipif(**needs_extension)
def test_a_backward_is_forced_as_its_forward_was(monkeypatch):
    """On GPUs it runs in a thread of its own, in which nothing is forced."""
    backward, seen = torch.ops.perceiver_fast.grid_attention_backward, []

    def record(*arguments):
        seen.append(pf.backends.forced_backend())
        return backward(*arguments)

    monkeypatch.setattr(torch.ops.perceiver_fast, "grid_attention_backward", record)
    q, feat, scale, _ = grid_inputs(1, 4, 3, (5, 6), torch.float32)
    with pf.use_backend("cpu"):
        forced = grid_attention_unchecked(q.requires_grad_(), feat, scale)[0].sum()
    for loss in (forced, grid_attention_unchecked(q, feat, scale)[0].sum()):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert seen == ["cpu", pf.backends.forced_backend()]
