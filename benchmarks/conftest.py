"""Options of the benchmarks, and a record of what could not be measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `from benchmarks...`, also under a bare `pytest`

from benchmarks.geometries import GEOMETRIES, select  # noqa: E402
from benchmarks.measure import DEFAULT_THREADS  # noqa: E402

MISSING = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perceiver-fast benchmarks")
    group.addoption("--geometry", action="append", default=[], choices=list(GEOMETRIES), help="one to measure; repeat")
    group.addoption("--all", action="store_true", help="measure every geometry, also the slow ones")
    group.addoption("--threads", type=int, default=DEFAULT_THREADS, help="torch's threads (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[MISSING] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "geometry" in metafunc.fixturenames:
        names = select(metafunc.config.getoption("--geometry"), metafunc.config.getoption("--all"))
        metafunc.parametrize("geometry", [name for name in names if metafunc.module.LEVEL in GEOMETRIES[name].levels])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop the placeholders that pytest makes when no chosen geometry has a test's level."""
    items[:] = [
        item for item in items if not hasattr(item, "callspec") or item.callspec.params["geometry"] in GEOMETRIES
    ]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """torch.compile keeps code per function, not per model, and gives up after a few: every model starts afresh."""
    yield
    torch.compiler.reset()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    report = outcome.get_result()
    if report.outcome != "passed":
        params = item.callspec.params
        item.config.stash[MISSING].append(
            {
                "level": item.module.LEVEL,
                "geometry": params["geometry"],
                "pass": params["pass_name"],
                "peer": params["peer"],
                "outcome": report.outcome,
                "reason": call.excinfo.exconly().splitlines()[0].removeprefix("Skipped: "),
            }
        )


def pytest_benchmark_update_json(config: pytest.Config, benchmarks, output_json: dict) -> None:
    output_json["missing"] = config.stash[MISSING]
