"""One point of a scaling curve: the time and the peak memory of one model, in processes of their own, within limits."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import quantiles

import psutil
import torch
from torch import Tensor

from benchmarks.measure import cotangent
from benchmarks.memory import WARM_CALLS, peak_memory
from benchmarks.peers import PEERS as BUILDERS
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry

PEERS = ("eager", "sdpa", "compile", "fast")
PASSES, DTYPES = ("forward", "step"), ("float32", "bfloat16")
AVAILABLE_SHARE = 0.9  # of the available memory that a model may take
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 2.0, 3, 30  # of timed calls
START_SECONDS, COMPILE_SECONDS = 120.0, 900.0  # to start a process and build a model, and to compile it

_processes = multiprocessing.get_context("forkserver")  # which benchmarks.memory has import torch


class Stopped(Exception):
    """A peer goes no further; ``status`` is a word or three, the message says how and where."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Task:
    """What is measured.

    Args:
        peer: of PEERS.
        side: tokens along either axis of the grid: M is its square.
        latents: N.
        pass_name: of PASSES.
        dtype: of DTYPES; bfloat16 is autocast.
        threads: that compute.
        limit_bytes: that a process may add to what it starts with.
        limit_seconds: that a call may take.
    """

    peer: str
    side: int
    latents: int
    pass_name: str
    dtype: str
    threads: int
    limit_bytes: int
    limit_seconds: float

    @property
    def geometry(self) -> Geometry:
        """One cross-attention of ``latents`` to a square grid, and no other layer but its feed-forward."""
        shape = GEOMETRIES["cross-only"]
        return replace(shape, sizes=(self.side, self.side), model={**shape.model, "num_latents": self.latents})


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


def call_of(task: Task) -> Callable[[], list[Tensor]]:
    """What is measured: a call that returns the output, and after a step every gradient, in the order of their names."""
    model, data = BUILDERS[task.peer].build(task.geometry).train(task.pass_name == "step"), task.geometry.input()
    names = {name.removeprefix("_orig_mod."): parameter for name, parameter in model.named_parameters()}
    wanted = [names[name] for name in sorted(names)]

    def call() -> list[Tensor]:
        with (
            torch.set_grad_enabled(task.pass_name == "step"),
            torch.autocast("cpu", torch.bfloat16, enabled=task.dtype == "bfloat16"),
        ):
            output = model(data)
        if task.pass_name == "forward":
            return [output]
        return [output, *torch.autograd.grad(output, wanted, cotangent(output))]

    return call


def limited_call_of(task: Task) -> Callable[[], list[Tensor]]:
    """The same, in a process that gets no more memory than the task allows; an allocation beyond it raises."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + task.limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return call_of(task)


def fingerprint(results: list[Tensor]) -> list[list[float]]:
    """What is compared between peers: the output, and the norms of the gradients."""
    output, *gradients = (result.detach().double() for result in results)
    return [output.flatten().tolist(), [float(gradient.norm()) for gradient in gradients]]


def difference(values: list[list[float]], truths: list[list[float]]) -> float:
    """The largest relative difference of two fingerprints, in the 2-norm of either part."""
    pairs = [(torch.tensor(value), torch.tensor(truth)) for value, truth in zip(values, truths, strict=True) if truth]
    return float(torch.stack([(value - truth).norm() / truth.norm() for value, truth in pairs]).max())


def measure(task: Task) -> dict:
    """Measure one point.

    Returns:
        median, q1, q3, min (seconds), rounds, peak_memory_bytes (None where that cannot be measured) and fingerprint.

    Raises:
        Stopped: it takes more memory or time than the task allows, or failed.
    """
    found, seconds = _times(task)
    q1, median, q3 = quantiles(seconds, n=4, method="inclusive")
    torch.set_num_threads(task.threads)  # which peak_memory passes on
    try:
        memory = peak_memory(limited_call_of, task)
    except RuntimeError as error:
        status = "out of memory" if f"exit code {-signal.SIGKILL}" in str(error) else "failed"
        raise Stopped(status, f"measuring memory: {error}") from None
    return {
        "median": median,
        "q1": q1,
        "q3": q3,
        "min": min(seconds),
        "rounds": len(seconds),
        "peak_memory_bytes": memory and memory.peak,
        "fingerprint": found,
    }


def _times(task: Task) -> tuple[list[list[float]], list[float]]:
    """The fingerprint of a first call, and the seconds of those after it."""
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_send_times, args=(sender, task))
    process.start()
    sender.close()
    try:
        start = START_SECONDS + (COMPILE_SECONDS if task.peer == "compile" else 0.0)
        found = _receive(receiver, process, start + 2 * task.limit_seconds, task)
        seconds: list[float] = []
        while (value := _receive(receiver, process, 2 * task.limit_seconds, task)) is not None:
            seconds.append(value)
        process.join(START_SECONDS)  # by itself: torch.compile tidies up
        return found, seconds
    finally:
        process.kill()
        process.join()
        receiver.close()


def _receive(receiver: Connection, process: BaseProcess, patience: float, task: Task) -> object:
    if not receiver.poll(patience):
        raise Stopped("too slow", f"a call had not ended after {patience:g} s, {task.limit_seconds:g} s are allowed")
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise Stopped("out of memory", "the system killed the process") from None
        raise Stopped("failed", f"the process ended with exit code {process.exitcode}") from None
    if kind != "value":
        raise Stopped(kind, value)
    return value


def _send_times(sender: Connection, task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who waits for the numbers
    torch.set_num_threads(task.threads)
    try:
        call = limited_call_of(task)
        sender.send(("value", fingerprint(call())))  # which compiles, fills caches, starts threads
        for _ in range(WARM_CALLS - 1):
            call()
        first = _timed(call)
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / first)))
        sender.send(("value", first))
        for _ in range(rounds - 1):
            sender.send(("value", _timed(call)))
        sender.send(("value", None))
    except Exception as error:  # noqa: BLE001
        # Whatever a peer raises is where it stops.
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        memory = isinstance(error, MemoryError) or "can't allocate memory" in text or "bad_alloc" in text
        sender.send(("out of memory" if memory else "failed", text))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
