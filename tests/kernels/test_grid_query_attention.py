"""grid_query_attention's Triton kernels against the reference in float64: results, log-sum-exp and every gradient."""

import pytest
import torch
from grid_query_cases import BASE, NAMES, draw, errors_of, plain, results
from support import check_over_draws, relative_error

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.kernels import grid_query_attention_backward
from perceiver_fast.kernels.grid_query_keys import join
from perceiver_fast.ops import grid_query_attention
from perceiver_fast.ops.grid_query_attention import (
    GRID_QUERY_ATTENTION,
    GridQueryAttentionCall,
    grid_query_attention_into,
    grid_query_attention_unchecked,
)
from perceiver_fast.reference.softmax import EMPTY_LSE

FLOOR = {torch.float32: 5e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}
CASES = [
    BASE,
    BASE | dict(keys=1, sizes=(1,), bias=True),
    BASE | dict(sizes=(3, 2, 5), keys=40, channels=3, heads=2, sum_heads=True, scale=False, bias=True),
    BASE | dict(sizes=(3, 9), keys=17, features=8, channels=64, masked=True, batch=2),
    BASE | dict(sizes=(40,), grid=False, features=51, keys=66, channels=2, batch=2, shared=True),
    BASE | dict(sizes=(9,), grid=False, features=130, keys=33, channels=130, heads=2, bias=True, sum_heads=True,
                dropout=0.3, masked=True),
    BASE | dict(sizes=(2, 3, 2, 3), features=3, keys=20, batch=3, shared=True, masked=True, dropout=0.3),
    BASE | dict(sizes=(2, 33), features=20, keys=9, channels=3, heads=3, scale=False),
]  # fmt: skip
WIDE = BASE | dict(sizes=(2,), features=300, keys=9, channels=322, heads=2, sum_heads=True)


def kernel(case, inputs, mask, seed):
    torch.manual_seed(seed)
    with pf.use_backend("triton"):
        return grid_query_attention_unchecked(
            **inputs, mask=mask, dropout=case["dropout"], sum_heads=case["sum_heads"], grid=case["grid"]
        )


def on(device, inputs, mask, d_o):
    inputs = {name: None if t is None else t.to(device) for name, t in inputs.items()}
    return inputs, None if mask is None else mask.to(device), d_o.to(device)


def errors(device, dtype, case, magnitude=1.0, seed=0, change=None):
    """Errors of the kernels and of plain PyTorch in ``dtype``, both against float64; ``change`` inputs beforehand."""
    inputs, mask, d_o = on(device, *draw(case, dtype, magnitude, seed))
    if change is not None:
        change(inputs)
    exact = results(plain, case, {n: None if t is None else t.double() for n, t in inputs.items()}, mask, d_o.double())
    return errors_of(results(kernel, case, inputs, mask, d_o), results(plain, case, inputs, mask, d_o), exact)


def check(device, dtype, case, floor, **options):
    for name, (found, usual) in errors(device, dtype, case, **options).items():
        assert found <= 2 * usual + floor, (name, found, usual, case)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_error_is_that_of_plain_pytorch(device, case, dtype):
    check(device, dtype, CASES[case], FLOOR[dtype])


@pytest.mark.parametrize("dtype, less", [(torch.float32, 170), (torch.bfloat16, 0)], ids=str)
def test_channels_beyond_what_registers_hold(device, dtype, less):
    case = WIDE | dict(features=WIDE["features"] - less, channels=WIDE["channels"] - less)
    check(device, dtype, case, FLOOR[dtype])


@pytest.mark.parametrize("magnitude", [100.0, 1e4])
@pytest.mark.parametrize("case", [0, 2])
def test_extreme_logits(device, case, magnitude):
    """A result hangs on how a few near-ties round, so the errors are compared over draws."""
    found = [errors(device, torch.float32, CASES[case], magnitude, seed) for seed in range(4)]
    check_over_draws(((name, *pair) for rows in found for name, pair in rows.items()), 1e-6)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("shift", [-1e4, 600.0, 1e4])
