"""The CUDA kernels of fourier_projection without a GPU: their sources run on the host, thread by thread.

This checks indices, barriers and maths, not what only a GPU has: timing, memory order within a warp, its rounding.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fourier_projection_cases import CASES, case
from support import relative_error

ROOT = Path(__file__).resolve().parents[2]
EPS = 1e-5


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("tokens", "positions")]
    _fields_ += [(name, ctypes.c_int32) for name in ("features", "axes", "bands", "columns", "downwards")]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ to run the CUDA kernels on the host with")
    library = tmp_path_factory.mktemp("emulation") / "fourier_projection.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
    source = ROOT / "tests" / "cuda" / "fourier_projection.cpp"
    done = subprocess.run([compiler, *flags, source, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return ctypes.CDLL(str(library))


def call(library, name, dtype, *arguments):
    def convert(value):
        if value is None:
            return None
        if isinstance(value, torch.Tensor):
            assert value.is_contiguous()
            return ctypes.c_void_p(value.data_ptr())
        return ctypes.c_double(value) if isinstance(value, float) else value

    getattr(library, f"{name}_{str(dtype).split('.')[1]}")(*map(convert, arguments))


@pytest.mark.parametrize("frequency", [0.5, 1.0, 112.0, 4321.987, 2.0**40])
def test_sine_and_cosine(emulated, frequency):
    """Against an exactly reduced phase: whole and half turns are taken off with integers, which lose nothing."""
    torch.manual_seed(1)
    position = torch.cat([torch.linspace(-1, 1, 4001).double(), torch.rand(20000).double() * 2 - 1])
    position = (position * 2**20).round() / 2**20  # with frequencies of as few bits the phase is exact in a double
    frequency = float(torch.tensor(frequency).float())
    rest = torch.remainder(position * frequency, 2.0)
    quarters = (rest * 2).round()
    angle = (rest - quarters / 2) * math.pi
    turn = quarters.remainder(4).long()
    sine = torch.stack([angle.sin(), angle.cos(), -angle.sin(), -angle.cos()]).gather(0, turn[None])[0]
    cosine = torch.stack([angle.cos(), -angle.sin(), -angle.cos(), angle.sin()]).gather(0, turn[None])[0]
    for dtype, bound in ((torch.float32, 0.8 * 2**-23), (torch.float64, 1.5 * 2**-52)):
        actual = torch.full((2, len(position)), math.nan, dtype=dtype)
        call(emulated, "sin_cos", dtype, len(position), position, frequency, actual[0], actual[1])
        error = (actual.double() - torch.stack([sine, cosine])).abs()
        spacing = torch.stack([sine, cosine]).abs().clamp_min(1e-300)
        assert (error / 2.0 ** spacing.log2().ceil()).max() < bound


def plain(feat, coords, frequencies, weight, bias, eps):
    """The projection in plain PyTorch, encoding and all, in weight's dtype."""
    angle = (math.pi * coords.unsqueeze(-1) * frequencies).to(torch.float64)
    code = torch.cat([angle.sin(), angle.cos(), coords.unsqueeze(-1)], -1).flatten(2).to(weight.dtype)
    batch = max(len(coords), 0 if feat is None else len(feat))
    parts = ([] if feat is None else [feat]) + [code.expand(batch, -1, -1)]
    z = torch.cat(parts, -1)
    r = 1 if eps is None else (z.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
    out = (r * z) @ weight
    return out if bias is None else out + bias


@pytest.mark.parametrize("downwards", [0, 1], ids=["upwards", "downwards"])
@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels(emulated, dtype, name, eps, downwards):
    feat, coords, frequencies, weight, bias, d_out = case(*CASES[name])
    inputs = [feat, coords, frequencies, weight, bias]
    leaves = [t.clone().requires_grad_() for t in (feat, coords, weight) if t is not None]
    oracle = iter(leaves)
    own = [next(oracle) if t is not None else None for t in (feat, coords)]
    expected = plain(*own, frequencies, next(oracle), bias, eps)
    gradients = list(torch.autograd.grad(expected, leaves, d_out))

    batch, tokens, columns = expected.shape
    axes, bands = frequencies.shape
    features = 0 if feat is None else feat.shape[-1]
    sizes = Sizes(batch * tokens, len(coords) * tokens, features, axes, bands, columns, downwards)

    def empty(*shape, dtype=dtype):
        return torch.full(shape, math.nan, dtype=dtype)

    feat, coords, frequencies, weight, bias = (
        t if t is None or i in (1, 2) else t.to(dtype) for i, t in enumerate(inputs)
    )
    out, scale = empty(batch, tokens, columns), None if eps is None else empty(batch, tokens)
    n = ctypes.byref(sizes)
    call(emulated, "forward", dtype, n, feat, coords, frequencies, weight, bias, float(eps or 0), scale, out)
    dweight, dcoords = empty(*weight.shape), empty(*coords.shape, dtype=torch.float64)
    dfeat = None if feat is None else empty(*feat.shape)
    arguments = (feat, coords, frequencies, weight, d_out.to(dtype), scale, dweight, dfeat, dcoords)
    call(emulated, "backward", dtype, n, *arguments)

    bound = 1e-12 if dtype == torch.float64 else 3e-6
    assert relative_error(out, expected) < bound
    actual = ([] if dfeat is None else [dfeat]) + [dcoords, dweight]
    for mine, theirs in zip(actual, gradients, strict=True):
        if theirs.norm() > 1e-6:  # one channel has a gradient only without LayerNorm
            assert relative_error(mine, theirs) < bound * 10
        else:
            assert mine.double().norm() < 1e-3
