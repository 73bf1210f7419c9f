"""LayerNorm's scale against LayerNorm itself."""

import pytest
import torch
from support import relative_error

from perceiver_fast.layers import axis_codes
from perceiver_fast.ops import grid_scale
from perceiver_fast.tokens import GridTokens


def tokens_of(feat, bands=5):
    codes = tuple(axis_codes(n, bands, 10.0, feat.dtype, feat.device) for n in feat.shape[1:-1])
    return GridTokens(feat, codes)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 7, 3), (1, 5, 6, 4), (2, 3, 1, 4, 9)])
def test_is_layer_norms_scale(shape, offset, backend):
    import perceiver_fast as pf

    with pf.use_backend(backend):
        feat = torch.randn(shape, dtype=torch.float64) + offset
        tokens = tokens_of(feat)
        built = tokens.materialize()
        expected = (built.var(-1, unbiased=False) + 1e-5).rsqrt().view(shape[:-1])
        assert relative_error(tokens.scale(1e-5), expected) < 1e-14 * (1 + offset)
        single = tokens_of(feat.float()).scale(1e-5)
        plain = (built.float().var(-1, unbiased=False) + 1e-5).rsqrt().view(shape[:-1])
        assert relative_error(single, expected) <= 2 * relative_error(plain, expected) + 2e-7


def test_gradcheck():
    feat = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tokens_of(x).scale(1e-5), (feat,))
    mean, square = torch.randn(7).double().requires_grad_(), torch.rand(7).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, m, s: grid_scale(x, m, s, [11, 4], 1e-5), (feat, mean, square))


def test_scale_is_computed_once():
    tokens = tokens_of(torch.randn(1, 4, 5, 3))
    assert tokens.scale(1e-5) is tokens.scale(1e-5) and tokens.scale(1e-5) is not tokens.scale(1e-6)


GOOD = dict(
    feat=torch.randn(2, 3, 4, 2), axis_mean=torch.randn(7), axis_square=torch.rand(7), axis_channels=[11, 4], eps=1e-5
)
BAD = [
    (dict(feat=None), TypeError, "expected feat to be a tensor, got NoneType"),
    (dict(feat=[1.0]), TypeError, "expected feat to be a tensor, got list"),
    (dict(feat=GOOD["feat"].long()), TypeError, r"feat to be floating point, got torch.int64.*\.float\(\)"),
    (dict(axis_mean=torch.randn(7).double()), TypeError, "axis_mean to be torch.float32 like feat, got torch.float64"),
    (dict(axis_square=torch.rand(7, device="meta")), ValueError, "axis_square on cpu like feat, got meta"),
    (dict(axis_channels=[]), ValueError, r"axis_channels of at least one axis.*got \[\]"),
    (dict(axis_channels=[11, -1]), ValueError, r"ints from 0 on, got \[11, -1\]"),
    (dict(axis_channels=[11, 2**62]), ValueError, "ints from 0 on"),
    (dict(axis_channels=[11.0, 4]), TypeError, "axis_channels to be ints"),
    (dict(axis_channels=[11]), ValueError, r"feat \[B, n_1, .., n_A, F\] of 1 axes.*got shape \(2, 3, 4, 2\)"),
    (dict(axis_mean=torch.randn(8)), ValueError, r"axis_mean of shape \(7,\), got \(8,\)"),
    (dict(axis_square=torch.rand(6)), ValueError, r"axis_square of shape \(7,\), got \(6,\)"),
    (dict(eps=-1.0), ValueError, "eps of at least 0, got -1.0"),
    (dict(eps=float("nan")), ValueError, "eps of at least 0, got nan"),
]


@pytest.mark.parametrize("change,error,words", BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_explained(change, error, words):
    assert grid_scale(**GOOD).shape == (2, 3, 4)
    assert torch.equal(grid_scale(**GOOD | dict(axis_channels=torch.tensor([11, 4]))), grid_scale(**GOOD))
    with pytest.raises(error, match=words):
        grid_scale(**GOOD | change)
