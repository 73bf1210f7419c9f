"""Options of the benchmarks, and a record of what could not be measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `from benchmarks...`, also under a bare `pytest`

from benchmarks.options import DEFAULT_THREADS, positive  # noqa: E402
from benchmarks.sides import Case  # noqa: E402
from benchmarks.suite import measure  # noqa: E402
from benchmarks.suite.level import DTYPES  # noqa: E402
from benchmarks.suite.levels import LEVELS  # noqa: E402
from benchmarks.suite.plans import LEVEL_NAMES, PLANS, QUICK, select  # noqa: E402
from perceiver_fast.insight.geometries import GEOMETRIES  # noqa: E402
from perceiver_fast.insight.roofs import measure_roofs  # noqa: E402

HERE = Path(__file__).resolve().parent
# No benchmarks: pytest would look for doctests there.
collect_ignore_glob = ["base/*", "gpu*", "nsight/*", "scaling/*", "*.md"]
MISSING = pytest.StashKey[list]()
SLOW_PEER = "compile-eager"  # compiles for as long as "compile" and is seldom the faster of the two
QUICK_PASSES = {"model": ("forward", "step"), "layer": ("forward", "step"), "grid_attention": ("forward",)}
PASSES = ("forward", "step", "step+tokens")
QUICK_SECONDS = 0.5  # for the rounds of one side
# Of a parametrized benchmark: option, parameter, what it may be, and what is measured when nothing is asked for.
CHOICES = (
    ("--dtype", "dtype", DTYPES, DTYPES[:1]),
    ("--pass", "pass_name", PASSES, PASSES),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perceiver-fast benchmarks")
    group.addoption("--geometry", action="append", default=[], choices=list(PLANS), help="one to measure; repeat")
    group.addoption("--level", action="append", default=[], choices=LEVEL_NAMES, help="model, layer, or an op; repeat")
    group.addoption("--batch", action="append", default=[], type=positive, help="inputs at once; repeat (default: 1)")
    for option, _, known, default in CHOICES:
        group.addoption(
            option, action="append", default=[], choices=known, help=f"repeat (default: {', '.join(default)})"
        )
    group.addoption("--all", action="store_true", help=f"every geometry and dtype, also the slow ones, and {SLOW_PEER}")
    group.addoption("--quick", action="store_true", help=f"only {QUICK}, one thing each: done in three minutes")
    group.addoption("--threads", type=positive, default=DEFAULT_THREADS, help="torch's threads (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--quick"):
        measure.SECONDS_PER_SIDE = QUICK_SECONDS
    config.stash[MISSING] = []


def level_of(function: Callable) -> str:
    """What a benchmark measures: its name says it."""
    return function.__name__.removeprefix("test_")


@pytest.fixture
def dtype() -> str:
    """Of levels that are measured in no other."""
    return DTYPES[0]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is parametrised last varies fastest: the peers of one geometry, pass and dtype run one after the other."""
    if "geometry" not in metafunc.fixturenames:
        return
    option, name = metafunc.config.getoption, level_of(metafunc.function)
    names = [QUICK] if option("--quick") else option("--geometry")
    metafunc.parametrize("geometry", select(names, option("--all"), name))
    metafunc.parametrize("batch", option("--batch") or [1], ids=lambda batch: f"batch{batch}")
    metafunc.parametrize("pass_name", LEVELS[name].passes)
    if len(LEVELS[name].dtypes) > 1:
        metafunc.parametrize("dtype", LEVELS[name].dtypes)
    metafunc.parametrize("peer", LEVELS[name].peers)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if HERE not in item.path.parents or _wanted(config, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _wanted(config: pytest.Config, item: pytest.Item) -> bool:
    """Whether a benchmark was asked for; pytest makes placeholders when no chosen geometry has a level."""
    if not hasattr(item, "callspec"):  # an example in a docstring
        return False
    params, option, level = item.callspec.params, config.getoption, level_of(item.function)
    if params["geometry"] not in PLANS or option("--level") and level not in option("--level"):
        return False
    if not LEVELS[level].peers[params["peer"]].fits(GEOMETRIES[params["geometry"]]):
        return False  # it would be another peer under another name
    if option("--quick") and not _is_quick(level, params["pass_name"], params["peer"]):
        return False
    for name, parameter, known, default in CHOICES:
        wanted = option(name) or (known if option("--all") else default)
        if params.get(parameter, default[0]) not in wanted:
            return False
    return option("--all") or bool(option("--geometry")) or params["peer"] != SLOW_PEER


def _is_quick(level: str, pass_name: str, peer: str) -> bool:
    """Whether a benchmark is among the quick ones: compiling takes half a minute, and is worth it once."""
    return pass_name in QUICK_PASSES.get(level, ()) and (
        peer != "compile" or (level, pass_name) == ("model", "forward")
    )


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """torch.compile keeps code per function, not per model, and gives up after a few: every model starts afresh."""
    yield
    torch.compiler.reset()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    report = outcome.get_result()
    if report.outcome != "passed" and HERE in item.path.parents:
        params = {"dtype": DTYPES[0]} | item.callspec.params
        params["geometry"] = GEOMETRIES[params["geometry"]]
        reason = call.excinfo.exconly().splitlines()[0].removeprefix("Skipped: ")
        case = Case(level_of(item.function), **params)
        item.config.stash[MISSING].append(case.record() | {"outcome": report.outcome, "reason": reason})


def pytest_benchmark_update_json(config: pytest.Config, benchmarks, output_json: dict) -> None:
    output_json["missing"] = config.stash[MISSING]
    roofs = measure_roofs(config.getoption("--threads"))
    output_json["roofs"] = None if roofs is None else asdict(roofs)
