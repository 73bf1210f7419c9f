"""LayerNorm of the stream against plain PyTorch in float64; test_geglu.py runs it on every instruction set."""

import pytest
import torch
from support import check_over_draws, needs_extension, relative_error

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.ops import add_layer_norm, layer_norm
from perceiver_fast.ops.layer_norm import LAYER_NORM
from perceiver_fast.ops.pointwise import PointwiseCall

pytestmark = pytest.mark.skipif(**needs_extension)

ROWS, CHANNELS = [(0,), (1,), (5,), (2, 65)], [3, 17, 64, 1000]  # one channel: see test_rows_without_spread
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
JOINS = ["alone", "branch", "branch_bias", "unused y"]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def inputs_of(rows, channels, dtype, out_dtype, join, offset=0.0):
    """Arguments up to eps and out_dtype, with the gradients of y (None where nothing uses it) and z."""
    x = (draw(*rows, channels) + offset).to(dtype)
    branch = None if join == "alone" else draw(*rows, channels).to(out_dtype)
    branch_bias = draw(channels).to(dtype) if join in ("branch_bias", "unused y") else None
    weight, bias = (draw(channels).to(dtype) for _ in range(2))
    d_y = None if join in ("alone", "unused y") else draw(*rows, channels).to(dtype)
    return (x, branch, branch_bias, weight, bias), (d_y, draw(*rows, channels).to(out_dtype))


def run(function, inputs, d_outputs, out_dtype, dtype=None):
    """y, z and the gradients of all inputs; everything in ``dtype`` if there is one."""

    def leaf(t):
        return None if t is None else t.to(dtype or t.dtype).clone().requires_grad_()

    names = ("x", "branch", "branch_bias", "weight", "bias")
    leaves = {name: leaf(t) for name, t in zip(names, inputs)}
    outputs = function(*leaves.values(), 1e-5, dtype or out_dtype)
    leaves = {name: t for name, t in leaves.items() if t is not None}
    used, d_used = zip(*((out, d.to(out.dtype)) for out, d in zip(outputs, d_outputs) if d is not None))
    gradients = torch.autograd.grad(used, list(leaves.values()), d_used)
    return dict(zip(("y", "z", *leaves), (*(out.detach() for out in outputs), *gradients)))


def test_the_kernels_are_what_runs():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert LAYER_NORM.choose(PointwiseCall(dtype, torch.device("cpu"))).backend == "cpu"


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_float64_is_exact(rows, channels, join):
    inputs, d_outputs = inputs_of(rows, channels, torch.float64, torch.float64, join)
    expected = run(reference.add_layer_norm, inputs, d_outputs, torch.float64)
    found = run(add_layer_norm, inputs, d_outputs, torch.float64)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        assert relative_error(value, expected[name]) < 1e-12, name


@pytest.mark.parametrize("join, offset", [*((join, 0.0) for join in JOINS[:3]), ("alone", 1e3), ("unused y", 1e3)])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype, out_dtype", DTYPES, ids=str)
def test_error_is_that_of_plain_pytorch(dtype, out_dtype, rows, channels, join, offset):
    if dtype == torch.bfloat16:
        offset /= 32  # its rows would be constant so far from zero
    found = []
    for _ in range(4):
        inputs, d_outputs = inputs_of(rows, channels, dtype, out_dtype, join, offset)
        exact, ours, plain = compare(inputs, d_outputs, out_dtype)
        # The floor is for the few elements of the small shapes, where plain PyTorch may round to the right number.
        for name, value in exact.items():
            assert ours[name].dtype == plain[name].dtype and ours[name].shape == value.shape, name
            floor = 4 * torch.finfo(ours[name].dtype).eps
            found.append((name, relative_error(ours[name], value) + floor, relative_error(plain[name], value) + floor))
    check_over_draws(found, 0.0)


