"""GEGLU's kernels against plain PyTorch in float64: results, gradients, dtypes, shapes and instruction sets."""

import math
import os

import pytest
import torch
from support import check_over_draws, needs_extension, relative_error
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import extension, reference
from perceiver_fast.ops import geglu
from perceiver_fast.ops.geglu import GEGLU
from perceiver_fast.ops.pointwise import PointwiseCall

pytestmark = pytest.mark.skipif(**needs_extension)

ROWS, FEATURES = [(0,), (1,), (5,), (2, 65)], [1, 3, 17, 64, 1000]
BIASES = ["none", "narrow", "float32"]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def inputs_of(rows, features, dtype, bias, magnitude=1.5):
    """h, bias or None and the gradient of u, all exact in their dtypes."""
    h, d_u = (draw(*rows, 2 * features) * magnitude).to(dtype), draw(*rows, features).to(dtype)
    bias_dtype = torch.float32 if bias == "float32" and dtype != torch.float64 else dtype
    return h, None if bias == "none" else draw(2 * features).to(bias_dtype), d_u


def run(function, h, bias, d_u, dtype=None):
    """u and the gradients of h and bias; everything in ``dtype`` if there is one."""
    h, bias, d_u = (None if t is None else t.to(dtype or t.dtype) for t in (h, bias, d_u))
    leaves = [t.clone().requires_grad_() for t in (h, bias) if t is not None]
    u = function(*leaves, *[None] * (2 - len(leaves)))
    names = ("u", "d_h", "d_bias")
    return dict(zip(names, (u.detach(), *torch.autograd.grad(u, leaves, d_u))))


def test_the_kernels_are_what_runs():
    wish = os.environ.get("PERCEIVER_FAST_CPU_ISA")
    assert extension.module.active_isa() == (wish or extension.module.available_isas()[-1])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert GEGLU.choose(PointwiseCall(dtype, torch.device("cpu"))).backend == "cpu"


@pytest.mark.parametrize("bias", BIASES[:2])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_float64_is_exact(rows, features, bias):
    inputs = inputs_of(rows, features, torch.float64, bias)
    expected = run(reference.geglu, *inputs)
    for name, value in run(geglu, *inputs).items():
        assert value.shape == expected[name].shape and relative_error(value, expected[name]) < 1e-14, name


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_that_of_plain_pytorch(dtype, rows, features, bias):
    found = []
    for _ in range(4):
        inputs = inputs_of(rows, features, dtype, bias)
        exact = run(reference.geglu, *inputs, dtype=torch.float64)
        ours, plain = run(geglu, *inputs), run(reference.geglu, *inputs)
        for name, value in exact.items():
            assert ours[name].dtype == plain[name].dtype and ours[name].shape == value.shape
            # The floor is for the few elements of the small shapes, where plain PyTorch may round to the right number.
            floor = 2 * torch.finfo(ours[name].dtype).eps
            found.append((name, relative_error(ours[name], value) + floor, relative_error(plain[name], value) + floor))
    check_over_draws(found, 0.0)


def exact_gelu(gate):
    return gate.double() * 0.5 * torch.special.erfc(-gate.double() / math.sqrt(2))


def test_float32_gelu_is_nearer_than_pytorchs_everywhere():
    gate = torch.linspace(-12, 12, 200_001)
    h = torch.stack([torch.ones_like(gate), gate]).T.contiguous()  # one feature: rows that end within a vector
    wide = torch.cat([torch.ones_like(gate), gate])
    exact = exact_gelu(gate)
    plain = (torch.nn.functional.gelu(gate) - exact).div(gate).nan_to_num().abs().max()
    for u in (geglu(h)[:, 0], geglu(wide)):
        error = (u - exact).abs()
        assert (error / gate.abs()).nan_to_num().max() <= min(plain, 2e-7)
        assert (error / exact.abs()).nan_to_num()[gate < -1].max() < 2e-5  # of a tail; PyTorch's is 1 from -6 on
    leaf = gate.double().requires_grad_()
    slope = torch.autograd.grad(torch.nn.functional.gelu(leaf).sum(), leaf)[0]
    d_h = torch.ops.perceiver_fast.geglu_backward(torch.ones_like(gate), wide, None)[1]
    assert (d_h[len(gate) :] - slope).abs().max() < 2e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_extreme_gates(dtype):
    infinite = float("inf")
    gate = torch.tensor([1e4, -1e4, 1e30, -1e30, 3e38, -3e38, 0.0, infinite, float("nan")], dtype=dtype)
    h = torch.cat([torch.full_like(gate, 0.5), gate])
    found = run(geglu, h, torch.zeros_like(h), torch.ones_like(gate))
    u, d_value, d_gate = found["u"], *found["d_h"].chunk(2)
    assert torch.equal(u[:8], gate[:8].clamp_min(0) / 2) and torch.equal(d_value[:8], gate[:8].clamp_min(0))
    expected = torch.tensor([0.5, 0, 0.5, 0, 0.5, 0, 0.25], dtype=dtype)
    torch.testing.assert_close(d_gate[:7], expected, rtol=2e-7, atol=0)
    assert u[8].isnan() and d_value[8].isnan() and d_gate[8].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype):
    inputs = inputs_of((3, 211), 160, dtype, "narrow")
    exact = run(reference.geglu, *inputs, dtype=torch.float64)
    first, plain = run(geglu, *inputs), run(reference.geglu, *inputs)
    try:
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            for name, value in run(geglu, *inputs).items():
                assert torch.equal(first[name], value), name
                assert relative_error(value, exact[name]) <= 2 * relative_error(plain[name], exact[name]), name
    finally:
        torch.set_num_threads(1)


