"""What the campaign runs, and for how long each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from perceiver_fast import extension

from .sanitizers import CAMPAIGN, CannotBuild, CoreSweep, build, extension_runs
from .sweep import Run, Sweep

PARTS = {
    "sanitizers": "csrc/core under TSan, ASan and UBSan; ops and raw on an extension built with ASan and UBSan",
    "numeric": "random models against perceiver-pytorch in float64, on every instruction set",
    "described": "random PerceiverIOs of described data and queries against perceiver-pytorch's on built tensors",
    "ops": "random calls of every public op against the reference in float64, on every instruction set",
    "raw": "registered operators called with changed arguments",
    "staleness": "writes to parameters by every route between inference calls",
    "threads": "one model from four threads, two models trained at once",
}
WEIGHTS = {
    "sanitizers": 3.0,
    "numeric": 5.0,
    "described": 1.0,
    "ops": 1.5,
    "raw": 1.0,
    "staleness": 1.5,
    "threads": 0.8,
}
BUILDING = 0.5  # of the time, at most, for what is built with sanitizers


def on_isas(part: str) -> list[Run]:
    """A part on every instruction set of this machine."""
    if extension.error is not None:
        raise RuntimeError(f"the campaign is about the CPU kernels, and they are not there: {extension.error}")
    return [Run(part, isa, {"PERCEIVER_FAST_CPU_ISA": isa}) for isa in extension.module.available_isas()]


def runs(part: str) -> list[Run]:
    """The runs of a part on the ordinary build."""
    return on_isas(part) if part in ("numeric", "described", "ops") else [Run(part)]


@dataclass(frozen=True)
class Share:
    """Something to run, and its share of the time beside the others'.

    Args:
        start: runs it for some seconds, and returns what has the attributes of a sweep.
        weight: of its share.
    """

    start: Callable[[float], Sweep | CoreSweep]
    weight: float


def ordinary(part: str, seed: int, jobs: int, cases: int | None, isa: str | None, report: Callable) -> list[Share]:
    """A part on the ordinary build."""
    chosen = [run for run in runs(part) if isa is None or run.variant in ("", isa)]
    return [
        Share(
            lambda seconds, run=run: Sweep(run, seed, report).for_seconds(seconds, jobs, cases),
            WEIGHTS[part] / len(chosen),
        )
        for run in chosen
    ]


def sanitized(
    seconds: float, seed: int, jobs: int, cases: int | None, report: Callable
) -> tuple[list[Share], dict[str, str]]:
    """What runs under sanitizers, built in at most so many seconds; and what could not be built, with the reason."""
    end, planned, left_out = time.monotonic() + seconds, [], {}
    for target in CAMPAIGN:
        try:
            build(target, end - time.monotonic())
        except CannotBuild as reason:
            left_out[f"sanitizers, {target}"] = str(reason)
            continue
        if target == "extension":
            swept = [Sweep(run, seed, report) for run in extension_runs()]
            planned += [Share(lambda s, sweep=sweep: sweep.for_seconds(s, jobs, cases), 1.0) for sweep in swept]
        else:
            core = CoreSweep(target, seed, report)
            planned.append(Share(lambda s, core=core: core.for_seconds(s, cases), 0.5))
    return planned, left_out