def test_logits_all_far_from_zero(device, shift, dtype):
    """No weight of 2^s is finite and positive: the shift is the queries' own."""

    def far(inputs):
        inputs["bias"] += shift

    check(device, dtype, BASE | dict(keys=40, bias=True, channels=9), max(FLOOR[dtype], 2e-3), change=far)


def test_saturated_softmax_has_the_gradients_of_plain_pytorch(device):
    """One key far above the others: weights of one, whose tiny gradients must not drown in rounding."""
    case = BASE | dict(sizes=(5, 9), keys=40, features=3, channels=16, bias=True)

    def saturate(inputs):
        inputs["bias"][..., 7] += 20.0

    check(device, torch.float32, case, 5e-7, change=saturate)


def test_a_single_key_has_no_logit_gradients(device):
    case = BASE | dict(keys=9, features=3, bias=True, channels=5, heads=2)
    inputs, _, d_o = on(device, *draw(case, torch.float32))
    mask = torch.arange(9, device=device)[None] == 4
    found = results(kernel, case, inputs, mask, d_o)
    assert all(found[f"d_{name}"].abs().max() < 1e-12 for name in ("tables", "feat", "scale", "bias"))
    assert relative_error(found["o"], inputs["v"][:, :, 4].expand(1, 7, 2, 5)) < 2e-7


def test_uniform_where_all_keys_are_masked(device):
    case = BASE | dict(batch=2, masked=True, sizes=(3, 5), channels=3, bias=True, features=2)
    inputs, mask, d_o = on(device, *draw(case, torch.float32))
    inputs["feat"][0, 1, 2] = float("nan")  # its queries do not matter
    arguments = *(inputs[name] for name in NAMES), mask, True, 0.0, None, False
    o, lse = torch.ops.perceiver_fast.grid_query_attention_forward(*arguments, True)
    expected, expected_lse = reference.grid_query_attention(*arguments[:6])
    assert relative_error(o, expected) < 5e-7 and (lse[0] == EMPTY_LSE).all()
    assert relative_error(lse[1], expected_lse[1]) < 5e-7
    found, usual = results(kernel, case, inputs, mask, d_o), results(plain, case, inputs, mask, d_o)
    assert all((found[f"d_{name}"][0] == 0).all() for name in ("tables", "feat", "scale", "bias"))
    assert relative_error(found["d_v"], usual["d_v"]) < 5e-7


