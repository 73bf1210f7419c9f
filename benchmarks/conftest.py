"""Options of the benchmarks, and a record of what could not be measured."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `from benchmarks...`, also under a bare `pytest`

from benchmarks import measure  # noqa: E402
from benchmarks.geometries import PLANS, QUICK, select  # noqa: E402
from benchmarks.measure import DEFAULT_THREADS  # noqa: E402
from perceiver_fast.commands.options import positive  # noqa: E402
from perceiver_fast.insight.roofs import measure_roofs  # noqa: E402

HERE = Path(__file__).resolve().parent
collect_ignore_glob = ["base*.py", "gpu*", "nsight/*", "*.md"]  # no benchmarks: pytest would look for doctests there
MISSING = pytest.StashKey[list]()
SLOW_PEER = "compile-eager"  # compiles for as long as "compile" and is seldom the faster of the two
QUICK_PASSES = {"model": ("forward", "step"), "layer": ("forward", "step"), "grid_attention": ("forward",)}
QUICK_SECONDS = 0.5  # for the rounds of one side
LEVELS = tuple(dict.fromkeys(level for plan in PLANS.values() for level in plan.levels))
# Of a parametrized benchmark: option, parameter, what it may be, and what is measured when nothing is asked for.
CHOICES = (
    ("--dtype", "dtype", ("float32", "bfloat16"), ("float32",)),
    ("--pass", "pass_name", ("forward", "step", "step+tokens"), ("forward", "step", "step+tokens")),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perceiver-fast benchmarks")
    group.addoption("--geometry", action="append", default=[], choices=list(PLANS), help="one to measure; repeat")
    group.addoption("--level", action="append", default=[], choices=LEVELS, help="model, layer, or an op; repeat")
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "geometry" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    names = [QUICK] if option("--quick") else option("--geometry")
    metafunc.parametrize("geometry", select(names, option("--all"), metafunc.module.LEVEL))
    metafunc.parametrize("batch", option("--batch") or [1], ids=lambda batch: f"batch{batch}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if HERE not in item.path.parents or _wanted(config, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _wanted(config: pytest.Config, item: pytest.Item) -> bool:
    """Whether a benchmark was asked for; pytest makes placeholders when no chosen geometry has a level."""
    if not hasattr(item, "callspec"):  # an example in a docstring
        return False
    params, option = item.callspec.params, config.getoption
    if params["geometry"] not in PLANS or option("--level") and item.module.LEVEL not in option("--level"):
        return False
    if not getattr(item.module, "fits", lambda *_: True)(params["geometry"], params["peer"]):
        return False  # it would be another peer under another name
    if option("--quick") and not _is_quick(item.module.LEVEL, params["pass_name"], params["peer"]):
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
        params = item.callspec.params
        item.config.stash[MISSING].append(
            {
                "level": item.module.LEVEL,
                "geometry": params["geometry"],
                "batch": params["batch"],
                "dtype": params.get("dtype", "float32"),
                "pass": params["pass_name"],
                "peer": params["peer"],
                "outcome": report.outcome,
                "reason": call.excinfo.exconly().splitlines()[0].removeprefix("Skipped: "),
            }
        )


def pytest_benchmark_update_json(config: pytest.Config, benchmarks, output_json: dict) -> None:
    output_json["missing"] = config.stash[MISSING]
    roofs = measure_roofs(config.getoption("--threads"))
    output_json["roofs"] = None if roofs is None else asdict(roofs)
