"""Every test sees fresh memory as NaN, so that a value read before it is written is noticed.

Tests run on one thread: their tensors are small, and a busy machine makes every parallel region of small work wait.
Those that are about threads ask for more.
"""

import sys

import pytest
import torch

import perceiver_fast as pf
from perceiver_fast.gpu import INTERPRETED, triton_error

if INTERPRETED and triton_error is None:
    import fast_interpreter  # noqa: F401

collect_ignore = ["adapters/suite"]  # for transformers' own test folder

# Files that take long, the longest first: `make test` gives files to two workers, and none should begin these last.
LONGEST = (
    "test_kernels.py",
    "test_packaging.py",
    "test_examples.py",
    "test_campaign.py",
    "test_shard.py",
    "test_aarch64.py",
    "test_core.py",
    "test_gpu_battery_runs.py",
    "test_compile.py",
    "test_typing.py",
    "test_demo.py",
    "test_deployment.py",
    "test_scaling.py",
    "test_kernels_compile.py",
    "test_graphs.py",
    "test_cuda_build.py",
    "test_sharding.py",
    "test_gpu_battery.py",
    "test_fake_driver.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist; by itself pytest keeps its order
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what makes torch fill empty tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled():
    """Graphs that an earlier file compiled for the same functions would make a later one's calls recompilations."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def automatic_backend():
    with pf.use_backend("auto"):
        yield
