"""Float64 where a device has it, and what takes its place where it has not (Apple's MPS, some accelerators).

Positions are computed in float64, on the CPU then, and arrive as float32; a log-sum-exp is float32 there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _kind_has_float64(kind: str) -> bool:
    if kind in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.ones(1, dtype=torch.float64, device=kind).add(1)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


# What torch.compiler.assume_constant_result sets; that function imports torch._dynamo, which takes seconds.
setattr(_kind_has_float64, "_dynamo_marked_constant", True)


def has_float64(device: torch.device) -> bool:
    """Whether a device has float64; asked once a kind of device, by making a tensor there."""
    return device.type == "cpu" or _kind_has_float64(device.type)


def in_float64(tensor: Tensor) -> Tensor:
    """``tensor`` in float64: where it is, or on the CPU if its device has no float64. Gradients pass."""
    return tensor.double() if has_float64(tensor.device) else tensor.to("cpu", torch.float64)


def float64_device(device: torch.device) -> torch.device:
    """``device``, or the CPU if it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def lse_of(tensor: Tensor) -> Tensor:
    """A log-sum-exp as ops return it: float64, or as it was computed on a device without."""
    return tensor.double() if has_float64(tensor.device) else tensor
