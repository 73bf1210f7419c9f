"""The op against its reference in float64: values, gradients, every ISA, and everything around the kernel."""

import math
import os
import random

import pytest
import torch
from grid_query_cases import BASE, NAMES, draw, errors_of, plain, results
from support import check_over_draws, needs_extension, relative_error
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import extension, reference
from perceiver_fast.ops import blocks, grid_query_attention
from perceiver_fast.ops.grid_query_attention import grid_query_attention_into, grid_query_attention_unchecked
from perceiver_fast.reference.softmax import EMPTY_LSE

pytestmark = pytest.mark.skipif(**needs_extension)


def random_case(seed):
    r = random.Random(seed)
    grid = r.random() < 0.75
    axes = r.choice([1, 2, 2, 3, 3, 4]) if grid else 1
    if not grid:
        sizes = (r.choice([1, 2, 7, 16, 33, 100]),)
    elif axes < 3:
        sizes = tuple(r.choice([1, 2, 3, 7, 16, 17, 70]) for _ in range(axes))
    else:
        sizes = tuple(r.choice([1, 2, 3, 5, 9]) for _ in range(axes))
    batch = r.choice([1, 2, 3])
    return BASE | dict(
        batch=batch,
        shared=batch > 1 and r.random() < 0.4,
        heads=r.choice([1, 1, 2, 3, 4]),
        keys=r.choice([1, 2, 3, 17, 64, 129, 300, 700] if math.prod(sizes) < 300 else [1, 2, 5, 40, 127]),
        features=r.choice([0, 0, 1, 3, 8, 33, 70]) if grid else r.choice([1, 2, 8, 51, 70]),
        channels=r.choice([1, 1, 2, 3, 4, 5, 8, 25, 64, 130]),
        sizes=sizes,
        grid=grid,
        scale=r.random() < 0.7,
        bias=r.random() < 0.5,
        masked=r.random() < 0.4,
        dropout=r.choice([0.0, 0.0, 0.3]),
        sum_heads=r.random() < 0.5,
    )


def kernel(case, inputs, mask, seed):
    torch.manual_seed(seed)
    with pf.use_backend("cpu"):
        return grid_query_attention_unchecked(
            **inputs, mask=mask, dropout=case["dropout"], sum_heads=case["sum_heads"], grid=case["grid"]
        )


def errors(dtype, case, magnitude=1.0, seed=0):
    """Errors of the kernel and of plain PyTorch in ``dtype`` against the reference in float64, each over its norm."""
    inputs, mask, d_o = draw(case, dtype, magnitude, seed)
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    exact = results(plain, case, wide, mask, d_o.double())
    found = results(kernel, case, inputs, mask, d_o)
    usual = results(plain, case, inputs, mask, d_o)
    return errors_of(found, usual, exact)


@pytest.mark.parametrize("seed", range(72))
def test_float64_is_exact(seed):
    case = random_case(seed)
    for name, (error, _) in errors(torch.float64, case, seed=seed).items():
        assert error < 1e-12, (name, case)


CASES = [
    BASE,
    BASE | dict(sizes=(9, 70), keys=129, heads=2, sum_heads=True, bias=True),
    BASE | dict(sizes=(3, 5, 17), keys=300, channels=3, scale=False),
    BASE | dict(sizes=(6, 33), keys=64, features=8, channels=25, heads=3, masked=True, batch=2),
    BASE | dict(sizes=(100,), grid=False, features=51, keys=129, batch=2, shared=True, channels=2),
    BASE | dict(sizes=(40,), grid=False, features=33, keys=700, channels=64, bias=True, masked=True),
    BASE | dict(sizes=(5, 40), features=3, keys=40, channels=8, dropout=0.3, heads=2),
]


def check(case, magnitude, floor, draws):
    found = [errors(torch.float32, case, magnitude, seed) for seed in range(draws)]
    check_over_draws(((name, *pair) for rows in found for name, pair in rows.items()), floor)


@pytest.mark.parametrize("magnitude", [1.0, 8.0])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_float32_error_is_that_of_plain_pytorch(case, magnitude):
    check(CASES[case], magnitude, 5e-7 * magnitude, 12 if case == 0 else 3)  # a logit knows eps times its size


