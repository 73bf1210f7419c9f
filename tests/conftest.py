"""Every test sees fresh memory as NaN, so that a value read before it is written is noticed.

Tests run on one thread: their tensors are small, and a busy machine makes every parallel region of small work wait.
Those that are about threads ask for more.
"""

import pytest
import torch

import perceiver_fast as pf


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what makes torch fill empty tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def automatic_backend():
    with pf.use_backend("auto"):
        yield
