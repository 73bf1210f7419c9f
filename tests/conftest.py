"""Every test sees fresh memory as NaN, so that a value read before it is written is noticed."""

import pytest
import torch

import perceiver_fast as pf


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what makes torch fill empty tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def automatic_backend():
    with pf.use_backend("auto"):
        yield
