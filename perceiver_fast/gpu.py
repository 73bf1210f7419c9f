"""Facts about GPUs, and whether Triton is there: what ops, kernels and planning ask, without importing triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter is on: its kernels then run on CPU tensors, in the place of the C++ ones."""

triton_error = None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"


_assumed: ContextVar[int | None] = ContextVar("assumed", default=None)


@contextmanager
def assumed(architecture: int) -> Iterator[None]:
    """Within, and in this thread, every GPU is taken to be of this architecture: to compile for what is not there."""
    token = _assumed.set(architecture)
    try:
        yield
    finally:
        _assumed.reset(token)


def assuming() -> bool:
    """Whether GPUs are :func:`assumed` here."""
    return _assumed.get() is not None


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    if INTERPRETED or device.type != "cuda" or not torch.cuda.is_available():
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def architecture(device: torch.device) -> int:
    """The compute capability of a GPU as sm_XY writes it; where there is none to ask, as in explain, an H100's."""
    return _assumed.get() or _gpu(device)[0]


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where there is none to ask, an H100's."""
    return _gpu(device)[1]


# What torch.compiler.assume_constant_result sets; that function imports torch._dynamo, which takes seconds.
setattr(architecture, "_dynamo_marked_constant", True)
setattr(multiprocessors, "_dynamo_marked_constant", True)
