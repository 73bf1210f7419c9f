"""What is said of times that were measured several times, and when two of them differ."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

CONFIDENCE, LEAST_ROUNDS = 0.95, 6  # of fewer rounds, nothing can be said with it


def seconds_of(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def statistic(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles, their distance and the least of at least two values."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "min": min(seconds)}


def median_interval(values: list[float]) -> tuple[float, float]:
    """Between which two of the values their distribution's median is, with at least 95 % confidence, by the sign test.

    Example:
        >>> median_interval([1.0, 1.1, 1.2, 1.3, 1.4, 5.0])
        (1.0, 5.0)
    """
    values, tail, count = sorted(values), 0.0, len(values)
    for cut in range(count):
        tail += 2 * math.comb(count, cut) / 2**count
        if tail > 1 - CONFIDENCE:
            break
    if not cut:
        raise ValueError(f"expected at least {LEAST_ROUNDS} values, got {count}")
    return values[cut - 1], values[-cut]


def judge(ratio: float, low: float, high: float, threshold: float) -> str:
    """slower, faster or same.

    Args:
        ratio: new time over old.
        low, high: what it may as well be; around 1, nothing is known to have changed.
        threshold: a change below it does not matter. 0.1: slower by 10 %, or faster by as much.

    Example:
        >>> judge(1.2, 1.1, 1.3, threshold=0.1), judge(1.2, 0.9, 1.3, threshold=0.1), judge(0.5, 0.4, 0.6, threshold=0.1)
        ('slower', 'same', 'faster')
    """
    if low > 1 and ratio > 1 + threshold:
        return "slower"
    return "faster" if high < 1 and ratio < 1 / (1 + threshold) else "same"
