"""grid_scale's Triton kernel against the reference in float64."""

import pytest
import torch
from support import relative_error

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.ops import grid_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("sizes, features", [((7,), 1), ((5, 67), 3), ((2, 3, 1, 4), 40), ((4, 5), 0)], ids=str)
def test_error_is_that_of_plain_pytorch(device, sizes, features, offset, dtype):
    torch.manual_seed(0)
    widths = list(range(5, 5 + len(sizes)))
    tensors = torch.randn(2, *sizes, features) + offset, torch.randn(sum(sizes)), torch.rand(sum(sizes))
    tensors = [t.to(device, dtype) for t in tensors]
    with pf.use_backend("triton"):
        scale = grid_scale(*tensors, widths)
    exact = reference.grid_scale(*(t.double() for t in tensors), widths, 1e-5)
    plain = reference.grid_scale(*tensors, widths, 1e-5)
    assert scale.dtype == dtype
    assert relative_error(scale, exact) <= 2 * relative_error(plain, exact) + torch.finfo(dtype).eps


def test_a_variance_that_overflows_leaves_a_scale_of_zero(device):
    feat = torch.tensor([[[1e30, -1e30, 0.0], [1.0, 2.0, 3.0]]], device=device)
    with pf.use_backend("triton"):
        scale = grid_scale(feat, torch.zeros(2, device=device), torch.ones(2, device=device), [4])
    assert scale[0, 0] == 0 and scale[0, 1] > 0
