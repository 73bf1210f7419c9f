"""Time of calls by device events (or a host clock, where there is no GPU), the sides in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.statistic import statistic

GROUP_SECONDS = 0.02  # calls are timed in groups of about this long: a clock's resolution and first gaps vanish in it
MOST_CALLS = 50  # in a group
ROUNDS = 7
LONG_ROUNDS = 5  # of calls longer than
LONG_SECONDS = 0.5

Call = Callable[[int], object]  # called with a running number, for inputs to rotate by


def _group(call: Call, first: int, count: int, device: torch.device) -> tuple[float, float]:
    """Seconds a call of ``count`` calls in a row: until done, and until all were handed to the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(first, first + count):
            call(i)
        seconds = (time.perf_counter() - start) / count
        return seconds, seconds
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    before.record()
    for i in range(first, first + count):
        call(i)
    after.record()
    enqueued = time.perf_counter() - start
    after.synchronize()
    return before.elapsed_time(after) * 1e-3 / count, enqueued / count


def probe(call: Call, device: torch.device) -> dict:
    """Rough seconds of a warm call, and the rise of device memory at its peak (None without a GPU)."""
    if device.type != "cuda":
        return {"seconds": _group(call, 0, 1, device)[0], "peak_memory_bytes": None}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    seconds = _group(call, 0, 1, device)[0]
    return {"seconds": seconds, "peak_memory_bytes": torch.cuda.max_memory_allocated(device) - held}


def interleave(
    calls: dict[str, Call], rough: dict[str, float], device: torch.device, failed: Callable[[str, Exception], None]
) -> dict[str, dict]:
    """Time all ``calls`` in turns, so that a drifting clock rate or temperature falls on all alike.

    Args:
        rough: seconds of a call of each, from :func:`probe`.
        failed: told of a call that raises, which is then left out.

    Returns:
        For every name its median, quartiles, every round, and whether launching, not computing, took the time.
    """
    calls, rounds = dict(calls), {name: [] for name in calls}
    group = GROUP_SECONDS if device.type == "cuda" else 0.0  # a dry run's times are nobody's
    counts = {name: max(1, min(MOST_CALLS, int(group / max(rough[name], 1e-9)))) for name in calls}
    wanted = {name: LONG_ROUNDS if rough[name] > LONG_SECONDS else ROUNDS for name in calls}
    for turn in range(ROUNDS):
        for name, call in list(calls.items()):
            if turn >= wanted[name]:
                continue
            try:
                rounds[name].append(_group(call, turn * counts[name], counts[name], device))
            except Exception as error:
                failed(name, error)
                del calls[name]
    found = {}
    for name in calls:
        seconds, enqueued = map(list, zip(*rounds[name]))
        done = statistic(seconds)
        found[name] = {
            "median": done["median"],
            "quartiles": [done["q1"], done["q3"]],
            "rounds": seconds,
            "calls_per_round": counts[name],
            "launch_bound": statistics.median(enqueued) > 0.9 * done["median"] if device.type == "cuda" else None,
        }
    return found
