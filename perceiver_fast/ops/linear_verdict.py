"""Which library a kind of large product runs on, decided from timings that other processes may have disturbed.

Pure functions of recorded runs. What is compared are the least times, since other work can only slow a run down; runs
in which the system took a processor away from this process do not count. How far the two least times lie apart is the
spread, what the comparison may be wrong by. Within it the favourite is taken: what is known of the processor's vendor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SETTLED = 0.05  # of a smaller spread more runs would not change what matters
LEAST = 3  # runs of each that a comparison needs
# How much faster than the favourite another has to be where not all problems ran undisturbed, the spread on top. Where
# none did, nothing is compared: waiting for a processor that is shared made either library look up to seven times slower.
SOME_UNDISTURBED = 1.5
DECISIVE = 4.0  # as many times faster on the small product, the favourite need not prove itself on the others


class Problem(NamedTuple):
    """``[rows, inner]`` times ``[outer, inner]^T`` is the forward product of a problem that is timed."""

    rows: int
    inner: int
    outer: int

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.outer


class Run(NamedTuple):
    """How long a product took, and whether this process kept its processors meanwhile."""

    seconds: float
    clean: bool = True


Runs = dict[str, dict[Problem, list[Run]]]  # by what is compared and by problem, in turns


@dataclass(frozen=True)
class Prior:
    """What is known before anything is measured.

    Args:
        favourite: what is taken in case of doubt.
        margin: by which share another has to be faster, at least.
        why: what is known, in words: it "decided".
    """

    favourite: str
    margin: float
    why: str


@dataclass(frozen=True)
class Verdict:
    """What was chosen, and how sure that is.

    Args:
        chosen: what is taken.
        how: "sure", or what decided instead, in words.
        sure: whether the difference is beyond the spread.
        settled: whether more runs would change nothing that matters.
        gflops: the speed that each reached; empty where nothing was measured.
        spread: by which share the least and second least times differ; None where nothing was measured.
    """

    chosen: str
    how: str
    sure: bool
    settled: bool
    gflops: dict[str, float]
    spread: float | None = None

    def __str__(self) -> str:
        if not self.gflops:
            return f"{self.chosen}: {self.how}"
        speeds = " and ".join(f"{name} {speed:.0f}" for name, speed in self.gflops.items())
        return f"{self.chosen}, {self.how}: {speeds} GFLOP/s, spread {self.spread:.0%}"


def decide(runs: Runs, prior: Prior) -> Verdict:
    """The fastest, or within the spread the favourite.

    Args:
        runs: timings of the favourite and of others; the problems of all are the same.
        prior: the favourite, and by how much another has to be faster.

    Example:
        >>> from perceiver_fast.ops.linear_verdict import Prior, Problem, Run, decide
        >>> problem, prior = Problem(256, 512, 512), Prior("torch", 0.05, "what is known of Intel")
        >>> slow, fast = [Run(1e-3 * ms) for ms in (1.31, 1.30, 1.34)], [Run(1e-3 * ms) for ms in (1.02, 1.00, 1.05)]
        >>> str(decide({"torch": {problem: slow}, "onednn": {problem: fast}}, prior))
        'onednn, sure: torch 103 and onednn 134 GFLOP/s, spread 2%'
        >>> str(decide({"torch": {problem: slow}, "onednn": {problem: [Run(1.28e-3), Run(1.4e-3), Run(1.4e-3)]}}, prior))
        'torch, close, what is known of Intel decided: torch 103 and onednn 105 GFLOP/s, spread 9%'
    """
    problems = runs[prior.favourite]
    undisturbed = _comparable(runs, clean=True)
    times = undisturbed or _comparable(runs, clean=False)
    if not times:
        return Verdict(prior.favourite, f"not measured, {prior.why} decided", False, False, {})
    least = {name: sum(seconds[0] for seconds in by_problem.values()) for name, by_problem in times.items()}
    second = {name: sum(seconds[1] for seconds in by_problem.values()) for name, by_problem in times.items()}
    spread = max(second[name] / least[name] for name in least) - 1
    whole = len(undisturbed.get(prior.favourite, ())) == len(problems)
    needed = 1 + max(prior.margin, spread) if whole else SOME_UNDISTURBED * (1 + spread)
    best = min((name for name in least if name != prior.favourite), key=least.__getitem__)
    gain = least[prior.favourite] / least[best]
    sure = bool(undisturbed) and max(gain, 1 / gain) > needed
    if sure:
        how = "sure" if whole else "sure, though disturbed by other work"
    else:
        how = f"{'close' if whole else 'disturbed by other work'}, {prior.why} decided"
    operations = sum(problem.operations for problem in times[best])
    return Verdict(
        chosen=best if sure and gain > 1 else prior.favourite,
        how=how,
        sure=sure,
        settled=(whole and (sure or spread <= SETTLED)) or (sure and gain * DECISIVE * (1 + spread) < 1),
        gflops={name: 1e-9 * operations / seconds for name, seconds in least.items()},
        spread=spread,
    )


def _comparable(runs: Runs, clean: bool) -> dict[str, dict[Problem, list[float]]]:
    """Sorted times of the problems of which everyone has enough runs; empty without any such problem."""
    times = {
        name: {
            problem: sorted(run.seconds for run in found if run.clean or not clean)
            for problem, found in by_problem.items()
        }
        for name, by_problem in runs.items()
    }
    problems = [p for p in runs[next(iter(runs))] if all(len(found.get(p, ())) >= LEAST for found in times.values())]
    return (
        {name: {problem: found[problem] for problem in problems} for name, found in times.items()} if problems else {}
    )
