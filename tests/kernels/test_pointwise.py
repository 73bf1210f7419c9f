"""layer_norm's and geglu's Triton kernels against the reference in float64: results, statistics and every gradient."""

import math

import pytest
import torch

import perceiver_fast as pf
from perceiver_fast.kernels import geglu as geglu_kernels
from perceiver_fast.kernels import layer_norm as norm_kernels
from perceiver_fast.kernels.configs import Config
from perceiver_fast.kernels.row_tiles import tiles
from perceiver_fast.ops import add_layer_norm, geglu, layer_norm
from perceiver_fast.ops.geglu import GEGLU
from perceiver_fast.ops.layer_norm import LAYER_NORM
from perceiver_fast.ops.pointwise import PointwiseCall

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
STREAMS = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16)]  # dtypes of x and of z
NAMES = ("x", "branch", "branch_bias", "weight", "bias")
# Rows, width, and whether a branch, its bias and a gradient of y are there.
NORMS = [
    (1, 1, True, True, True),
    (5, 3, True, False, True),
    (70, 17, True, True, True),
    (70, 64, False, False, False),
    (5, 1000, True, True, False),
    (1, 1024, False, False, False),
]
# Rows, width of the result, dtypes of h and of the bias.
GATES = [
    (1, 1, FP32, FP32),
    (70, 3, BF16, BF16),
    (5, 17, FP16, FP32),
    (70, 64, FP32, FP32),
    (5, 64, FP16, FP16),
    (5, 1000, BF16, FP32),
    (2, 1024, FP16, None),
    (3, 1030, FP32, None),
    (3, 1030, BF16, BF16),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def norm_inputs(case, stream, out, device, offset=0.0):
    """The tensors of a call by name, and the gradients of y (or None) and z, in the dtypes of the call."""
    rows, width, branch, branch_bias, with_d_y = case
    given = dict(x=draw(rows, width, seed=1) + offset, weight=1 + draw(width, seed=3) / 4, bias=draw(width, seed=4))
    given |= dict(branch=draw(rows, width, seed=2)) if branch else {}
    given |= dict(branch_bias=draw(width, seed=5)) if branch_bias else {}
    given = {name: t.to(device, out if name == "branch" else stream) for name, t in given.items()}
    return given, draw(rows, width, seed=6).to(device, stream) if with_d_y else None, draw(rows, width).to(device, out)


def run_norm(given, d_y, d_z, backend, out, eps=1e-5):
    """Results and gradients by name, through the public function."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    with pf.use_backend(backend):
        y, z = add_layer_norm(*map(leaves.get, NAMES), eps, out)
        loss = (z * d_z.to(out)).sum() + (0 if d_y is None else (y * d_y).sum())
        grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(y=y, z=z) | {f"d_{name}": grad for name, grad in zip(leaves, grads)}


def run_gate(h, bias, d_u, backend):
    leaves = [t.detach().requires_grad_() for t in (h, bias) if t is not None]
    with pf.use_backend(backend):
        u = geglu(*leaves)
        return dict(zip(("u", "d_h", "d_bias"), (u, *torch.autograd.grad(u, leaves, d_u.to(u.dtype)))))


def gate_inputs(rows, width, dtype, bias_dtype, device):
    h, bias = 2 * draw(rows, 2 * width, seed=1), draw(2 * width, seed=2)
    bias = None if bias_dtype is None else bias.to(device, bias_dtype)
    return h.to(device, dtype), bias, draw(rows, width, seed=3).to(device, dtype)


def double(value):
    return {name: t.double() for name, t in value.items()} if isinstance(value, dict) else value and value.double()


def compare(kernel, plain, exact, floor):
    """Errors are in units of the truth's norm, or of a millionth of all gradients' where that is less."""
    whole = math.sqrt(sum(truth.norm().item() ** 2 for name, truth in exact.items() if name.startswith("d_")))
    for name, truth in exact.items():
        size = max(truth.norm().item(), 1e-6 * whole)
        mine, theirs = ((result[name].double() - truth).norm().item() / size for result in (kernel, plain))
        assert kernel[name].dtype == plain[name].dtype and kernel[name].shape == truth.shape, name
        assert mine <= 2 * theirs + floor, (name, mine, theirs)


def floor_of(dtype):
    return 5e-7 if dtype == FP32 else torch.finfo(dtype).eps / 4


def check_norm(given, d_y, d_z, out):
    truth = run_norm(double(given), None if d_y is None else d_y.double(), d_z.double(), "reference", FP64)
    kernel, plain = (run_norm(given, d_y, d_z, backend, out) for backend in ("triton", "reference"))
    compare(kernel, plain, truth, floor_of(out))
    return kernel, truth


@pytest.mark.parametrize("stream, out", STREAMS, ids=str)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_layer_norms_errors_are_those_of_plain_pytorch(case, stream, out, device):
    check_norm(*norm_inputs(case, stream, out, device), out)


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Registers that hold 64 columns, so that rows of few tiles are rows of several blocks; the interpreter is slow."""
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(norm_kernels, name, {64: getattr(norm_kernels, name)[norm_kernels.ONE_BLOCK]})
        monkeypatch.setattr(norm_kernels, f"{name}_WIDE", Config(queries=2, tokens=64, warps=1))


@pytest.mark.parametrize("stream, out", STREAMS, ids=str)
def test_rows_that_registers_do_not_hold(stream, out, narrow_blocks, device):
    check_norm(*norm_inputs((5, 150, True, True, True), stream, out, device), out)
    check_norm(*norm_inputs((5, 128, False, False, False), stream, out, device), out)


def test_wide_rows_far_from_zero(narrow_blocks, device):
    check_norm(*norm_inputs((5, 1000, True, True, True), FP32, FP32, device, -3e4), FP32)


@pytest.mark.parametrize("width", [2100, 4100])
def test_wide_rows(width, device):
    check_norm(*norm_inputs((2, width, False, False, False), BF16, BF16, device), BF16)


@pytest.mark.parametrize("offset", [100.0, -3e4])
@pytest.mark.parametrize("width", [64, 1000])
def test_rows_far_from_zero(width, offset, device):
    """The variance is that of what is left of a row without its mean."""
    check_norm(*norm_inputs((5, width, True, True, True), FP32, FP32, device, offset), FP32)


@pytest.mark.parametrize("width", [64, 1000])
def test_deviations_of_few_steps(width, narrow_blocks, device):
    """Rows whose values are few representable numbers around a large mean, which no float32 is near enough to."""
    given, d_y, d_z = norm_inputs((5, width, False, False, False), FP32, FP32, device)
    steps = torch.randint(3, (5, width), generator=torch.Generator().manual_seed(0))
    given["x"] = (1000 + steps * 2.0**-14).to(device, FP32)
    found, truth = check_norm(given, d_y, d_z, FP32)
    for name, value in truth.items():
        assert (found[name].double() - value).norm() < 2e-6 * value.norm(), name


@pytest.mark.parametrize("case", GATES, ids=str)
def test_geglus_errors_are_those_of_plain_pytorch(case, device):
    h, bias, d_u = gate_inputs(*case, device)
    truth = run_gate(h.double(), None if bias is None else bias.double(), d_u, "reference")
    compare(*(run_gate(h, bias, d_u, backend) for backend in ("triton", "reference")), truth, floor_of(h.dtype))


def test_the_normal_distribution(device):
    """Phi to a rounding of one half, as far as it goes, and gates whose squares overflow."""
    gates = torch.cat([torch.linspace(-14, 14, 2801), torch.tensor([-1e30, -1e4, -0.0, 1e4, 1e30])]).to(device)
    h = torch.cat([torch.ones_like(gates), gates]).requires_grad_()
    with pf.use_backend("triton"):
        u = geglu(h)
        (d_h,) = torch.autograd.grad(u.sum(), h)
    phi = torch.special.ndtr(gates.double())
    assert (u - gates * phi).div(gates.abs().clamp_min(1)).abs().max() < 1e-7
    density = torch.exp(-gates.double().square() / 2) / math.sqrt(2 * math.pi)
    assert (d_h[len(gates) :] - (phi + gates * density)).abs().max() < 5e-7
    below = (gates < -1) & (gates > -4)  # where 1 + erf cancels
    assert (u / (gates * phi) - 1)[below].abs().max() < 3e-4


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_extreme_gates_are_finite(dtype, device):
    h = torch.tensor([[1.0, -2.0, 1e4, -1e4], [0.0, 0.5, -1e4, 1e4]], device=device).to(dtype)
    result = run_gate(h, torch.zeros(4, device=device, dtype=dtype), torch.ones(2, 2, device=device), "triton")
    assert all(t.isfinite().all() for t in result.values())
    assert result["u"][0, 1] == 0 and result["u"][1, 1] == 0.5 * h[1, 3]


def test_constant_rows_are_finite(device):
    x = torch.full((3, 40), 7.0, device=device, dtype=BF16)
    given = dict(x=x, weight=torch.ones_like(x[0]), bias=torch.ones_like(x[0]))
    result = run_norm(given, None, torch.ones_like(x), "triton", BF16)
    assert (result["z"] == 1).all() and all(t.isfinite().all() for t in result.values())


def test_without_rows_or_columns(device):
    for shape in ((0, 8), (2, 0, 8), (3, 0)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        w = torch.ones(shape[-1], device=device, requires_grad=True)
        with pf.use_backend("triton"):
            y, z = add_layer_norm(x, x, w, w, w)
            d_x, d_w = torch.autograd.grad(y.sum() + z.sum(), (x, w))
            assert z.shape == d_x.shape == x.shape and d_w.shape == w.shape and not d_w.any()
            u = geglu(x, w)
            d_x, d_w = torch.autograd.grad(u.sum(), (x, w))
            assert u.shape == (*shape[:-1], shape[-1] // 2) and d_x.shape == x.shape and not d_w.any()


def test_results_are_the_same_bits_every_time(device):
    given, d_y, d_z = norm_inputs((70, 33, True, True, True), FP32, BF16, device)
    first, second = (run_norm(given, d_y, d_z, "triton", BF16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    arguments = gate_inputs(70, 33, BF16, BF16, device)
    first, second = (run_gate(*arguments, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_views_give_what_their_copies_do(device):
    given, d_y, d_z = norm_inputs((12, 40, True, True, True), FP32, FP32, device)
    lain = dict(given, x=given["x"].T.contiguous().T, branch=given["branch"].repeat(1, 2)[:, 40:])
    lain["weight"] = given["weight"].repeat_interleave(2)[::2]
    expected = run_norm(given, d_y, d_z, "triton", FP32)
    actual = run_norm(lain, d_y.T.contiguous().T, d_z[:1].expand(12, -1), "triton", FP32)
    assert all(torch.equal(actual[name], expected[name]) for name in ("y", "z"))
    assert torch.equal(actual["d_x"], run_norm(given, d_y, d_z[:1].repeat(12, 1), "triton", FP32)["d_x"])
    h, bias, d_u = gate_inputs(12, 20, FP32, FP32, device)
    expected = run_gate(h, bias, d_u, "triton")
    actual = run_gate(h.T.contiguous().T, bias.repeat_interleave(3)[::3], d_u.T.contiguous().T, "triton")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_leading_dimensions(device):
    x, w = torch.randn(2, 3, 5, 8, device=device), torch.randn(8, device=device)
    with pf.use_backend("triton"):
        assert torch.equal(layer_norm(x, w, w), layer_norm(x.reshape(-1, 8), w, w).reshape(x.shape))
        assert torch.equal(layer_norm(x[0, 0, 0], w, w), layer_norm(x, w, w)[0, 0, 0])
        assert torch.equal(geglu(x), geglu(x.reshape(-1, 8)).reshape(2, 3, 5, 4))
        assert torch.equal(geglu(x[0, 0, 0], w), geglu(x, w)[0, 0, 0])


def test_many_tiles_a_program(device, monkeypatch):
    """As on a GPU with rows in plenty: every program walks over several tiles, of which the last is not whole."""
    monkeypatch.setattr("perceiver_fast.kernels.row_tiles.multiprocessors", lambda device: 0)
    check_norm(*norm_inputs((70, 100, True, True, True), FP32, BF16, device), BF16)
    h, bias, d_u = gate_inputs(70, 100, FP32, FP32, device)
    truth = run_gate(h.double(), bias.double(), d_u, "reference")
    compare(*(run_gate(h, bias, d_u, backend) for backend in ("triton", "reference")), truth, 5e-7)


def test_opcheck(device):
    ops, w = torch.ops.perceiver_fast, torch.ones(8, device=device)
    for out, branch_bias in ((FP32, None), (BF16, w)):
        x, z = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 8, device=device, dtype=out)
        branch = None if branch_bias is None else z
        call = (x, branch, branch_bias, w, w, 1e-5, out)
        torch.library.opcheck(ops.layer_norm_forward.default, call)
        _, _, mean, rstd = ops.layer_norm_forward(*call)
        call = (None if branch is None else x, z, x, mean, rstd, w, branch is not None)
        torch.library.opcheck(ops.layer_norm_backward.default, call)
    torch.library.opcheck(ops.geglu_forward.default, (z, None))
    for bias in (None, w):
        torch.library.opcheck(ops.geglu_backward.default, (z[..., :4], z, bias))


def test_double_precision_goes_to_the_reference(device):
    call = PointwiseCall(FP64, device)
    for choice in (LAYER_NORM.choose(call), GEGLU.choose(call)):
        assert choice.backend == "reference" and "float64" in choice.rejected["triton"][0]


def test_tiles_cover_the_matrix():
    configs = [*norm_kernels.FORWARD.values(), *norm_kernels.BACKWARD.values()]
    configs += [norm_kernels.FORWARD_WIDE, norm_kernels.BACKWARD_WIDE, geglu_kernels.FORWARD, geglu_kernels.BACKWARD]
    for config in configs:
        for rows, width in ((1, 1), (70, 17), (5, 1024), (16384, 5000)):
            tile = tiles(rows, width, config)
            assert 256 <= tile.rows * tile.columns <= config.queries * config.tokens
            assert (tile.count - 1) * tile.rows < rows <= tile.count * tile.rows
            assert (tile.blocks - 1) * tile.columns < width <= tile.blocks * tile.columns
            for processors in (1, 20, 132):
                assert 1 <= tile.shares(config, torch.device("cpu")) <= tile.count, processors


def test_launches_are_the_same_on_tensors_without_content():
    """What is compiled ahead of time is made from them."""
    x, w = torch.empty(4, 5000, dtype=BF16, device="meta"), torch.empty(5000, dtype=BF16, device="meta")
    *results, launches = norm_kernels.backward_launches(x, x, x, x[:, 0].float(), x[:, 0].float(), w, True)
    assert [r.shape for r in results] == [x.shape, (0,), w.shape, w.shape, w.shape]
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["layer_norm_terms_kernel", "layer_norm_backward_kernel", "column_sums_kernel"]
