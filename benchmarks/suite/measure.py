"""One measurement: checked against float64, then its memory, its time, and what the two come to."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import psutil
import pytest
import torch

from benchmarks.sides import OURS, Call, Case, Results, errors, excess
from benchmarks.statistic import seconds_of
from benchmarks.suite.levels import LEVELS
from benchmarks.suite.memory import memory_method, peak_memory
from benchmarks.suite.plans import PLANS
from benchmarks.suite.throughput import throughput, work_of

# Of outputs and of gradients, relative to float64; in float32 positions alone cost perceiver-pytorch 1e-4 at high frequencies.
TOLERANCES = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 2e-1)}
SECONDS_PER_SIDE = 2.0  # short calls get more rounds, until this is spent
MOST_ROUNDS = 30
AVAILABLE_SHARE = 0.9  # of the available memory that a call may take


def build_call(case: Case) -> Call:
    """What is measured."""
    return case.call(LEVELS[case.level].peers[case.peer].build(case))


@lru_cache(maxsize=1)
def truths(case: Case) -> Results:
    """What every peer should return, in float64; of the ``case`` of any peer in float32, they are the same."""
    side = LEVELS[case.level].truth(case)
    return side.common(case.call(side)())


def checked(results: Results, case: Case) -> dict[str, float | None]:
    """The relative errors of comparable results.

    Raises:
        AssertionError: one is too large or not a number; no wrong result is timed.
    """
    found = errors(results, truths(replace(case, peer=OURS, dtype="float32")), case.dtype)
    wrong = excess(found, TOLERANCES[case.dtype])
    assert not wrong, "; ".join(wrong)
    return found


def measure(benchmark, case: Case) -> None:
    """Check, then measure memory and time of one call, and keep it all in ``benchmark.extra_info``, pytest-benchmark's."""
    level = LEVELS[case.level]
    peer = level.peers[case.peer]
    if reasons := peer.absent() + peer.reasons(case):
        pytest.skip("; ".join(reasons))
    available = psutil.virtual_memory().available
    for what, needed in level.needs(case).items():
        if needed > AVAILABLE_SHARE * available:
            pytest.skip(f"{what} needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are available")
    work = work_of(case)
    side = peer.build(case)
    call, threads = case.call(side), torch.get_num_threads()
    info = case.record() | {"threads": threads} | checked(side.common(call()), case)
    memory = peak_memory(build_call, case)
    info |= {"peak_memory_bytes": memory and memory.peak, "kept_memory_bytes": memory and memory.kept}
    benchmark.extra_info.update(info | {"peak_memory_method": memory_method()})
    rounds = min(MOST_ROUNDS, int(SECONDS_PER_SIDE / seconds_of(call)))
    # The calls before were the warm-up.
    benchmark.pedantic(call, rounds=max(rounds, PLANS[case.geometry.name].rounds), warmup_rounds=0, iterations=1)
    if benchmark.stats is not None:  # none under --benchmark-disable
        benchmark.extra_info.update(throughput(work, benchmark.stats.stats.median, threads))
