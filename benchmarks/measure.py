"""Errors and time of one call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import psutil
import pytest
import torch
from torch import Tensor

TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (5e-2, 2e-1)}  # of outputs and of gradients
DEFAULT_THREADS = min(2, os.cpu_count() or 1)
SECONDS_PER_SIDE = 2.0  # short calls get more rounds, until this is spent
MOST_ROUNDS = 30
AVAILABLE_SHARE = 0.9  # of the available memory that a call may take


def relative_error(values: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """The largest ``|value - truth| / |truth|`` in the 2-norm over pairs of tensors.

    A truth that is a millionth of the largest is the rounding of what it was computed from (inverted attention's gradient
    of the queries' bias is zero in exact arithmetic); it counts as that millionth.
    """
    pairs = [(value.detach().double(), truth.detach().double()) for value, truth in zip(values, truths, strict=True)]
    least = 1e-6 * max(truth.norm() for _, truth in pairs)
    return float(torch.stack([(value - truth).norm() / truth.norm().clamp_min(least) for value, truth in pairs]).max())


def errors(results: Sequence[Tensor], truths: Sequence[Tensor], dtype: str = "float32") -> dict[str, float | None]:
    """Relative errors of the output and of the gradients, which follow it after a step, for what ``dtype`` allows.

    Raises:
        AssertionError: one is too large or not a number; no wrong result is timed.
    """
    most, most_gradient = TOLERANCES[dtype]
    output = relative_error(results[:1], truths[:1])
    assert output <= most, f"the output is off by {output:.2e}, more than {most:.0e}"
    if len(truths) == 1:
        return {"relative_error": output, "gradient_error": None}
    gradient = relative_error(results[1:], truths[1:])
    assert gradient <= most_gradient, f"the gradients are off by {gradient:.2e}, more than {most_gradient:.0e}"
    return {"relative_error": output, "gradient_error": gradient}


def need_memory(what: str, needed: int) -> None:
    """Skip the running benchmark, with the reason, when ``what`` needs more memory than there is."""
    available = psutil.virtual_memory().available
    if needed > AVAILABLE_SHARE * available:
        pytest.skip(f"{what} needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are available")


def measure(benchmark, call: Callable[[], object], rounds: int, **extra) -> None:
    """Time a ``call`` that ran once before, for the check; ``extra`` goes into the record.

    Args:
        benchmark: pytest-benchmark's fixture.
        rounds: timed calls at least.
        **extra: for the record; dtype, float32 unless it says otherwise, among it.
    """
    benchmark.extra_info.update({"dtype": "float32"} | extra, threads=torch.get_num_threads())
    start = time.perf_counter()
    call()
    rounds = max(rounds, min(MOST_ROUNDS, int(SECONDS_PER_SIDE / (time.perf_counter() - start))))
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=0, iterations=1)  # two calls warmed up
