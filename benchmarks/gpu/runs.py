"""What the battery does, step by step: all there is, or one of the two runs for a GPU that one has for minutes only.

The most valuable comes first: the first run says whether kernels are right, and what the headline is; the second measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.cases import HEAD, Case, parse_case

EVERYTHING = 9 * 60.0  # seconds, if no run is chosen
MARGIN = 4.0  # seconds of a run in which tables are printed


@dataclass(frozen=True)
class Step:
    """A part of a run; ``seconds`` are kept for it, and what earlier steps leave over is its own too.

    Args:
        kind: the method of steps.Steps that does it.
        cases: those of a step that times some.
    """

    kind: str
    seconds: float
    cases: tuple[Case, ...] = ()


def _cases(*patterns: str) -> tuple[Case, ...]:
    """Of names in which ``*`` stands for every geometry of HEAD."""
    names = (pattern.replace("*", name) for pattern in patterns for name in (HEAD if "*" in pattern else ("",)))
    return tuple(parse_case(name) for name in names)


RUNS: dict[str, tuple[float, tuple[Step, ...]]] = {
    "first": (
        170.0,
        (
            Step("trials", 38),
            Step("timings", 44, _cases("op/imagenet-lucid/64/bf16/forward")),
            Step("tests", 60),
            Step("sanitizer", 24),
        ),
    ),
    "second": (
        480.0,
        (
            Step(
                "timings", 170, _cases("op/*/64/bf16/forward", "op/*/64/bf16/step", "op/imagenet-lucid/64/fp32/forward")
            ),
            Step("counters", 45),
            Step("tuner", 85),
            Step("timings", 110, _cases("model/*/8/bf16/forward", "model/*/8/bf16/step")),
            Step("timings", 66, _cases("op/*/1/bf16/forward", "model/*/1/bf16/forward", "model/*/1/bf16/step")),
        ),
    ),
}
"""By name, the seconds of a run and its steps."""


def everything(seconds: float, cases: Sequence[Case], build: bool, tests: bool) -> tuple[Step, ...]:
    """The steps of a battery that is none of RUNS."""
    first = [Step(kind, 0.3 * seconds) for kind, wanted in (("build", build), ("tests", tests)) if wanted]
    return (*first, Step("timings", 0.4 * seconds, tuple(cases)))
