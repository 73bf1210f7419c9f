"""One measurement: checked against float64, then its memory, its time, and what the two come to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import pytest
import torch
from torch import Tensor

from benchmarks.memory import memory_method, peak_memory
from benchmarks.throughput import Work, throughput

# Of outputs and of gradients, relative to float64; in float32 positions alone cost perceiver-pytorch 1e-4 at high frequencies.
TOLERANCES = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 2e-1)}
ROUNDINGS = 16  # of the largest tensor: what is smaller than these is not compared with itself
DEFAULT_THREADS = min(2, os.cpu_count() or 1)
SECONDS_PER_SIDE = 2.0  # short calls get more rounds, until this is spent
MOST_ROUNDS = 30
AVAILABLE_SHARE = 0.9  # of the available memory that a call may take

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """What is measured, by the names that results have: one line of a table, and the peer on it."""

    level: str
    geometry: str
    pass_name: str
    peer: str
    batch: int = 1
    dtype: str = "float32"

    def record(self) -> dict:
        """As extra_info holds it."""
        return {
            "level": self.level, "geometry": self.geometry, "pass": self.pass_name, "peer": self.peer,
            "batch": self.batch, "dtype": self.dtype,
        }  # fmt: skip


def relative_error(values: Sequence[Tensor], truths: Sequence[Tensor], dtype: str = "float32") -> float:
    """The largest ``|value - truth| / |truth|`` in the 2-norm over pairs of tensors.

    A truth below some roundings of the largest is the rounding of what it was computed from (inverted attention's gradient
    of the queries' bias is zero in exact arithmetic); it counts as these.
    """
    pairs = [(value.detach().double(), truth.detach().double()) for value, truth in zip(values, truths, strict=True)]
    least = ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps * max(truth.norm() for _, truth in pairs)
    return float(torch.stack([(value - truth).norm() / truth.norm().clamp_min(least) for value, truth in pairs]).max())


def errors(results: Sequence[Tensor], truths: Sequence[Tensor], dtype: str = "float32") -> dict[str, float | None]:
    """Relative errors of the output and of the gradients, which follow it after a step, for what ``dtype`` allows.

    Raises:
        AssertionError: one is too large or not a number; no wrong result is timed.
    """
    most, most_gradient = TOLERANCES[dtype]
    output = relative_error(results[:1], truths[:1], dtype)
    assert output <= most, f"the output is off by {output:.2e}, more than {most:.0e}"
    if len(truths) == 1:
        return {"relative_error": output, "gradient_error": None}
    gradient = relative_error(results[1:], truths[1:], dtype)
    assert gradient <= most_gradient, f"the gradients are off by {gradient:.2e}, more than {most_gradient:.0e}"
    return {"relative_error": output, "gradient_error": gradient}


def cotangent(out: Tensor) -> Tensor:
    """What a step differentiates ``out`` with: numbers that every dtype holds exactly, so that no side has other ones."""
    return ((torch.arange(out.numel()) % 17 - 6).to(out.dtype) / 8).view(out.shape)


def need_memory(what: str, needed: int) -> None:
    """Skip the running benchmark, with the reason, when ``what`` needs more memory than there is."""
    available = psutil.virtual_memory().available
    if needed > AVAILABLE_SHARE * available:
        pytest.skip(f"{what} needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are available")


def measure(
    benchmark,
    case: Case,
    build: Callable[..., Call],
    args: tuple,
    truths: Sequence[Tensor],
    work: Work,
    rounds: int,
    common: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple,
) -> None:
    """Check, then measure memory and time of one call, and keep it all in ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what it is.
        build: ``build(*args)`` makes the call; both can be pickled, for the process that measures memory.
        truths: what the call should return, in float64.
        work: of one call, for throughput and shares of the roofs.
        rounds: timed calls at least.
        common: makes of the call's results what ``truths`` are. Default: they are that.
    """
    call = build(*args)
    info = case.record() | {"threads": torch.get_num_threads()} | errors(common(call()), truths, case.dtype)
    memory = peak_memory(build, *args)
    info |= {"peak_memory_bytes": memory and memory.peak, "kept_memory_bytes": memory and memory.kept}
    info |= {"peak_memory_method": memory_method()}
    benchmark.extra_info.update(info)
    start = time.perf_counter()
    call()
    rounds = max(rounds, min(MOST_ROUNDS, int(SECONDS_PER_SIDE / (time.perf_counter() - start))))
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=0, iterations=1)  # WARM_CALLS came before
    if benchmark.stats is not None:  # none under --benchmark-disable
        benchmark.extra_info.update(throughput(work, benchmark.stats.stats.median, torch.get_num_threads()))
