"""Counting what operators do, as they are called, by the rules of :mod:`perceiver_fast.ops.work`.

Shapes are all that is looked at, so tensors without content do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perceiver_fast.ops.declaration import OPERATORS
from perceiver_fast.ops.work import Work, attention_work


class Counted(NamedTuple):
    """One call of an operator, with its work."""

    name: str
    counts: Work


def total(operators: list[Counted] | tuple[Counted, ...]) -> Work:
    """What all of them count."""
    return sum((operator.counts for operator in operators), Work())


def _product(a: Tensor, b: Tensor) -> Work:
    return Work(multiply_adds=a.numel() * b.shape[-1])


def _elementwise(args: tuple, out: Any) -> Work:
    """One exponential, or what takes as long, for every element of the (first) output."""
    return Work(exponentials=(out if isinstance(out, Tensor) else out[0]).numel())


def _attention(args: tuple, out: Any) -> Work:
    q, k, v = (t.shape for t in args[:3])
    return attention_work(q, k, v)


# The work of torch's operators but for their bytes, from arguments and output.
FORMULAS: dict[str, Callable[[tuple, Any], Work]] = {
    "aten::mm": lambda args, out: _product(args[0], args[1]),
    "aten::bmm": lambda args, out: _product(args[0], args[1]),
    "aten::addmm": lambda args, out: _product(args[1], args[2]),
    "aten::baddbmm": lambda args, out: _product(args[1], args[2]),
    "aten::convolution": lambda args, out: Work(multiply_adds=out.numel() * prod(args[1].shape[1:])),
    "aten::_thnn_fused_gru_cell": lambda args, out: Work(exponentials=3 * out[0].numel()),
}
for _name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    FORMULAS[f"aten::_scaled_dot_product_{_name}"] = _attention
_EXPONENTIALS = ("exp", "log", "sin", "cos", "sigmoid", "tanh", "erf", "gelu", "silu")
for _name in (*_EXPONENTIALS, "_softmax", "_safe_softmax", "_log_softmax"):
    FORMULAS[f"aten::{_name}"] = _elementwise


def operations(name: str, args: tuple, out: Any) -> Work:
    """Multiply-adds and exponentials of one call: by its declaration if it is ours, else by torch's formula, if any."""
    namespace, _, short = name.partition("::")
    if namespace == "perceiver_fast" and short in OPERATORS:
        return OPERATORS[short].count(args)
    return FORMULAS[name](args, out) if name in FORMULAS else Work()


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
        self.operators: list[Counted] = []
        self._fused = _FusedAttention(self)

    def __enter__(self) -> WorkCounter:
        self._fused.__enter__()
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        super().__exit__(*exc)
        self._fused.__exit__(*exc)

    @contextmanager
    def into(self, operators: list[Counted]) -> Iterator[list[Counted]]:
        """What is called inside is added to ``operators``."""
        previous, self.operators = self.operators, operators
        try:
            yield operators
        finally:
            self.operators = previous

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        writes = func._schema.is_mutable or any(isinstance(leaf, Tensor) for leaf in tree_leaves(out))
        if writes and name not in FREE and not _is_view(func):
            self.add(name, (*args, *kwargs.values()), out)
        return out

    def add(self, name: str, args: tuple, out: Any) -> None:
        """Count one call of operator ``name``."""
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
        counts = operations(name, args, out) + Work(bytes=sum(map(_bytes, tensors)))
        self.operators.append(Counted(name.removeprefix("aten::").removeprefix("perceiver_fast::"), counts))


class _FusedAttention(TorchFunctionMode):
    """Work torch's attention on GPUs as the fused kernels that run it there.

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