@pytest.mark.parametrize("magnitude", [100.0, 1000.0, 1e8])
@pytest.mark.parametrize("case", [1, 2, 3, 5])
def test_extreme_logits(case, magnitude):
    for name, (error, _) in errors(torch.float64, CASES[case], magnitude).items():
        assert error < 1e-13 * magnitude, name  # a logit knows eps times its size
    if magnitude < 1e8:
        check(CASES[case], magnitude, 1e-6, 4)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The accuracy tests again in a process that runs another instruction set."""
    if isa not in extension.module.available_isas():
        pytest.skip(f"this CPU has no {isa}")
    if isa == extension.module.active_isa():
        return  # what this process runs
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "plain_pytorch or extreme or uniform or (exact and (1 or 3))"]
    env = os.environ | {"PERCEIVER_FAST_CPU_ISA": isa}
    done = python(*command, env=env, cwd=os.path.dirname(__file__))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("case", [1, 3, 4, 6])
def test_threads_change_no_bit(case):
    case = CASES[case] | dict(sizes=tuple(3 * size for size in CASES[case]["sizes"]))
    inputs, mask, d_o = draw(case, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(kernel, case, inputs, mask, d_o))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other[name], found[0][name]) for other in found[1:] for name in found[0])


def test_many_keys_and_more_queries_than_one_sum():
    case = BASE | dict(sizes=(3, 2000), keys=40, channels=2, bias=True)
    for name, (error, _) in errors(torch.float64, case).items():
        assert error < 1e-12, name
    case = BASE | dict(sizes=(20,), keys=16384, channels=6)
    for name, (error, _) in errors(torch.float64, case).items():
        assert error < 1e-12, name


def test_uniform_where_all_keys_are_masked():
    case = BASE | dict(batch=2, masked=True, sizes=(3, 5), channels=3, bias=True)
    inputs, mask, d_o = draw(case)
    arguments = *(inputs[name] for name in NAMES), mask, True, 0.0, None, False
    o, lse = torch.ops.perceiver_fast.grid_query_attention_forward(*arguments, True)
    expected, expected_lse = reference.grid_query_attention(*arguments[:6])
    assert relative_error(o[0], inputs["v"][0].mean(1).expand(15, 1, 3)) < 1e-14 and (lse[0] == EMPTY_LSE).all()
    assert relative_error(o, expected) < 1e-14 and relative_error(lse[1], expected_lse[1]) < 1e-14
    found = results(kernel, case, inputs, mask, d_o)
    assert (found["d_tables"][0] == 0).all() and (found["d_scale"][0] == 0).all() and (found["d_bias"][0] == 0).all()


def test_a_single_key_has_no_logit_gradients():
    inputs, mask, d_o = draw(BASE | dict(keys=1, features=3, bias=True), torch.float32)
    found = results(kernel, BASE, inputs, mask, d_o)
    assert all((found[f"d_{name}"] == 0).all() for name in ("tables", "feat", "scale", "bias"))
    assert relative_error(found["o"], inputs["v"].expand(1, 7, 1, 1)) < 2e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("channels", [2, 9])
def test_one_strange_query_keeps_to_itself(value, grid, channels):
    case = BASE | dict(sizes=(4, 9) if grid else (36,), features=3, channels=channels, grid=grid, scale=False)
    inputs, mask, d_o = draw(case, torch.float32)
    inputs["tables"] = inputs["tables"] * 4
    clean = results(kernel, case, inputs, mask, d_o)
    inputs["feat"].view(36, 3)[20, 1] = value
    found, usual = results(kernel, case, inputs, mask, d_o), results(plain, case, inputs, mask, d_o)
    others = torch.arange(36) != 20
    assert torch.equal(found["o"][:, others], clean["o"][:, others])
    assert torch.equal(found["d_feat"].view(36, 3)[others], clean["d_feat"].view(36, 3)[others])
    for name in found:
        assert not (found[name].isnan() & ~usual[name].isnan()).any(), name


def test_masked_keys_are_not_looked_at():
    case = BASE | dict(masked=True, keys=9, channels=3, features=2)
    inputs, mask, d_o = draw(case)
    mask[0, 3] = False
    clean = results(kernel, case, inputs, mask, d_o)
    inputs["v"][0, 0, 3] = inputs["tables"][0, 0, 3] = float("nan")
    found = results(kernel, case, inputs, mask, d_o)
    assert all(torch.equal(found[name], clean[name]) for name in found)


def test_the_mask_may_be_refilled_before_the_backward():
    case = BASE | dict(masked=True, keys=9)
    inputs, mask, d_o = draw(case)
    expected = results(kernel, case, inputs, mask, d_o)["d_v"]
    v = inputs["v"].requires_grad_()
    o = kernel(case, inputs, mask, 0)
    mask.fill_(False)
    assert torch.equal(torch.autograd.grad((o * d_o).sum(), v)[0], expected)


def test_strides_change_no_bit():
    case = BASE | dict(batch=2, heads=2, masked=True, sizes=(3, 5), channels=3, bias=True, features=2)
    inputs, mask, d_o = draw(case)
    expected = results(kernel, case, inputs, mask, d_o)
    strided = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in inputs.items()}
    assert not strided["tables"].is_contiguous()
    found = results(kernel, case, strided, mask.T.contiguous().T, d_o)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("seed", range(12))
def test_blocks_are_the_reference(seed):
    case = random_case(100 + seed)
    inputs, mask, d_o = draw(case)

    def in_blocks(case, inputs, mask, seed):
        torch.manual_seed(seed)
        drawn = torch.randint(2**62, (1,)) if case["dropout"] > 0 else None
        options = case["grid"], case["dropout"], drawn, case["sum_heads"]
        return blocks.grid_query_attention(*(inputs[name] for name in NAMES), mask, *options, size=5)

    found, exact = (results(function, case, inputs, mask, d_o) for function in (in_blocks, plain))
    assert all((found[name] - exact[name]).norm() <= 1e-12 * (1 + exact[name].norm()) for name in exact)


def test_second_derivatives():
    case = BASE | dict(sizes=(2, 3), features=2, channels=2, heads=2, bias=True, sum_heads=True)
    inputs, mask, _ = draw(case)
    leaves = tuple(inputs[name].requires_grad_() for name in NAMES)

    def run(tables, feat, scale, bias, v):
        return grid_query_attention_unchecked(tables, feat, v, scale, bias, sum_heads=True)

    assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)


def test_gradients_of_queries_only_when_asked():
    inputs, _, d_o = draw(BASE | dict(features=3))
    arguments = *(inputs[name] for name in NAMES), None, True, 0.0, None, False
    o, lse = torch.ops.perceiver_fast.grid_query_attention_forward(*arguments, True)
    _, d_feat, d_scale, d_bias, _ = torch.ops.perceiver_fast.grid_query_attention_backward(d_o, *arguments, lse, False)
    assert d_feat.numel() == d_scale.numel() == d_bias.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    inputs, _, _ = draw(BASE | dict(features=3), dtype)
    o = grid_query_attention_unchecked(**inputs)
    wide = grid_query_attention_unchecked(**{name: None if t is None else t.float() for name, t in inputs.items()})
    assert o.dtype == dtype and torch.equal(o, wide.to(dtype))


def test_autocast_computes_in_float32_and_returns_its_dtype():
    inputs, _, _ = draw(BASE | dict(features=3), torch.float32)
    expected = grid_query_attention_unchecked(**inputs)
    tables = inputs["tables"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = grid_query_attention_unchecked(**inputs)
    assert o.dtype == torch.bfloat16 and torch.equal(o, expected.bfloat16())
    o.sum().backward()
    assert tables.grad.dtype == torch.float32


def test_separate_tables_give_the_joined_result():
    case = BASE | dict(sizes=(4, 6), features=3, batch=2, heads=2, bias=True, masked=True)
    inputs, mask, _ = draw(case)
    t_feat, *t_axes = inputs["tables"].split([3, 4, 6], -1)
    feat, scale = inputs["feat"].flatten(1, 2), inputs["scale"].flatten(1)
    o = grid_query_attention(t_feat, t_axes, feat, inputs["v"], scale, inputs["bias"], mask, sum_heads=True)
    assert torch.equal(o, grid_query_attention_unchecked(**inputs, mask=mask, sum_heads=True))
    o = grid_query_attention(None, t_axes, None, inputs["v"], scale[:1])
    empty = inputs["feat"][:1, ..., :0]
    joined = torch.cat(t_axes, -1)
    assert torch.equal(o, grid_query_attention_unchecked(joined, empty, inputs["v"], inputs["scale"][:1]))
    o = grid_query_attention(t_feat, (), feat, inputs["v"])
    assert torch.equal(o, grid_query_attention_unchecked(t_feat, feat, inputs["v"], grid=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sum_heads", [True, False])
def test_into_a_part_of_a_buffer(dtype, sum_heads):
    inputs, mask, _ = draw(BASE | dict(batch=2, heads=2, sizes=(3, 40), channels=3, masked=True), dtype)
    expected = grid_query_attention_unchecked(**inputs, mask=mask, sum_heads=sum_heads)
    buffer = torch.full((2, 200, *expected.shape[2:]), 7.0, dtype=dtype)
    spread = torch.full((*expected.shape, 2), 7.0, dtype=dtype)
    for out in (buffer[:, 30:150], spread[..., 1]):
        grid_query_attention_into(out, **inputs, mask=mask, sum_heads=sum_heads)
        assert torch.equal(out, expected)
    assert (buffer[:, :30] == 7).all() and (buffer[:, 150:] == 7).all() and (spread[..., 0] == 7).all()


def test_no_queries():
    t_feat, feat, v = torch.randn(2, 1, 5, 3), torch.randn(2, 0, 3), torch.randn(2, 1, 5, 4, requires_grad=True)
    o = grid_query_attention(t_feat, (), feat, v)
    assert o.shape == (2, 0, 1, 4)
    o.sum().backward()
    assert (v.grad == 0).all()


def good_call():
    return dict(
        t_feat=torch.randn(2, 1, 5, 3),
        t_axes=(torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 6)),
        feat=torch.randn(2, 24, 3),
        v=torch.randn(2, 1, 5, 7),
        scale=torch.ones(2, 24),
        bias=torch.ones(2, 1, 5),
        mask=torch.ones(2, 5, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(t_feat=None, t_axes=(), feat=None), ValueError, "at least one axis"),
        (dict(t_feat=None), ValueError, "together, got feat without t_feat"),
        (dict(feat=None), ValueError, "together, got t_feat without feat"),
        (dict(feat=torch.randn(2, 23, 3)), ValueError, r"feat of shape \(2, 24, 3\).*\(2, 23, 3\).*4 x 6"),
        (dict(feat=torch.randn(3, 24, 3)), ValueError, r"\[B or 1, M, F\] with B = 2"),
        (dict(t_feat=torch.randn(2, 1, 5, 2)), ValueError, r"t_feat of shape \(2, 1, 5, 3\)"),
        (dict(scale=torch.ones(1, 24)), ValueError, r"scale of shape \(2, 24\)"),
        (dict(bias=torch.ones(2, 5)), ValueError, r"bias of shape \(2, 1, 5\)"),
        (dict(v=torch.randn(2, 5, 7)), ValueError, r"v \[B, H, N, C\]"),
        (dict(v=torch.randn(2, 1, 5, 0)), ValueError, "at least 1"),
        (dict(mask=torch.ones(2, 5)), TypeError, r"bool mask.*float32.*mask\.bool"),
        (dict(mask=torch.ones(2, 24, dtype=torch.bool)), ValueError, r"mask of shape \(2, 5\)"),
        (dict(v=torch.ones(2, 1, 5, 7, dtype=torch.long)), TypeError, "floating point.*int64"),
        (dict(scale=torch.ones(2, 24, dtype=torch.float64)), TypeError, "scale to be torch.float32.*float64"),
        (dict(t_axes=(torch.randn(2, 1, 4, 4), torch.randn(2, 1, 5, 6))), ValueError, r"t_axes\[0\]"),
        (dict(t_axes=(torch.randn(2, 1, 5, 0), torch.randn(2, 1, 5, 6))), ValueError, "at least 1"),
        (dict(feat=torch.randn(2, 24, 3, device="meta")), ValueError, "feat on cpu.*meta"),
        (dict(dropout=1.0), ValueError, "dropout probability"),
    ],
)
def test_bad_input_is_explained(change, error, words):
    grid_query_attention(**good_call())
    with pytest.raises(error, match=words):
        grid_query_attention(**(good_call() | change))


def test_forced_backends():
    call = good_call()
    with pf.use_backend("reference"):
        expected = grid_query_attention(**call)
    with pf.use_backend("cpu"):
        assert relative_error(grid_query_attention(**call), expected) < 1e-6
        call = {k: tuple(t.to("meta") for t in v) if k == "t_axes" else v.to("meta") for k, v in call.items()}
        with pytest.raises(pf.BackendError, match="cpu.*forced.*not meta"):
            grid_query_attention(**call)


def test_the_registered_op_refuses_what_it_cannot_read():
    inputs, mask, _ = draw(BASE | dict(batch=2, features=3, masked=True, bias=True), torch.float32)
    forward = torch.ops.perceiver_fast.grid_query_attention_forward
    good = dict(inputs, mask=mask)
    rest = dict(grid=True, dropout=0.0, seed=None, sum_heads=False, need_lse=True)
    forward(**good, **rest)
    for change in (
        dict(tables=good["tables"][..., 1:]),
        dict(tables=good["tables"].half()),
        dict(feat=good["feat"][:, :2]),
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