def test_masked_keys_are_not_looked_at(device):
    case = BASE | dict(masked=True, keys=9, channels=6, features=2)
    inputs, mask, d_o = on(device, *draw(case, torch.float32))
    mask[0, 3] = False
    clean = results(kernel, case, inputs, mask, d_o)
    for value in (float("nan"), float("inf"), 3e38):
        inputs["v"][0, 0, 3] = inputs["tables"][0, 0, 3] = value
        found = results(kernel, case, inputs, mask, d_o)
        assert all(torch.equal(found[name], clean[name]) for name in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_one_strange_query_keeps_to_itself(device, value):
    case = BASE | dict(sizes=(4, 9), features=3, channels=9, scale=False)
    inputs, mask, d_o = on(device, *draw(case, torch.float32))
    clean = results(kernel, case, inputs, mask, d_o)
    inputs["feat"].view(36, 3)[20, 1] = value
    found, usual = results(kernel, case, inputs, mask, d_o), results(plain, case, inputs, mask, d_o)
    others = torch.arange(36, device=device) != 20
    assert torch.equal(found["o"][:, others], clean["o"][:, others])
    assert torch.equal(found["d_feat"].view(36, 3)[others], clean["d_feat"].view(36, 3)[others])
    for name in found:
        assert not (found[name].isnan() & ~usual[name].isnan()).any(), name


def test_axes_are_joined_by_threes():
    assert join(()) == [] and join((7,)) == [(7,)] and join((128,) * 3) == [(128,)] * 3
    assert join((2, 3, 4, 50)) == [(2, 3), (4,), (50,)] and join((500, 3)) == [(500, 3)]
    for sizes in ((2,) * 9, (1, 1, 1, 1), (5, 1, 400, 2, 3)):
        groups = join(sizes)
        assert len(groups) <= 3 and sum(groups, ()) == sizes


def test_a_grid_in_slabs(device, monkeypatch):
    """A grid whose rows would leave too many partial sums is taken some indices of its first axis at a time."""
    case = BASE | dict(sizes=(5, 2, 33), keys=6, batch=2, masked=True)
    inputs, mask, d_o = on(device, *draw(case, torch.float32))
    whole = results(kernel, case, inputs, mask, d_o)
    monkeypatch.setattr(grid_query_attention_backward, "ROW_PARTS", 2 * 2 * 2 * 64)  # two indices a slab
    slabs = results(kernel, case, inputs, mask, d_o)
    assert all(relative_error(slabs[name], whole[name]) < 1e-6 for name in whole)


def test_same_result_every_time_and_for_any_strides(device):
    case = BASE | dict(batch=2, masked=True, sizes=(2, 20), channels=6, bias=True, features=2)
    inputs, mask, d_o = on(device, *draw(case, torch.float32))
    expected = results(kernel, case, inputs, mask, d_o)
    again = results(kernel, case, inputs, mask, d_o)
    strided = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in inputs.items()}
    assert not strided["tables"].is_contiguous()
    found = results(kernel, case, strided, mask.T.contiguous().T, d_o)
    assert all(
        torch.equal(found[name], expected[name]) and torch.equal(again[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("sum_heads", [True, False])
def test_into_a_part_of_a_buffer(device, dtype, sum_heads):
    case = BASE | dict(batch=2, heads=2, sizes=(3, 10), channels=5, masked=True, sum_heads=sum_heads)
    inputs, mask, _ = on(device, *draw(case, dtype))
    expected = kernel(case, inputs, mask, 0)
    buffer = torch.full((2, 50, *expected.shape[2:]), 7.0, dtype=dtype, device=device)
    spread = torch.full((*expected.shape, 2), 7.0, dtype=dtype, device=device)
    for out in (buffer[:, 10:40], spread[..., 1]):
        with pf.use_backend("triton"):
            grid_query_attention_into(out, **inputs, mask=mask, sum_heads=sum_heads)
        assert torch.equal(out, expected)
    assert (buffer[:, :10] == 7).all() and (buffer[:, 40:] == 7).all() and (spread[..., 0] == 7).all()


def test_no_queries(device):
    shapes = (2, 1, 5, 3), (2, 0, 3), (2, 1, 5, 4)
    t_feat, feat, v = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    with pf.use_backend("triton"):
        o = grid_query_attention(t_feat, (), feat, v)
        assert o.shape == (2, 0, 1, 4)
        o.sum().backward()
    assert (v.grad == 0).all() and (t_feat.grad == 0).all() and feat.grad.shape == feat.shape


def test_autocast_rounds_as_tensor_cores_want_it(device):
    case = CASES[3]
    inputs, mask, _ = on(device, *draw(case, torch.float32))
    with torch.autocast(device.type, torch.bfloat16):
        o = kernel(case, inputs, mask, 0)
    assert o.dtype == torch.bfloat16
    exact = plain(case, {name: None if t is None else t.double() for name, t in inputs.items()}, mask, 0)
    assert 1e-4 < relative_error(o, exact) < 1e-2


def test_backend_and_reasons(device):
    assert GRID_QUERY_ATTENTION.choose(GridQueryAttentionCall(torch.float32, device, 70)).backend == "triton"
    choice = GRID_QUERY_ATTENTION.choose(GridQueryAttentionCall(torch.float64, device, 2))
    assert choice.backend == "reference" and "float64" in " ".join(choice.rejected["triton"])
    inputs, _, _ = on(device, *draw(BASE))
    with pf.use_backend("triton"), pytest.raises(pf.BackendError, match="float64"):
        grid_query_attention_unchecked(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registered_ops(device, dtype):
    """Schemas, and outputs without content, of the calls that autograd makes."""
    ops, tests = torch.ops.perceiver_fast, dict(test_utils=("test_schema", "test_faketensor"))
    case = BASE | dict(features=2, channels=3, sizes=(2, 3), bias=True, masked=True)
    inputs, mask, _ = on(device, *draw(case, torch.float32))
    inputs |= {name: inputs[name].to(dtype) for name in ("feat", "v")}
    for dropout, sum_heads in ((0.0, False), (0.2, True)):
        seed = torch.tensor([3], device=device)
        arguments = *(inputs[name] for name in NAMES), mask, True, dropout, seed, sum_heads
        torch.library.opcheck(ops.grid_query_attention_forward.default, (*arguments, True), **tests)
        o, lse = ops.grid_query_attention_forward(*arguments, True)
        assert o.dtype == dtype
        torch.library.opcheck(ops.grid_query_attention_into.default, (torch.empty_like(o), *arguments), **tests)
        for token_grads in (True, False):
            call = (torch.randn_like(o), *arguments, lse, token_grads)
            torch.library.opcheck(ops.grid_query_attention_backward.default, call, **tests)


def test_the_registered_op_refuses_what_it_cannot_read(device):
    case = BASE | dict(batch=2, features=3, masked=True, bias=True)
    inputs, mask, _ = on(device, *draw(case, torch.float32))
    forward = torch.ops.perceiver_fast.grid_query_attention_forward
    good = dict(inputs, mask=mask)
    rest = dict(grid=True, dropout=0.0, seed=None, sum_heads=False, need_lse=True)
    forward(**good, **rest)
    for change in (
        dict(tables=good["tables"][..., 1:]),
        dict(tables=good["tables"].half()),
        dict(feat=good["feat"][:, :2]),
        dict(feat=good["feat"].half()),
        dict(feat=good["feat"].expand(2, 7, 3).repeat(2, 1, 1)),
        dict(scale=good["scale"][:1]),
        dict(bias=good["bias"].double()),
        dict(v=good["v"][:, :, 1:]),
        dict(v=good["v"][..., :0]),
        dict(mask=mask.to(torch.uint8)),
        dict(grid=False),
        dict(dropout=0.5),
    ):
        with pytest.raises(RuntimeError, match="grid_query_attention: expected"):
            forward(**(good | rest | change))


def test_second_derivatives(device):
    case = BASE | dict(sizes=(2, 3), features=2, channels=2, bias=True)
    inputs, _, _ = on(device, *draw(case, torch.float32))
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}

    def penalty(function):
        (grad,) = torch.autograd.grad(
            function(case, leaves, None, 0).square().sum(), leaves["tables"], create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), [leaves["tables"], leaves["feat"]])

    for mine, theirs in zip(penalty(kernel), penalty(plain)):
        assert relative_error(mine, theirs) < 1e-4


def test_compiles_without_a_graph_break(device):
    case = BASE | dict(sizes=(2, 3), features=2, channels=2)
    inputs, _, _ = on(device, *draw(case, torch.float32))

    def attend(tables):
        return grid_query_attention_unchecked(**(inputs | dict(tables=tables))).square().sum()

    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaf = inputs["tables"].clone().requires_grad_()
        found.append(torch.autograd.grad(function(leaf), leaf)[0])
    assert torch.equal(*found)


def test_many_keys(device):
    check(device, torch.float32, BASE | dict(sizes=(2,), keys=1000, channels=2), 5e-7)
