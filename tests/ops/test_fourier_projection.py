"""The op against its reference in float64: encoding, values, gradients, every ISA, and the registered ops."""

import math
import os
import subprocess
import sys
from fractions import Fraction

import perceiver_pytorch.perceiver_pytorch as theirs
import pytest
import torch
from support import check_over_draws, needs_extension, relative_error
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import extension, reference
from perceiver_fast.ops import fourier_projection
from perceiver_fast.ops.fourier_projection import fourier_projection_unchecked

pytestmark = pytest.mark.skipif(**needs_extension)

# batch, batch of positions, tokens, axes, bands, features, outputs, eps
CASES = [
    (1, 1, 1, 1, 0, 0, 1, None),
    (1, 1, 1, 3, 64, 3, 128, 1e-5),
    (2, 2, 63, 2, 1, 1, 5, 1e-5),
    (3, 1, 64, 3, 64, 3, 128, 1e-5),
    (3, 1, 65, 1, 64, 40, 5, None),
    (2, 2, 65, 4, 1, 40, 261, 1e-5),
    (1, 1, 1000, 3, 64, 0, 128, 1e-5),
    (2, 1, 1000, 2, 7, 3, 33, 1e-5),
    (3, 3, 130, 4, 64, 1, 1, None),
    (2, 1, 64, 4, 0, 3, 17, 1e-5),
    (1, 1, 2500, 1, 5, 2, 16, 1e-3),
]


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def inputs_of(case, dtype):
    """feat, coords, frequencies, weight, bias and the output's gradient, numbers that ``dtype`` holds."""
    batch, position_batch, tokens, axes, bands, features, outputs, _ = case
    channels = features + axes * (2 * bands + 1)
    coords = torch.rand(position_batch, tokens, axes, dtype=torch.float64) * 2 - 1
    frequencies = torch.stack([torch.linspace(1, 16 + a, bands, dtype=torch.float64) for a in range(axes)])
    feat = draw(batch, tokens, features, dtype=dtype) if features else None
    weight = draw(channels, outputs, dtype=dtype) / channels**0.5
    return feat, coords, frequencies, weight, draw(outputs, dtype=dtype), draw(batch, tokens, outputs, dtype=dtype)


