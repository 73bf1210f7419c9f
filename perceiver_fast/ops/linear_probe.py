"""Times the libraries on a few large products, in turns, in a bounded time, beside whatever else the machine does.

The products are those of a model's latents: attention's projections, feed-forward out and in. Their weights come from
memory, as a model's do. A process that shares its processors with others cannot time a product of several
milliseconds: it loses a processor in every one. But one that has rested gets them at once and keeps them for a few
milliseconds. So the probe rests before a run when one of the last was disturbed, and where half of them were it times the small
problem alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from perceiver_fast.ops.linear_verdict import LEAST, Prior, Problem, Run, Runs, decide

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]  # mypy has no modules that may be missing

PROBLEMS = (Problem(256, 512, 512), Problem(256, 2048, 512), Problem(256, 512, 4096))  # the small one first
SECONDS = 0.35  # no run begins after this; on a quiet machine half of it is enough
RECENT = 6  # runs that tell whether the machine is busy: those of all first turns, or of one with all problems
REST = 0.02  # seconds; OpenMP's threads spin for a few milliseconds before they sleep
POOL = 32 * 2**20  # bytes that weights are cut from: more than caches near a core hold


def interruptions() -> int:
    """How often the system took a processor away from a thread of this process; always 0 where it does not tell."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Operands:
    """The two matrices of one kind of product; every weight is another part of the pool.

    Args:
        kind: of product, one of KINDS.
        dtype: of both.
    """

    def __init__(self, kind: str, dtype: torch.dtype):
        self._kind, self._dtype, self._at = kind, dtype, 0
        self._pool = self._ones(0 if kind == "grad_weight" else POOL // dtype.itemsize)
        self._kept = {p: (self._ones(p.rows, p.inner), self._ones(p.rows, p.outer)) for p in PROBLEMS}

    def _ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=self._dtype, device="cpu")  # whatever the default device

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        x, d_out = self._kept[problem]
        if self._kind == "grad_weight":
            return d_out, x
        count = problem.inner * problem.outer
        if self._at + count > len(self._pool):
            self._at = 0
        weight = self._pool[self._at : self._at + count].view(problem.outer, problem.inner)
        self._at += count
        return (x if self._kind == "forward" else d_out), weight


def timed(call: Callable[..., object], *arguments: object) -> Run:
    """One call: how long it took, and whether this process kept its processors meanwhile."""
    before, start = interruptions(), time.perf_counter()
    call(*arguments)
    seconds = time.perf_counter() - start
    return Run(seconds, interruptions() == before)


def probe(
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]], kind: str, dtype: torch.dtype, prior: Prior, runs: Runs
) -> None:
    """Time all calls in turns, until the decision is settled or :data:`SECONDS` are over.

    Args:
        calls: the products that are compared, by name.
        kind: of product, one of KINDS.
        dtype: of the matrices.
        prior: what the decision needs to know.
        runs: gets the timings, which are added to those that it has.
    """
    with torch.inference_mode(), torch.autocast("cpu", enabled=False), _disable_current_modes():
        for name in calls:
            runs.setdefault(name, {problem: [] for problem in PROBLEMS})
        end, busy = time.perf_counter() + SECONDS, False
        warm: set[tuple[Problem, str]] = set()
        clean: list[bool] = []
        operands = Operands(kind, dtype)
        for turn in itertools.count(1):
            problems = PROBLEMS[:1] if turn <= LEAST or busy else PROBLEMS
            for problem, (name, call) in itertools.product(problems, calls.items()):
                a, b = operands(problem)
                if (problem, name) not in warm:  # what a library prepares once a shape is not timed
                    call(a, b)
                    warm.add((problem, name))
                    if time.perf_counter() > end:
                        return
                if not all(clean[-RECENT:]):
                    time.sleep(REST)
                run = timed(call, a, b)
                runs[name][problem].append(run)
                clean.append(run.clean)
                if time.perf_counter() > end:
                    return
            if decide(runs, prior).settled:
                return
            busy = busy or (turn >= LEAST and 2 * sum(clean[-RECENT:]) <= RECENT)