def compare(inputs, d_outputs, out_dtype):
    """Exact results, ours, and plain PyTorch's."""
    exact = run(reference.add_layer_norm, inputs, d_outputs, out_dtype, dtype=torch.float64)
    return exact, *(run(f, inputs, d_outputs, out_dtype) for f in (add_layer_norm, reference.add_layer_norm))


@pytest.mark.parametrize("channels", [1, 3, 64, 1000])
@pytest.mark.parametrize("dtype, out_dtype", [(torch.float64, torch.float64), *DTYPES], ids=str)
def test_rows_without_spread(dtype, out_dtype, channels):
    """Constant rows: z is the bias to the last bit, and nothing reaches the weight."""
    _, (d_y, d_z) = inputs = inputs_of((9,), channels, dtype, out_dtype, "branch")
    x, _, _, weight, bias = inputs[0]
    x = (x[:, :1] * 1000).expand(9, channels)
    found = run(add_layer_norm, (x, torch.zeros_like(d_z), None, weight, bias), (d_y, d_z), out_dtype)
    assert torch.equal(found["y"], x) and torch.equal(found["z"], bias.to(out_dtype).expand(9, channels))
    assert torch.equal(found["weight"], torch.zeros_like(weight))
    g = d_z.double() * weight
    expected = d_y + (g - g.mean(-1, keepdim=True)) * 1e-5**-0.5  # of one channel: d_y and rounding, 316 times
    terms = d_y.double().norm() + 1e-5**-0.5 * g.norm()
    assert (found["x"] - expected).norm() <= torch.finfo(dtype).eps * terms


@pytest.mark.parametrize("channels", [8, 33, 1000])
@pytest.mark.parametrize("join", ["alone", "branch"])
def test_deviations_of_few_steps(channels, join):
    """Rows whose values are few representable numbers around a large mean, which no float32 is near enough to."""
    inputs, d_outputs = inputs_of((50,), channels, torch.float32, torch.float32, join)
    inputs = (1000 + torch.randint(3, (50, channels)) * 2.0**-14, *inputs[1:])
    if join == "branch":
        inputs = (inputs[0], torch.randint(3, (50, channels)) * 2.0**-13, *inputs[2:])
    exact, ours, _ = compare(inputs, d_outputs, torch.float32)
    for name, value in exact.items():
        assert relative_error(ours[name], value) < 1e-6, name


def test_a_large_offset_costs_no_more_than_its_rounding():
    x = (draw(200, 1000) + 1e4).float()
    weight, bias = torch.ones(1000), torch.zeros(1000)
    expected = (x.double() - x.double().mean(-1, keepdim=True)) / (
        x.double().var(-1, False, keepdim=True) + 1e-5
    ).sqrt()
    error, plain = (
        (f(x) - expected).norm() / expected.norm()
        for f in (
            lambda x: layer_norm(x, weight, bias),
            lambda x: torch.nn.functional.layer_norm(x, (1000,), weight, bias),
        )
    )
    assert error <= 1e-6 < plain