def run(function, feat, coords, frequencies, weight, bias, d_out, eps, dtype=None):
    leaves = {"coords": coords, "weight": weight, "bias": bias} | ({} if feat is None else {"feat": feat})
    if dtype is not None:
        leaves = {name: t.to(dtype) for name, t in leaves.items()}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    out = function(leaves.get("feat"), leaves["coords"], frequencies, leaves["weight"], leaves["bias"], eps)
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out.to(out.dtype))
    return {"out": out.detach(), **{f"d_{name}": g for name, g in zip(leaves, gradients)}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_exact(case):
    inputs = inputs_of(case, torch.float64)
    exact = run(reference.fourier_projection, *inputs, case[-1])
    kernel = run(fourier_projection_unchecked, *inputs, case[-1])
    for name, value in exact.items():
        # With one channel LayerNorm gives zero and every gradient vanishes but for rounding.
        assert relative_error(kernel[name], value) < 1e-12 or value.norm() < 1e-9, name


def float32_errors(case):
    """Per result of one draw: its name, the error of the kernel, and that of plain PyTorch."""
    inputs = inputs_of(case, torch.float32)
    exact = run(reference.fourier_projection, *inputs, case[-1], dtype=torch.float64)
    plain = run(reference.fourier_projection, *inputs, case[-1])
    kernel = run(fourier_projection_unchecked, *inputs, case[-1])
    for name, value in exact.items():
        assert kernel[name].dtype == plain[name].dtype
        yield name, relative_error(kernel[name], value), relative_error(plain[name], value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_error_is_that_of_plain_pytorch(case):
    """Over many draws of the few numbers of one token."""
    check_over_draws((row for _ in range(16 if case[2] == 1 else 2) for row in float32_errors(case)), 2e-7)


@pytest.mark.parametrize("features, mean, deviation", [(1, 13.0, 1.0), (1, 8600.0, 1.0), (1, 1e6, 0.0), (4, 47.0, 1.0)])
def test_few_channels_far_from_zero(features, mean, deviation):
    """Rounded, the rows of a centred weight do not add up to zero: a large mean times that is to be no error."""

    def plain(feat, coords, frequencies, weight, bias, eps):
        codes = reference.fourier_encode(coords, frequencies).to(weight.dtype)
        tokens = torch.cat([feat, codes], -1)
        return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=eps) @ weight + bias

    def rows():
        for _ in range(6):
            feat, coords, frequencies, weight, bias, d_out = inputs_of(
                (1, 1, 85, 2, 13, features, 16, 1e-5), torch.float32
            )
            inputs = (feat * deviation + mean, coords, frequencies, weight, bias * 0, d_out)
            exact = run(plain, *inputs, 1e-5, dtype=torch.float64)
            found = [run(function, *inputs, 1e-5) for function in (fourier_projection_unchecked, plain)]
            centred = (results["d_weight"] - results["d_weight"].mean(0) for results in (exact, *found))
            exact["d_weight"], *gradients = centred  # up to a row that is the same for every channel
            for results, gradient in zip(found, gradients):
                results["d_weight"] = gradient
            for name in ("out", "d_feat"):  # half of plain PyTorch's error, or one rounding
                kernel, theirs = (relative_error(results[name], exact[name]) for results in found)
                yield name, kernel, theirs / 2
            kernel, theirs = (relative_error(results["d_weight"], exact["d_weight"]) for results in found)
            yield "d_weight", kernel, theirs
            codes = [results["d_weight"][features:] for results in (*found, exact)]
            kernel, theirs = (relative_error(found, codes[-1]) for found in codes[:-1])
            yield "d_weight of the codes", kernel, theirs

    check_over_draws(rows(), 3e-8)


def test_float32_sums_stay_short_over_many_tokens():
    case = (1, 1, 60_000, 1, 4, 1, 16, 1e-5)
    inputs = inputs_of(case, torch.float32)
    inputs = (*inputs[:-1], inputs[-1] + 1)  # a sum that grows: rounding of a long chain would show
    exact = run(reference.fourier_projection, *inputs, 1e-5, dtype=torch.float64)
    kernel = run(fourier_projection_unchecked, *inputs, 1e-5)
    for name, value in exact.items():
        assert relative_error(kernel[name], value) < 5e-7, name


def exact_codes(p: float, f: float) -> tuple[float, float]:
    """sin and cos of pi p f, the phase reduced in rational arithmetic."""
    half_turns = Fraction(p) * Fraction(f)
    quarter = round(2 * half_turns)
    rest = math.pi * float(half_turns - Fraction(quarter, 2))
    s, c = math.sin(rest), math.cos(rest)
    return [(s, c), (c, -s), (-s, -c), (-c, s)][quarter % 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reach", [1.0, 1000.0])
def test_encoding_accuracy_at_high_frequencies(dtype, reach):
    """An identity as weight shows the codes themselves; positions include neighbours of zeros of sine and cosine."""
    frequencies = torch.linspace(1, 560, 37, dtype=torch.float64)  # max_freq 1120
    points = (torch.rand(150, dtype=torch.float64) * 2 - 1) * reach
    zeros = torch.arange(-40, 41, dtype=torch.float64) / 2 / frequencies[torch.arange(81) % 37]
    points = torch.cat([points, zeros, zeros * (1 + 1e-6), zeros + 1e-9, torch.tensor([-1.0, 0.0, 1.0])])
    weight = torch.eye(75, dtype=dtype)
    out = fourier_projection_unchecked(None, points.view(1, -1, 1), frequencies.view(1, -1), weight)[0].double()
    expected = (
        torch.tensor([[exact_codes(p, f) for f in frequencies.tolist()] for p in points.tolist()], dtype=torch.float64)
        .transpose(1, 2)
        .flatten(1)
    )
    error = (out[:, :-1] - expected).abs()
    # The oracle, and kernels without a fused multiply-add, round p f.
    phase = math.pi * torch.finfo(torch.float64).eps / 2 * (points.view(-1, 1) * frequencies).abs().repeat(1, 2)
    assert (error <= (1.2e-7 if dtype == torch.float32 else 3e-16) + phase).all()
    assert (error <= (2e-7 if dtype == torch.float32 else 6e-16) * expected.abs() + phase).all()
    assert torch.equal(out[:, -1], points.to(dtype).double())
    reduced = reference.fourier_encode(points.view(-1, 1), frequencies.view(1, -1))
    assert ((reduced[:, :-1] - expected).abs() <= 3e-16 + phase).all()


@pytest.mark.parametrize("layout", ["perceiver-pytorch", "deepmind"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_is_what_the_libraries_build(layout, norm_eps):
    max_freq, bands = (10.0, 14.0, 12.0), 6
    coords, feat = torch.rand(2, 50, 3, dtype=torch.float64) * 2 - 1, draw(2, 50, 4)
    weight, bias = draw(4 + 3 * 13, 7), draw(7)
    if layout == "deepmind":  # transformers' generate_fourier_features
        spaced = torch.stack([torch.linspace(1.0, top / 2, bands, dtype=torch.float64) for top in max_freq])
        angle = math.pi * (coords.unsqueeze(-1) * spaced).flatten(-2)
        code = torch.cat([coords, angle.sin(), angle.cos()], -1)
    else:
        code = torch.cat([theirs.fourier_encode(coords[..., a], max_freq[a], bands) for a in range(3)], -1)
    z = torch.cat([feat, code], -1)
    z = z if norm_eps is None else torch.nn.functional.layer_norm(z, z.shape[-1:], eps=norm_eps)
    keywords = dict(num_freq_bands=bands, max_freq=max_freq, norm_eps=norm_eps, layout=layout)
    for backend in ("cpu", "reference"):
        with pf.use_backend(backend):
            out = fourier_projection(coords, weight, feat=feat, bias=bias, **keywords)
        assert relative_error(out, z @ weight + bias) < 1e-12


@pytest.mark.parametrize("layout", ["perceiver-pytorch", "deepmind"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("sizes", [(1,), (70,), (7, 9), (1, 5, 6), (3, 1, 4, 2)])
def test_a_grid_is_its_positions(sizes, batch, norm_eps, layout):
    bands, tokens, axes = 5, math.prod(sizes), len(sizes)
    features = 3 if batch else 0
    lines = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in sizes]
    coords = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).view(tokens, axes)
    leaves = [draw(features + axes * (2 * bands + 1), 9), draw(9)] + ([draw(batch, tokens, features)] if batch else [])
    leaves = [t.requires_grad_() for t in leaves]
    keywords = dict(num_freq_bands=bands, max_freq=[8.0 + a for a in range(axes)], norm_eps=norm_eps, layout=layout)
    results = []
    for where in (coords, sizes):
        out = fourier_projection(where, leaves[0], bias=leaves[1], feat=leaves[2] if batch else None, **keywords)
        d_out = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
        results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    for on_grid, explicit in zip(*reversed(results)):
        assert on_grid.shape == explicit.shape
        assert relative_error(on_grid, explicit) < 1e-12


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
        "exact or plain_pytorch or encoding or active_isa",
    ]
    env = os.environ | {"PERCEIVER_FAST_CPU_ISA": isa, "PYTHONPATH": os.path.dirname(os.path.dirname(pf.__file__))}
    done = python(*command, env=env, cwd=os.path.dirname(__file__))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_active_isa_is_the_one_asked_for():
    wish = os.environ.get("PERCEIVER_FAST_CPU_ISA")
    assert extension.module.active_isa() == (wish or extension.module.available_isas()[-1])


@pytest.mark.parametrize("case", [(2, 2, 1000, 2, 3, 2, 17, 1e-5), (3, 1, 1500, 1, 5, 1, 8, None)], ids=str)
def test_threads_change_nothing_but_rounding_and_equal_runs_no_bit(case):
    inputs = inputs_of(case, torch.float32)
    exact = run(reference.fourier_projection, *inputs, case[-1], dtype=torch.float64)
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            first, second = (run(fourier_projection_unchecked, *inputs, case[-1]) for _ in range(2))
            for name, value in exact.items():
                assert torch.equal(first[name], second[name]), name
                assert relative_error(first[name], value) < 1e-6, name
    finally:
        torch.set_num_threads(1)


def test_gradcheck():
    for position_batch in (1, 2):
        coords = torch.rand(position_batch, 5, 2, dtype=torch.float64)
        inputs = tuple(t.requires_grad_() for t in (draw(2, 5, 3), coords, draw(13, 4), draw(4)))
        frequencies = torch.tensor([[1.0, 3.0], [1.0, 2.0]], dtype=torch.float64)
        for eps in (None, 1e-2):
            assert torch.autograd.gradcheck(
                lambda feat, p, w, b: fourier_projection_unchecked(feat, p, frequencies, w, b, eps), inputs
            )


def test_token_gradients_only_when_asked():
    feat, coords, frequencies, weight, bias, d_out = inputs_of(CASES[3], torch.float32)
    ops = torch.ops.perceiver_fast
    _, scale = ops.fourier_projection_forward(feat, coords, frequencies, weight, bias, 1e-5)
    dweight, dfeat, dcoords = ops.fourier_projection_backward(
        d_out, feat, coords, frequencies, weight, scale, 1e-5, False
    )
    assert dweight.shape == weight.shape and dfeat.numel() == 0 and dcoords.numel() == 0
    whole = ops.fourier_projection_backward(d_out, feat, coords, frequencies, weight, scale, 1e-5, True)
    assert torch.equal(whole[0], dweight) and whole[1].shape == feat.shape and whole[2].shape == coords.shape


def test_strides_change_no_bit():
    ops = torch.ops.perceiver_fast
    forward, backward = ops.fourier_projection_forward, ops.fourier_projection_backward
    dense = inputs_of((2, 2, 70, 3, 4, 5, 6, 1e-5), torch.float32)
    strided = tuple(t.mT.contiguous().mT if t.dim() > 1 else t for t in dense)
    assert not any(t.is_contiguous() for t in strided if t.dim() > 1)
    results = []
    for *inputs, d_out in (dense, strided):
        out, scale = forward(*inputs, 1e-5)
        results.append((out, scale, *backward(d_out, *inputs[:4], scale, 1e-5, True)))
    for from_dense, from_strided in zip(*results):
        assert torch.equal(from_dense, from_strided)
    ones = torch.ones(()).expand(2, 70, 6)
    gradients = [backward(d, *dense[:4], results[0][1], 1e-5, False)[0] for d in (ones, ones.contiguous())]
    assert torch.equal(*gradients)


MEASURE = """
import torch
from perceiver_fast.ops import fourier_projection
def resident(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field + ":")) / 1024
def step(tokens):
    coords, feat = torch.rand(1, tokens, 3, requires_grad=True), torch.rand(1, tokens, 1, requires_grad=True)
    weight = torch.randn(388, 8, requires_grad=True)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    fourier_projection(coords, weight, num_freq_bands=64, max_freq=9.0, feat=feat, norm_eps=1e-5).sum().backward()
    assert coords.grad.isfinite().all()
    return resident("VmHWM") - before
step(100)
print(step(200_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_encoding_of_all_tokens_never_exists():
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(pf.__file__))}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 60  # the encoding alone would be 296 MB


def test_coords_keep_their_precision_and_their_dtype():
    coords = torch.rand(1, 40, 1, dtype=torch.float64)
    weight = torch.eye(129)
    fine = fourier_projection(coords, weight, num_freq_bands=64, max_freq=1120.0)
    exact = fourier_projection(coords, weight.double(), num_freq_bands=64, max_freq=1120.0)
    assert (fine - exact).abs().max() < 1.2e-7  # rounded to float32 the positions would leave 1e-4
    single = coords.float().requires_grad_()
    fourier_projection(single, weight, num_freq_bands=4 * 16, max_freq=9.0).sum().backward()
    assert single.grad.dtype == torch.float32


def test_the_registered_op_refuses_what_it_cannot_read():
    feat, coords, frequencies, weight, bias, d_out = inputs_of((2, 2, 9, 2, 3, 2, 5, 1e-5), torch.float32)
    ops = torch.ops.perceiver_fast
    forward, backward = ops.fourier_projection_forward, ops.fourier_projection_backward
    good = (feat, coords, frequencies, weight, bias, 1e-5)
    out, scale = forward(*good)
    for place, bad in [
        (0, feat.double()), (0, feat[:1]), (0, feat[..., 1:]), (1, coords.float()), (1, coords[:, 1:]), (1, coords[0]),
        (2, frequencies[:1]), (2, frequencies.float()), (3, weight.half()), (3, weight[1:]), (4, bias[1:]),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match="fourier_projection: expected"):
            forward(*good[:place], bad, *good[place + 1 :])
    for bad_out, bad_scale in ((d_out[:1], scale), (d_out.double(), scale), (d_out, scale[:1])):
        with pytest.raises(RuntimeError, match="fourier_projection: expected"):
            backward(bad_out, *good[:4], bad_scale, 1e-5, True)
