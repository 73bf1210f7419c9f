"""Counting what operators do, as they are called: multiply-adds, exponentials and bytes.

The rules, for our operators and for torch's alike:

    multiply_adds  of matrix products, convolutions and attention; what is elementwise counts by its bytes
    exponentials   and sines, cosines, sigmoids, normal distributions: each takes about as long as the others
    bytes          an operator reads its inputs once and writes its outputs once; views, which do neither, are free

Shapes are all that is looked at, so tensors without content do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.layers.plan import BYTE, PAIR
from perceiver_fast.ops import flops


@dataclass(frozen=True)
class Counts:
    """Counted work.

    Example:
        >>> from perceiver_fast.insight.work import Counts
        >>> print(Counts(multiply_adds=2_000_000, bytes=1024) + Counts(exponentials=500))
        2.00 M multiply-adds, 500 exponentials, 1.00 KiB
    """

    multiply_adds: int = 0
    exponentials: int = 0
    bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.multiply_adds + other.multiply_adds, self.exponentials + other.exponentials, self.bytes + other.bytes
        )

    @property
    def cost(self) -> float:
        """All in multiply-adds, by the weights that ways are compared with (layers/plan.py)."""
        return self.multiply_adds + PAIR * self.exponentials + BYTE * self.bytes

    def seconds(self, roofs: Roofs) -> float:
        """Time of one operator that does all this at the CPU's roofs.

        Exponentials are polynomials, and wait for the same units as multiply-adds; memory is read meanwhile.
        """
        arithmetic = self.multiply_adds / roofs.multiply_adds + self.exponentials / roofs.exponentials
        return max(arithmetic, self.bytes / roofs.copied_bytes)

    def __str__(self) -> str:
        operations = f"{decimal(self.multiply_adds)} multiply-adds, {decimal(self.exponentials)} exponentials"
        return f"{operations}, {binary(self.bytes)}"


def decimal(number: float) -> str:
    """For people: ``1.23 G``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{_three(number / size)} {unit}"
    return f"{number:.0f}"


def binary(number: float) -> str:
    """Bytes for people: ``1.23 MiB``."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{_three(number / size)} {unit}"
    return f"{number:.0f} B"


def _three(number: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{number:.{max(0, 2 - (number >= 10) - (number >= 100))}f}"


class Operator(NamedTuple):
    """One call of an operator."""

    name: str
    counts: Counts


def total(operators: list[Operator] | tuple[Operator, ...]) -> Counts:
    """What all of them count."""
    return sum((operator.counts for operator in operators), Counts())


def _product(a: Tensor, b: Tensor) -> tuple[int, int]:
    return a.numel() * b.shape[-1], 0


def _shapes(args: tuple) -> tuple:
    return tuple(arg.shape if isinstance(arg, Tensor) else arg for arg in args)


Formula = Callable[[tuple, Any], tuple[int, int]]


def _elementwise(args: tuple, out: Any) -> tuple[int, int]:
    """One exponential, or what takes as long, for every element of the (first) output."""
    return 0, (out if isinstance(out, Tensor) else out[0]).numel()


# Multiply-adds and exponentials from an operator's arguments and output.
FORMULAS: dict[str, Formula] = {
    "aten::mm": lambda args, out: _product(args[0], args[1]),
    "aten::bmm": lambda args, out: _product(args[0], args[1]),
    "aten::addmm": lambda args, out: _product(args[1], args[2]),
    "aten::baddbmm": lambda args, out: _product(args[1], args[2]),
    "aten::convolution": lambda args, out: (out.numel() * prod(args[1].shape[1:]), 0),
    "aten::_thnn_fused_gru_cell": lambda args, out: (0, 3 * out[0].numel()),
    "perceiver_fast::geglu_forward": _elementwise,
}
for _name in ("cross_attention_forward", "grid_attention_forward", "fourier_projection_forward"):
    FORMULAS[f"perceiver_fast::{_name}"] = lambda args, out, count=flops.FORMULAS[_name]: count(*_shapes(args))
for _name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    FORMULAS[f"aten::_scaled_dot_product_{_name}"] = lambda args, out: flops.attention(*_shapes(args[:3]))
for _name in ("exp", "log", "sin", "cos", "sigmoid", "tanh", "erf", "gelu", "silu"):
    FORMULAS[f"aten::{_name}"] = _elementwise
for _name in ("_softmax", "_safe_softmax", "_log_softmax"):
    FORMULAS[f"aten::{_name}"] = _elementwise

FREE = {"aten::_unsafe_view", "aten::_reshape_alias", "aten::empty", "aten::new_empty", "aten::empty_like"}


def _bytes(tensor: Tensor) -> int:
    """Of the elements that exist: an expanded dimension repeats one."""
    elements = prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0 or size == 0)
    return elements * tensor.element_size()


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(out.alias_info is not None and not out.alias_info.is_write for out in returns)


class WorkCounter(TorchDispatchMode):
    """While it is entered, every operator that is called is counted and added to ``operators``.

    Example:
        >>> import torch
        >>> from perceiver_fast.insight.work import WorkCounter, total
        >>> with WorkCounter() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> total(counter.operators).multiply_adds
        24
    """

    def __init__(self):
        super().__init__()
        self.operators: list[Operator] = []
        self._fused = _FusedAttention(self)

    def __enter__(self) -> WorkCounter:
        self._fused.__enter__()
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        super().__exit__(*exc)
        self._fused.__exit__(*exc)

    @contextmanager
    def into(self, operators: list[Operator]) -> Iterator[list[Operator]]:
        """What is called inside is added to ``operators``."""
        previous, self.operators = self.operators, operators
        try:
            yield operators
        finally:
            self.operators = previous

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._count(func, args, kwargs or {}, out)
        return out

    def _count(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func._schema.name
        if not written or name in FREE or _is_view(func):
            return
        self.add(name, (*args, *kwargs.values()), out)

    def add(self, name: str, args: tuple, out: Any) -> None:
        """Count one call of operator ``name``."""
        formula = FORMULAS.get(name)
        multiply_adds, exponentials = formula(args, out) if formula is not None else (0, 0)
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
        counts = Counts(multiply_adds, exponentials, sum(map(_bytes, tensors)))
        self.operators.append(Operator(name.removeprefix("aten::").removeprefix("perceiver_fast::"), counts))


class _FusedAttention(TorchFunctionMode):
    """Counts torch's attention on GPUs as the fused kernels that run it there.

    Tensors without content do not tell torch that such a kernel takes them, and it would form the N x M weights.
    """

    def __init__(self, counter: WorkCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        if q.device.type == "cpu" or q.dtype == torch.float64:
            return func(*args, **kwargs)
        with self.counter.into([]):
            out = func(*args, **kwargs)
        self.counter.add("aten::_scaled_dot_product_flash_attention", (q, k, v, *kwargs.values()), out)
        return out
