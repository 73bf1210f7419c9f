"""What ops expect of their arguments, said in full when something else comes: expected, got, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.tracing import PLAIN


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all are tensors of floating point."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(t).__name__}; use torch.as_tensor")
        if not t.is_floating_point():
            raise TypeError(f"{op}: expected {name} to be floating point, got {t.dtype}; convert it with .float()")


def check_dtype(op: str, name: str, t: Tensor, dtypes: Sequence[torch.dtype], why: str) -> None:
    """Raise TypeError unless ``t`` is of one of the dtypes; ``why`` says where they come from: "like q"."""
    if t.dtype not in dtypes:
        expected = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise TypeError(
            f"{op}: expected {name} to be {expected} {why}, got {t.dtype}; convert one of them with .to(..)"
        )


def check_device(op: str, name: str, t: Tensor, like: Tensor, like_name: str) -> None:
    """Raise ValueError unless ``t`` is where ``like`` is."""
    if t.device != like.device:
        raise ValueError(
            f"{op}: expected {name} on {like.device} like {like_name}, got {t.device}; move it with .to(..)"
        )


def check_alike(op: str, **tensors: Tensor) -> None:
    """Raise unless all are of floating point, and of the dtype and device of the first."""
    check_floating(op, **tensors)
    first_name, first = next(iter(tensors.items()))
    for name, t in tensors.items():
        check_dtype(op, name, t, (first.dtype,), f"like {first_name}")
        check_device(op, name, t, first, first_name)


def check_shape(op: str, name: str, t: Tensor, shape: Sequence[int], why: str) -> None:
    """Raise ValueError unless ``t`` has this shape; ``why`` says what it comes from, or what to do."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{op}: expected {name} of shape {tuple(shape)}, got {tuple(t.shape)}; {why}")


def check_memory(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if the memory of a tensor on the CPU was freed, where torch's elementwise kernels would crash.

    A parameter is left without memory by ``parameter.untyped_storage().resize_(0)``, as sharding and offloading do.
    """
    if torch.compiler.is_compiling() or transformed():
        return
    t: Any  # the next line's condition is one that mypy does not see through
    for t in tensors:
        if type(t) in PLAIN and t.data_ptr() == 0 and t.numel() > 0 and t.device.type == "cpu":
            raise RuntimeError(
                f"{op}: expected a tensor with memory, got one of shape {tuple(t.shape)} whose storage was freed; gather or "
                "load its values before the call"
            )


def check_mask(op: str, mask: Tensor | None, shape: Sequence[int], like: Tensor, like_name: str) -> None:
    """Raise unless ``mask`` is None, or bool, of this shape, and where ``like`` is."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: expected a bool mask, True where a token may be attended to, got {mask.dtype}; "
            "convert it with mask.bool()"
        )
    check_shape(op, "mask", mask, shape, "give one bool for every token of every batch element")
    check_device(op, "mask", mask, like, like_name)


def check_dropout(op: str, dropout: float) -> None:
    """Raise ValueError unless ``dropout`` is a probability below one."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: expected a dropout probability in [0, 1), got {dropout}")
