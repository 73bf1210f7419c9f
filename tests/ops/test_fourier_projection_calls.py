"""The Python side of fourier_projection: dtypes, autocast, compilation, empty and bad input, forced backends."""

import pytest
import torch
from support import needs_extension, relative_error

import perceiver_fast as pf
from perceiver_fast.ops import fourier_projection

pytestmark = pytest.mark.skipif(**needs_extension)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
def test_empty_inputs(shape):
    for coords in (torch.rand(*shape, 2), torch.rand(shape[1], 2)):
        coords, weight, feat = coords.requires_grad_(), torch.randn(13, 4).requires_grad_(), torch.randn(*shape, 3)
        out = fourier_projection(coords, weight, num_freq_bands=2, max_freq=4.0, feat=feat, norm_eps=1e-5)
        assert out.shape == (*shape, 4)
        out.sum().backward()
        assert not weight.grad.any() and not coords.grad.any()


@pytest.mark.parametrize("where", ["tokens", "grid"])
def test_compiles_whole(where):
    bias, feat = torch.randn(8), torch.randn(2, 30, 3, requires_grad=True)
    weight = torch.randn(3 + 2 * 9, 8, requires_grad=True)
    coords = torch.rand(2, 30, 2) if where == "tokens" else (5, 6)

    def function(weight, feat):
        return fourier_projection(
            coords, weight, num_freq_bands=4, max_freq=9.0, feat=feat, bias=bias, norm_eps=1e-5, layout="deepmind"
        )

    out, compiled = function(weight, feat), torch.compile(function, fullgraph=True, backend="aot_eager")(weight, feat)
    assert relative_error(compiled, out) < 1e-6
    for plain, of_compiled in zip(*(torch.autograd.grad(o.square().sum(), (weight, feat)) for o in (out, compiled))):
        assert relative_error(of_compiled, plain) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coords", [(5, 6), "tokens"])
def test_narrow_weights_are_computed_in_float32(dtype, coords):
    coords = torch.rand(2, 30, 2).to(dtype) if coords == "tokens" else coords
    keywords = dict(num_freq_bands=4, max_freq=9.0, norm_eps=1e-5)
    weight, feat, bias = torch.randn(21, 8).to(dtype), torch.randn(2, 30, 3), torch.randn(8).to(dtype)
    out = fourier_projection(coords, weight, feat=feat, bias=bias, **keywords)
    wide = fourier_projection(coords, weight.float(), feat=feat, bias=bias.float(), **keywords)
    assert out.dtype == dtype and torch.equal(out, wide.to(dtype))


@pytest.mark.parametrize("coords", [(5, 6), "tokens"])
def test_autocast_computes_in_float32_and_returns_its_dtype(coords):
    coords = torch.rand(1, 30, 2, requires_grad=True) if coords == "tokens" else coords
    weight = torch.randn(18, 8, requires_grad=True)
    plain = fourier_projection(coords, weight, num_freq_bands=4, max_freq=9.0, norm_eps=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fourier_projection(coords, weight, num_freq_bands=4, max_freq=9.0, norm_eps=1e-5)
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain.bfloat16())
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def good_call():
    return dict(
        coords=torch.rand(2, 9, 3), weight=torch.randn(4 + 3 * 5, 6), num_freq_bands=2, max_freq=8.0,
        feat=torch.randn(2, 9, 4), bias=torch.randn(6), norm_eps=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(coords=torch.ones(2, 9, 3, dtype=torch.long)), TypeError, r"floating point.*int64.*\.double\(\)"),
        (dict(coords=torch.rand(9)), ValueError, r"coords \[B, M, A\].*shape \(9,\)"),
        (dict(coords=torch.rand(2, 9, 0)), ValueError, "at least one axis"),
        (dict(coords=torch.rand(2, 8, 3)), ValueError, r"feat \[2, 8, F\].*\(2, 9, 4\)"),
        (dict(coords=torch.rand(3, 9, 3)), ValueError, r"feat \[3, 9, F\].*\(2, 9, 4\)"),
        (dict(coords=torch.rand(2, 9, 2)), ValueError, r"4 \+ 2 \* 5 = 14 rows, got shape \(19, 6\)"),
        (dict(coords=torch.rand(2, 9, 3, device="meta")), ValueError, "coords on cpu.*meta"),
        (dict(coords=(3, 0, 3)), ValueError, r"sizes of at least 1, got \(3, 0, 3\)"),
        (dict(coords=()), ValueError, "at least one axis"),
        (dict(coords=(3, 2.0, 3)), TypeError, "tuple of ints"),
        (dict(coords=(3, 4, 1)), ValueError, r"feat \[B, 12, F\]"),
        (dict(weight=torch.randn(6, 19)), ValueError, "19 rows.*transposed"),
        (dict(weight=torch.randn(19)), ValueError, r"weight \[C, D\]"),
        (dict(weight=torch.ones(19, 6, dtype=torch.int)), TypeError, "weight.*floating point.*int32"),
        (dict(weight=None), TypeError, "weight to be a tensor, got NoneType"),
        (dict(num_freq_bands=-1), ValueError, "num_freq_bands.*-1"),
        (dict(num_freq_bands=2.0), ValueError, "num_freq_bands.*2.0"),
        (dict(max_freq=(8.0, 9.0)), ValueError, "each of the 3 axes, got 2"),
        (dict(max_freq=float("nan")), ValueError, "max_freq to be finite.*nan"),
        (dict(feat=torch.randn(9, 4)), ValueError, r"feat \[2, 9, F\].*\(9, 4\)"),
        (dict(feat=torch.randn(2, 9, 4, device="meta")), ValueError, "feat on cpu.*meta"),
        (dict(bias=torch.randn(5)), ValueError, r"bias of shape \(6,\), got \(5,\)"),
        (dict(norm_eps=-1.0), ValueError, "norm_eps.*-1.0"),
        (dict(layout="lucid"), ValueError, "'perceiver-pytorch', 'deepmind'.*'lucid'"),
    ],
)
def test_bad_input_is_explained(change, error, words):
    fourier_projection(**good_call())
    with pytest.raises(error, match=words):
        fourier_projection(**(good_call() | change))


def test_forced_backends():
    call = good_call()
    with pf.use_backend("reference"):
        expected = fourier_projection(**call)
    with pf.use_backend("cpu"):
        assert relative_error(fourier_projection(**call), expected) < 1e-6
        moved = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in call.items()}
        with pytest.raises(pf.BackendError, match="cpu.*forced.*not meta"):
            fourier_projection(**moved)
