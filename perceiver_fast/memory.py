"""Memory that tensors gave back, kept for the next ones.

glibc returns what is freed to the system once it is more than a threshold, and the system clears every page before it hands
it out again: steps of small models, whose gradients are some megabytes, took up to 1.7 times as long for it. The threshold
follows the largest block that was ever returned, up to 32 MB, so any process that freed a tensor of that size keeps 64 MB.
This does no more than that, once. ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_`` in the environment overrules it,
and other C libraries take no notice.
"""

from __future__ import annotations

import contextlib

import torch

LARGEST = 2**25 - 2**16  # bytes of the largest block that glibc's threshold follows, less what it adds to it


def keep_freed() -> None:
    """Let glibc keep up to 64 MB that was freed, as it does in a process that freed a tensor of 32 MB. No page is touched: a
    storage is not filled, whatever torch's modes are. Where there is no address space for it, all stays as it was."""
    with contextlib.suppress(RuntimeError, MemoryError):
        torch.UntypedStorage(LARGEST, device="cpu")
