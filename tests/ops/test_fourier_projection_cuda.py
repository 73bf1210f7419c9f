"""The CUDA kernels of fourier_projection on a GPU, against the reference in float64."""

import pytest
import torch
from fourier_projection_cases import CASES, case
from support import relative_error

from perceiver_fast import extension

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU: the CUDA kernels did NOT run"),
    pytest.mark.skipif(extension.cuda_error is not None, reason=f"{extension.cuda_error}: they did NOT run"),
]
EPS = 1e-5
LARGE = {
    "many rows": (1, 1, 50_001, 3, 2, 64, 64, True),
    "wide rows": (2, 1, 1_025, 700, 2, 64, 1_027, True),
}


def ops():
    import perceiver_fast.ops.fourier_projection  # noqa: F401, defines the schemas

    return torch.ops.perceiver_fast


def plain(inputs, d_out, eps, dtype):
    """Output and gradients of feat, coords and the weight (its centred part) by the reference."""
    from perceiver_fast import reference

    feat, coords, frequencies, weight, bias = inputs
    feat, weight, bias = (None if t is None else t.to(dtype) for t in (feat, weight, bias))
    leaves = [t.clone().requires_grad_() for t in (feat, coords, weight) if t is not None]
    given = iter(leaves)
    own_feat = None if feat is None else next(given)
    out = reference.fourier_projection(own_feat, next(given), frequencies, next(given), bias, eps)
    gradients = torch.autograd.grad(out, leaves, d_out.to(dtype))
    return [out.detach(), *gradients[:-1], gradients[-1] - gradients[-1].mean(0)]


def kernels(inputs, d_out, eps, dtype):
    """The same by the kernels."""
    feat, coords, frequencies, weight, bias = inputs
    feat, weight, bias = (None if t is None else t.to(dtype) for t in (feat, weight, bias))
    out, scale = ops().fourier_projection_forward(feat, coords, frequencies, weight, bias, eps)
    arguments = (d_out.to(dtype), feat, coords, frequencies, weight, scale, eps)
    dweight, dfeat, dcoords = ops().fourier_projection_backward(*arguments, True)
    alone, *none = ops().fourier_projection_backward(*arguments, False)
    assert torch.equal(alone, dweight) and all(t.numel() == 0 for t in none)
    return [out, *([] if feat is None else [dfeat]), dcoords, dweight - dweight.mean(0)]


def cuda_case(name):
    tensors = [None if t is None else t.cuda() for t in case(*(CASES | LARGE)[name])]
    return tensors[:-1], tensors[-1]


@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize("name", CASES | LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_near_as_plain_pytorch(dtype, name, eps):
    inputs, d_out = cuda_case(name)
    expected = plain(inputs, d_out, eps, torch.float64)
    theirs = plain(inputs, d_out, eps, dtype)
    ours = kernels(inputs, d_out, eps, dtype)
    floor = 1e-12 if dtype == torch.float64 else 5e-7
    for actual, other, truth in zip(ours, theirs, expected, strict=True):
        if truth.norm() > 1e-6:  # a single channel has no gradient through LayerNorm
            assert relative_error(actual, truth) <= 2 * relative_error(other, truth) + floor


def test_repeats_bit_by_bit_on_any_stream():
    inputs, d_out = cuda_case("many tokens")
    first = kernels(inputs, d_out, EPS, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = kernels(inputs, d_out, EPS, torch.float32)
    stream.synchronize()
    assert all(map(torch.equal, first, second))


def test_nothing_in_nothing_out():
    inputs, d_out = cuda_case("odd")
    inputs[0], inputs[1] = inputs[0][:, :0], inputs[1][:, :0]
    out, dfeat, dcoords, dweight = kernels(inputs, d_out[:, :0], EPS, torch.float32)
    assert out.numel() == dfeat.numel() == dcoords.numel() == 0 and dweight.norm() == 0


def test_says_what_is_wrong():
    (feat, coords, frequencies, weight, _), _ = cuda_case("odd")
    with pytest.raises(RuntimeError, match="expected weight of C"):
        ops().fourier_projection_forward(None, coords, frequencies, weight, None, None)
    with pytest.raises(RuntimeError, match="weight's device"):
        ops().fourier_projection_forward(feat, coords.cpu(), frequencies, weight, None, None)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_runs_on_the_tensors_device():
    inputs, d_out = cuda_case("odd")
    first = kernels(inputs, d_out, EPS, torch.float64)
    moved = [None if t is None else t.to("cuda:1") for t in (*inputs, d_out)]
    second = kernels(moved[:-1], moved[-1], EPS, torch.float64)
    assert all(b.device.index == 1 and torch.equal(a, b.to(a.device)) for a, b in zip(first, second, strict=True))