@pytest.mark.parametrize("dtype, out_dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype, out_dtype):
    inputs, d_outputs = inputs_of((3, 211), 160, dtype, out_dtype, "branch_bias")
    exact, first, plain = compare(inputs, d_outputs, out_dtype)
    try:
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            for name, value in run(add_layer_norm, inputs, d_outputs, out_dtype).items():
                assert torch.equal(first[name], value), name
                assert relative_error(value, exact[name]) <= 2 * relative_error(plain[name], exact[name]), name
    finally:
        torch.set_num_threads(1)


def test_gradcheck():
    x, branch = draw(3, 7).requires_grad_(), draw(3, 7).requires_grad_()
    weight, bias, branch_bias = (draw(7).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    assert torch.autograd.gradcheck(add_layer_norm, (x, branch, None, weight, bias))
    assert torch.autograd.gradcheck(add_layer_norm, (x, branch, branch_bias, weight, bias))


def test_inputs_need_not_be_contiguous():
    inputs, d_outputs = inputs_of((34,), 17, torch.float64, torch.float64, "branch_bias")
    strided = [torch.stack([t, t], -1)[..., 0] for t in inputs], [torch.stack([t, t], -1)[..., 0] for t in d_outputs]
    expected = run(reference.add_layer_norm, inputs, d_outputs, torch.float64)
    for name, value in run(add_layer_norm, *strided, torch.float64).items():
        assert relative_error(value, expected[name]) < 1e-12, name
    x, _, _, weight, bias = inputs
    found = layer_norm(leaf := x.T.clone().T.requires_grad_(), weight, bias)
    (d_x,) = torch.autograd.grad(found.sum(), leaf)  # the gradient of z has stride 0
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.layer_norm(leaf, (17,), weight, bias).sum(), leaf)
    assert relative_error(d_x, expected) < 1e-12


def test_only_y_is_used():
    inputs, (d_y, _) = inputs_of((5,), 17, torch.float32, torch.bfloat16, "branch")
    leaves = [t.clone().requires_grad_() for t in inputs if t is not None]
    x, branch, weight, bias = leaves
    y, _ = add_layer_norm(x, branch, None, weight, bias, out_dtype=torch.bfloat16)
    d_x, d_branch, d_weight, d_bias = torch.autograd.grad(y, leaves, d_y)
    assert torch.equal(d_x, d_y) and torch.equal(d_branch, d_y.bfloat16())
    assert d_weight.abs().max() == d_bias.abs().max() == 0


def test_what_is_wrong_with_the_input_is_said():
    (x, branch, branch_bias, weight, bias), _ = inputs_of((5,), 6, torch.float32, torch.float32, "branch_bias")
    with pytest.raises(TypeError, match="expected x to be floating point, got torch.int64"):
        layer_norm(x.long(), weight, bias)
    with pytest.raises(TypeError, match="expected out_dtype torch.float32, or half precision.*got torch.float64"):
        layer_norm(x, weight, bias, out_dtype=torch.float64)
    with pytest.raises(ValueError, match="expected branch_bias with a branch, got it alone"):
        add_layer_norm(x, None, branch_bias, weight, bias)
    with pytest.raises(ValueError, match=r"expected branch \(5, 6\), like x, got \(1, 6\)"):
        add_layer_norm(x, branch[:1], None, weight, bias)
    with pytest.raises(TypeError, match="expected branch to be torch.bfloat16 like out_dtype .*got torch.float32"):
        add_layer_norm(x, branch, None, weight, bias, out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected weight \[6\], got \(5,\)"):
        layer_norm(x, weight[:5], bias)
    with pytest.raises(TypeError, match="expected bias to be torch.float32 like x, got torch.float64"):
        layer_norm(x, weight, bias.double())
    with pf.use_backend("cpu"), pytest.raises(pf.backends.BackendError, match="float16"):
        layer_norm(x, weight, bias, out_dtype=torch.float16)


def test_what_the_kernels_cannot_take_is_said():
    forward, backward = torch.ops.perceiver_fast.layer_norm_forward, torch.ops.perceiver_fast.layer_norm_backward
    x, vector, mean = torch.randn(4, 6), torch.randn(6), torch.randn(4)
    with pytest.raises(RuntimeError, match="expected float64, float32 or bfloat16.*got Double beside Float"):
        forward(x, None, None, vector, vector, 1e-5, torch.float64)
    with pytest.raises(RuntimeError, match=r"expected weight \[D\] = \[6\], got \[5\]"):
        forward(x, None, None, vector[:5], vector, 1e-5, torch.float32)
    with pytest.raises(RuntimeError, match="expected branch in BFloat16, got Float"):
        forward(x, x, None, vector, vector, 1e-5, torch.bfloat16)
    with pytest.raises(RuntimeError, match="expected branch_bias with a branch"):
        forward(x, None, vector, vector, vector, 1e-5, torch.float32)
    with pytest.raises(RuntimeError, match="expected mean in Float, got Double"):
        backward(None, x, x, mean.double(), mean, vector, False)
