"""Times of the tuner's candidates on a GPU, each checked first, and which configuration they speak for."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
import triton
from torch import Tensor

from perceiver_fast.kernels.configs import Config, overridden
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.kernels.tune_candidates import Call, OutOfTime, own, prepare

FINALISTS, ROUNDS = 3, 5  # the fastest are timed again, in turns with the shipped one, since clock rates drift
LEAST_GAIN = 0.02  # below it the shipped configuration stays
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of a result's norm: sums change order


def clock(launches: Sequence[Launch]) -> float:
    """Microseconds of launches by device events: the median of many runs, the level-2 cache emptied before each."""
    flags = next((f for x in launches if (f := x.arguments.get("flags")) is not None), None)

    def run() -> None:
        if flags is not None:
            flags.fill_(1)  # all that launches both read and write: without it every run but the first has less to do
        for launch in launches:
            launch.run()

    return 1e3 * triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")


def wrong(results: Sequence[Tensor], right: Sequence[Tensor], tolerance: float) -> str | None:
    """By how much results differ, if by more than they may."""
    for mine, theirs in zip(results, right):
        error = float((mine - theirs).norm(dtype=torch.float64) / theirs.norm(dtype=torch.float64))
        if not error <= tolerance:  # not a number included
            return f"wrong: {error:.1e} of the norm, not at most {tolerance:.0e}"
    return None


def measure(
    name: str, call: Call, configs: Sequence[Config], arch: int, device: torch.device, deadline: float, rounds: int = 1
) -> list[float | str]:
    """Microseconds of every configuration, the median of the rounds, or why there are none; the first is the truth.

    Raises:
        OutOfTime: before it was done.
        Exception: of the first configuration, which has to be right.
    """
    make, right = prepare(call, name.partition("[")[0], arch, device), None
    found: list[list[float] | str] = [[] for _ in configs]
    for index in [*range(len(configs))] * rounds:
        if time.time() > deadline:
            raise OutOfTime
        if isinstance(found[index], str):
            continue
        try:
            with overridden({name: configs[index]}):
                *results, launches = make()
            results = [result.fill_(math.nan) for result in results if result.numel()]  # no leftovers of the one before
            for launch in launches:
                launch.run()
            right = right or [result.clone() for result in results]
            found[index] = wrong(results, right, TOLERANCE[call.dtype]) or found[index]
            if not isinstance(found[index], str):
                found[index].append(clock(own(launches, configs[index])))
        except Exception as error:
            if right is None:
                raise
            found[index] = f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(found[0], str):
        raise RuntimeError(f"the shipped configuration: {found[0]}")
    return [times if isinstance(times, str) else statistics.median(times) for times in found]


def gains(times: Sequence[Sequence[float | str]]) -> dict[int, float]:
    """How much faster every configuration is than the first, over all calls (the rows): 0.1 is 10 %."""
    whole = {i: column for i, column in enumerate(zip(*times)) if not any(isinstance(t, str) for t in column)}
    return {i: statistics.geometric_mean(a / b for a, b in zip(whole[0], column)) - 1 for i, column in whole.items()}


def choose(
    name: str, calls: Sequence[Call], configs: Sequence[Config], arch: int, device: torch.device, deadline: float
) -> tuple[Config, float, dict]:
    """The fastest configuration, or the first if none gains enough; the best gain; and all times for the log."""
    first = [measure(name, call, configs, arch, device, deadline) for call in calls]
    order = sorted((found := gains(first)), key=found.get, reverse=True)
    finalists = [configs[0], *(configs[i] for i in order if i)][: 1 + FINALISTS]
    final = [measure(name, call, finalists, arch, device, deadline, ROUNDS) for call in calls]
    best, gain = max(gains(final).items(), key=lambda item: item[1])
    log = {
        title: [
            {"config": asdict(c), "microseconds": dict(zip(map(str, calls), column))}
            for c, column in zip(those, zip(*times))
        ]
        for title, those, times in (("all", configs, first), ("finalists", finalists, final))
    }
    return finalists[best if gain >= LEAST_GAIN else 0], gain, log
