"""What this CPU can do at most: the roofs that counted work is held against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from perceiver_fast import extension


@dataclass(frozen=True)
class Roofs:
    """Measured rates of the threads together, float32.

    Args:
        multiply_adds: fused multiply-adds a second, operands in registers.
        exponentials: exponentials a second, by the polynomial that the attention kernels use.
        copied_bytes: bytes read and written a second by a copy that no cache holds.
        threads: that were measured together.
    """

    multiply_adds: float
    exponentials: float
    copied_bytes: float
    threads: int


def measure_roofs(threads: int | None = None) -> Roofs | None:
    """Measure the roofs, once a process for every number of threads; about half a second.

    Args:
        threads: Default: torch's.

    Returns:
        None without the extension, whose kernels' instructions are what is measured.

    Example:
        >>> from perceiver_fast.insight.roofs import measure_roofs
        >>> roofs = measure_roofs(threads=1)
        >>> 1 if roofs is None else roofs.threads
        1
    """
    return _measure(torch.get_num_threads() if threads is None else threads)


@lru_cache(maxsize=None)
def _measure(threads: int) -> Roofs | None:
    if extension.module is None:
        return None
    multiply_adds, exponentials, copied_bytes = extension.module.roofs(threads)
    return Roofs(multiply_adds, exponentials, copied_bytes, threads)
