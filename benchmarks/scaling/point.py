"""One point of a scaling curve: the time and the peak memory of one model, in processes of their own, within limits."""

from __future__ import annotations

import resource
import signal
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from benchmarks.process import Ended, Process
from benchmarks.sides import Call, Case, Results, relative_error
from benchmarks.statistic import seconds_of, statistic
from benchmarks.suite.measure import AVAILABLE_SHARE, MOST_ROUNDS, build_call
from benchmarks.suite.memory import WARM_CALLS, peak_memory
from perceiver_fast.insight.geometries import GEOMETRIES

PEERS = ("eager", "sdpa", "compile", "fast")
SECONDS, LEAST_ROUNDS = 2.0, 3  # of timed calls
START_SECONDS, COMPILE_SECONDS = 120.0, 900.0  # to start a process and build a model, and to compile it

Fingerprint = list[list[float]]
"""What is compared between peers: the output, and the norms of the gradients."""


class Stopped(Exception):
    """A peer goes no further; ``status`` is a word or three, the message says how and where."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a peer may take."""

    threads: int  # that compute
    bytes: int  # that a process may add to what it starts with
    seconds: float  # that a call may take


def case_of(peer: str, side: int, latents: int, pass_name: str, dtype: str) -> Case:
    """One cross-attention of so many latents to a square grid, and no other layer but its feed-forward."""
    shape = GEOMETRIES["cross-only"]
    shape = replace(shape, sizes=(side, side), model={**shape.model, "num_latents": latents})
    return Case("model", shape, pass_name, peer, dtype=dtype)


def available_bytes() -> int:
    """What one more process may take: most of what is free, also within a container's limit."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no such container, or its limit is "max"
        pass
    return int(AVAILABLE_SHARE * free)


def limited_call(case: Case, limit_bytes: int) -> Call:
    """What is measured, in a process that gets no more memory than this; an allocation beyond it raises."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return build_call(case)


def fingerprint(results: Results) -> Fingerprint:
    """Of the results of a call."""
    output, *gradients = (result.detach().double() for result in results)
    return [output.flatten().tolist(), [float(gradient.norm()) for gradient in gradients]]


def difference(values: Fingerprint, truths: Fingerprint) -> float:
    """The largest relative difference, in the 2-norm of either part."""
    pairs = [(torch.tensor(value), torch.tensor(truth)) for value, truth in zip(values, truths, strict=True) if truth]
    return relative_error(*zip(*pairs, strict=True))


def measure(case: Case, limits: Limits) -> dict:
    """Measure one point.

    Returns:
        median, q1, q3, min (seconds), rounds, peak_memory_bytes (None where that cannot be measured) and fingerprint.

    Raises:
        Stopped: it takes more memory or time than the limits allow, or failed.
    """
    patience = START_SECONDS + (COMPILE_SECONDS if case.peer == "compile" else 0.0)
    seconds: list[float] = []
    with Process(_send_times, case, limits) as process:
        found = _answer(process, patience + 2 * limits.seconds, limits)
        while (value := _answer(process, 2 * limits.seconds, limits)) is not None:
            seconds.append(value)
        process.stop(patience=START_SECONDS)  # by itself: torch.compile tidies up
    torch.set_num_threads(limits.threads)  # which peak_memory passes on
    try:
        memory = peak_memory(limited_call, case, limits.bytes)
    except Ended as error:
        raise Stopped("out of memory" if error.killed else "failed", f"measuring memory: {error}") from None
    spread = {key: value for key, value in statistic(seconds).items() if key != "iqr"}
    return {**spread, "rounds": len(seconds), "peak_memory_bytes": memory and memory.peak, "fingerprint": found}


def _answer(process: Process, patience: float, limits: Limits) -> object:
    try:
        kind, value = process.receive(patience)
    except TimeoutError:
        text = f"a call had not ended after {patience:g} s, {limits.seconds:g} s are allowed"
        raise Stopped("too slow", text) from None
    except Ended as error:
        if error.killed:
            raise Stopped("out of memory", "the system killed the process") from None
        raise Stopped("failed", str(error)) from None
    if kind != "value":
        raise Stopped(kind, value)
    return value


def _send_times(sender: Connection, case: Case, limits: Limits) -> None:
    """The fingerprint of a first call, then the seconds of those after it, then None; or how it failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who waits for the numbers
    torch.set_num_threads(limits.threads)
    try:
        call = limited_call(case, limits.bytes)
        sender.send(("value", fingerprint(call())))  # which compiles, fills caches, starts threads
        for _ in range(WARM_CALLS - 1):
            call()
        first = seconds_of(call)
        sender.send(("value", first))
        for _ in range(max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / first))) - 1):
            sender.send(("value", seconds_of(call)))
        sender.send(("value", None))
    except Exception as error:  # noqa: BLE001
        # Whatever a peer raises is where it stops.
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        memory = isinstance(error, MemoryError) or "can't allocate memory" in text or "bad_alloc" in text
        sender.send(("out of memory" if memory else "failed", text))
