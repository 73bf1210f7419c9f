"""Peak memory of one call, in a process of its own: what ran before would leave malloc with free memory to reuse."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.process import Process
from perceiver_fast.insight.environment import forget_peak, resident_bytes

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
MAPPED_FROM_BYTES = 64 * 2**10
WARM_CALLS = 2  # torch.compile compiles again in a second call
METHOD = "rise of VmHWM over VmRSS in a third call, in a process of its own"

_clear_refs = Path("/proc/self/clear_refs")


def memory_method() -> str:
    """How :func:`peak_memory` measures here, or why it cannot."""
    if not _clear_refs.exists():
        return "not measured: this system has no /proc/self/clear_refs"
    try:
        forget_peak()
    except OSError as error:
        return f"not measured: /proc/self/clear_refs cannot be written ({error.strerror})"
    return METHOD


class Memory(NamedTuple):
    """Bytes: by which the resident set rises at its peak in a warm call, and what the calls before it left there.

    What is kept are tables of codes, threads, and of a compiled model the compiler.
    """

    peak: int
    kept: int


def peak_memory(make: Callable[..., Callable[[], object]], *args: object) -> Memory | None:
    """Memory of a third ``make(*args)()``; None where that is unknown.

    Args:
        make: builds the call; it and ``args`` are pickled.

    Raises:
        Ended: the process failed, which wrote why to standard error, or was killed.
    """
    if memory_method() != METHOD:
        return None
    with Process(_send_peak, torch.get_num_threads(), make, args) as process:
        found = process.receive()
        process.stop(patience=None)  # torch.compile tidies up
        return found


def _send_peak(sender: Connection, threads: int, make: Callable, args: tuple) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)  # what is freed leaves the resident set at once
    torch.set_num_threads(threads)
    call = make(*args)
    gc.collect()
    cold = resident_bytes("VmRSS")
    for _ in range(WARM_CALLS):
        call()
    gc.collect()
    memory_method()
    before = resident_bytes("VmRSS")
    result = call()
    sender.send(Memory(resident_bytes("VmHWM") - before, before - cold))
    del result
