"""What running one case gives: counts for the table, and findings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

BEYOND_2X, BEYOND_5X, FLOAT64, NON_FINITE = "beyond 2x", "beyond 5x", "float64", "non-finite"
STALE, DIFFERS, ERROR, CRASH, HANG = "stale", "differs", "error", "crash", "hang"
KINDS = {
    BEYOND_2X: "an error beyond twice plain PyTorch's and a floor, yet within five times; 1 in 1,000 is chance",
    BEYOND_5X: "an error beyond five times plain PyTorch's and a floor",
    FLOAT64: "a float64 result that is not the truth's to 1e-9",
    NON_FINITE: "NaN or infinity where plain PyTorch's result is finite",
    STALE: "an output that is not the one of the parameters as they are",
    DIFFERS: "bits that are not those of one thread",
    ERROR: "an exception where an answer was expected, or none where an error was",
    CRASH: "the process died",
    HANG: "no answer in time",
}
EXPECTED_SHARE = 1 / 1000  # of results beyond 2x
CASES_BEYOND_2X = "cases beyond 2x"  # that have any: results of one case round alike


@dataclass
class Outcome:
    """Of one case, or of several together.

    Args:
        counts: what was compared, what was found of each kind, and what had to be left out, by name.
        findings: for every kind of :data:`KINDS` that was found, the first of that kind, in words.
    """

    counts: Counter = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)

    def find(self, kind: str, text: str) -> None:
        """Add a finding."""
        self.counts[kind] += 1
        if kind == BEYOND_2X:
            self.counts[CASES_BEYOND_2X] = 1
        self.findings.setdefault(kind, text)

    def add(self, other: Outcome) -> None:
        """Add the counts of another one."""
        self.counts += other.counts


def is_failure(kind: str) -> bool:
    """Whether one finding of this kind is one too many; of results beyond 2x a small share is expected."""
    return kind != BEYOND_2X