def test_gradcheck():
    h, bias = draw(3, 10).requires_grad_(), draw(10).requires_grad_()
    assert torch.autograd.gradcheck(geglu, (h, bias)) and torch.autograd.gradcheck(geglu, (h,))


def test_inputs_need_not_be_contiguous():
    h, bias, d_u = draw(34, 7).T, draw(68)[::2], draw(17, 7).T
    expected = run(reference.geglu, h, bias, d_u)
    for name, value in run(geglu, h, bias, d_u).items():
        assert relative_error(value, expected[name]) < 1e-14, name
    expanded = torch.autograd.grad(geglu(leaf := h.clone().requires_grad_()).sum(), leaf)  # its gradient has stride 0
    assert relative_error(*expanded, run(reference.geglu, h, None, torch.ones(7, 17).double())["d_h"]) < 1e-14


def test_what_is_wrong_with_the_input_is_said():
    h = torch.randn(4, 6)
    with pytest.raises(TypeError, match=r"expected h to be floating point, got torch.int64"):
        geglu(h.long())
    with pytest.raises(ValueError, match=r"expected h \[\.\., 2 F\], got \(4, 5\)"):
        geglu(h[:, :5])
    with pytest.raises(ValueError, match=r"expected bias \[6\], got \(5,\)"):
        geglu(h, torch.randn(5))
    with pytest.raises(TypeError, match=r"expected bias to be torch.float32 like h, got torch.float64"):
        geglu(h, torch.randn(6).double())
    with pytest.raises(
        TypeError, match=r"expected bias to be torch.bfloat16 or torch.float32 like h, got torch.float64"
    ):
        geglu(h.bfloat16(), torch.randn(6).double())
    with pf.use_backend("cpu"), pytest.raises(pf.backends.BackendError, match="float16"):
        geglu(h.half())


def test_what_the_kernels_cannot_take_is_said():
    forward, backward = torch.ops.perceiver_fast.geglu_forward, torch.ops.perceiver_fast.geglu_backward
    h = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="geglu: expected float64, float32 or bfloat16.*got Half beside Half"):
        forward(h.half(), None)
    with pytest.raises(RuntimeError, match="got Float beside Double"):
        forward(h, torch.randn(6).double())
    with pytest.raises(RuntimeError, match=r"expected d_u \[.., F\] = \[4, 3\], got \[4, 2\]"):
        backward(torch.randn(4, 2), h, None)
    with pytest.raises(RuntimeError, match="expected d_u in Float, got Double"):
        backward(torch.randn(4, 3).double(), h, None)


# The accuracy tests again, and layer_norm's, on some of their shapes.
ON_ANOTHER_ISA = """
import torch, test_geglu, test_layer_norm
torch.set_num_threads(1)
torch.manual_seed(0)
test_geglu.test_the_kernels_are_what_runs()
test_geglu.test_float32_gelu_is_nearer_than_pytorchs_everywhere()
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    test_geglu.test_extreme_gates(dtype)
for rows in ((5,), (2, 65)):
    for columns in (3, 17, 64):
        for bias in test_geglu.BIASES:
            test_geglu.test_float64_is_exact(rows, columns, bias)
            for dtype in (torch.float32, torch.bfloat16):
                test_geglu.test_error_is_that_of_plain_pytorch(dtype, rows, columns, bias)
        for join in test_layer_norm.JOINS:
            test_layer_norm.test_float64_is_exact(rows, columns, join)
            for dtypes in test_layer_norm.DTYPES:
                test_layer_norm.test_error_is_that_of_plain_pytorch(*dtypes, rows, columns, join, 0.0)
for dtypes in test_layer_norm.DTYPES:
    test_layer_norm.test_threads_change_no_bit(*dtypes)
    test_layer_norm.test_rows_without_spread(*dtypes, 64)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if isa not in extension.module.available_isas():
        pytest.skip(f"this CPU or build has no {isa}")
    if isa == extension.module.active_isa():
        return  # what this process runs
    here = os.path.dirname(os.path.abspath(__file__))
    package = os.path.dirname(os.path.dirname(pf.__file__))
    path = os.pathsep.join([here, os.path.dirname(here), package, os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PERCEIVER_FAST_CPU_ISA": isa, "PYTHONPATH": path}
    done = python("-c", ON_ANOTHER_ISA, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
