"""Options of the benchmarks, and a record of what could not be measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `from benchmarks...`, also under a bare `pytest`

from benchmarks.environment import DEFAULT_THREADS  # noqa: E402
from benchmarks.sides import DTYPES, Case  # noqa: E402
from benchmarks.suite import measure  # noqa: E402
from benchmarks.suite.levels import LEVELS  # noqa: E402
from benchmarks.suite.plans import LEVEL_NAMES, PLANS, QUICK, select  # noqa: E402
from perceiver_fast.insight.console import positive  # noqa: E402
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
NOT_DEFAULT = ", ".join(name for name, plan in PLANS.items() if not plan.default)


def _repeated(help: str, **more: object) -> dict:
    return {"action": "append", "default": [], "help": f"{help}; repeat for several", **more}


OPTIONS = {  # of ``python -m benchmarks`` too
    "--quick": {"action": "store_true", "help": f"only {QUICK}, in float32: done in three minutes"},
    "--geometry": _repeated(
        f"one to measure, also by {SLOW_PEER} (default: all but {NOT_DEFAULT})", choices=list(PLANS)
    ),
    "--all": {"action": "store_true", "help": f"every geometry and dtype, also {NOT_DEFAULT}, and {SLOW_PEER}"},
    "--level": _repeated("(default: all)", choices=LEVEL_NAMES),
    "--batch": _repeated("inputs at once (default: 1)", type=positive),
    "--dtype": _repeated(f"(default: {DTYPES[0]})", choices=DTYPES),
    "--pass": _repeated("(default: all)", choices=PASSES),
    "--threads": {"type": positive, "default": DEFAULT_THREADS, "help": "torch's threads (default: %(default)s)"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perceiver-fast benchmarks")
    for name, settings in OPTIONS.items():
        group.addoption(name, **settings)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--quick"):
        measure.SECONDS_PER_SIDE = QUICK_SECONDS
    config.stash[MISSING] = []


def level_of(function: Callable) -> str:
    """What a benchmark measures: its name says it."""
    return function.__name__.removeprefix("test_")


def case_of(item: pytest.Item) -> Case:
    """What a benchmark measures."""
    params = dict(item.callspec.params)
    return Case(level_of(item.function), GEOMETRIES[params.pop("geometry")], **params)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases that were asked for; the peers of one geometry, pass and dtype run one after the other."""
    if "geometry" not in metafunc.fixturenames:
        return
    option, level = metafunc.config.getoption, level_of(metafunc.function)
    names = [QUICK] if option("--quick") else option("--geometry")
    dtypes, passes = option("--dtype") or (DTYPES if option("--all") else DTYPES[:1]), option("--pass") or PASSES
    if option("--level") and level not in option("--level"):
        passes = ()
    cases = [
        Case(level, GEOMETRIES[name], pass_name, peer, batch, dtype)
        for name in select(names, option("--all"), [level])
        for batch in option("--batch") or [1]
        for pass_name in LEVELS[level].passes if pass_name in passes
        for dtype in LEVELS[level].dtypes if dtype in dtypes
        for peer in LEVELS[level].peers
    ]  # fmt: skip
    values = [(c.geometry.name, c.batch, c.pass_name, c.dtype, c.peer) for c in cases if _wanted(c, option)]
    parts = ("geometry", "batch", "pass_name", "dtype", "peer")
    metafunc.parametrize(parts, values, ids=lambda value: f"batch{value}" if isinstance(value, int) else value)


def _wanted(case: Case, option: Callable) -> bool:
    """Whether a case is to be measured when its geometry, pass and dtype are; compiling takes half a minute."""
    if not LEVELS[case.level].peers[case.peer].fits(case):
        return False  # it would be another peer under another name
    if option("--quick"):
        once = case.peer != "compile" or (case.level, case.pass_name) == ("model", "forward")
        return once and case.peer != SLOW_PEER and case.pass_name in QUICK_PASSES.get(case.level, ())
    return case.peer != SLOW_PEER or option("--all") or bool(option("--geometry"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out examples in docstrings, and what pytest puts in the place of a level without cases."""

    def is_kept(item: pytest.Item) -> bool:
        case = hasattr(item, "callspec") and item.callspec.params["geometry"] in PLANS
        return case or HERE not in item.path.parents

    config.hook.pytest_deselected(items=[item for item in items if not is_kept(item)])
    items[:] = filter(is_kept, items)


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
        reason = call.excinfo.exconly().splitlines()[0].removeprefix("Skipped: ")
        item.config.stash[MISSING].append(case_of(item).record() | {"outcome": report.outcome, "reason": reason})


def pytest_benchmark_update_json(config: pytest.Config, benchmarks, output_json: dict) -> None:
    output_json["missing"] = config.stash[MISSING]
    roofs = measure_roofs(config.getoption("--threads"))
    output_json["roofs"] = None if roofs is None else asdict(roofs)
