"""A tensor that is described: it has shape, dtype and device, and builds itself when somebody computes with it.

A model's preprocessor hands on tokens this way. Attention that knows asks for the description (:func:`description`) or
for some rows (:func:`rows_of`); to anybody else it is the tensor: the first operation builds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from perceiver_fast.ops.library import learns
from perceiver_fast.tokens import TokenGroups, Tokens

ROWS = 4096  # rows at a time, where a tensor need not be built at once


class Source:
    """What a described tensor ``[B, M, C]`` is made of.

    Attributes:
        tokens: a description of its rows, or None.
    """

    tokens: Tokens | TokenGroups | None = None

    def rows(self, start: int, stop: int) -> Tensor | None:
        """Rows start to stop ``[B, stop - start, C]``, computed alone; None if only all rows can be had."""
        return None

    def build(self) -> Tensor:
        """All rows."""
        raise NotImplementedError

    def learns(self) -> bool:
        """Whether gradients flow to what it is made of."""
        return False


class TokenSource(Source):
    """Rows that are described tokens."""

    def __init__(self, tokens: Tokens | TokenGroups):
        self.tokens: Tokens | TokenGroups = tokens

    def build(self) -> Tensor:
        return self.tokens.materialize()

    def learns(self) -> bool:
        return learns(*self.tokens.sources())


class ComputedRows(Source):
    """Rows that a function computes, any of them alone, in inference.

    Args:
        compute: from the first row and one after the last to ``[B, rows, C]``.
        count: number of rows.
    """

    def __init__(self, compute: Callable[[int, int], Tensor], count: int):
        self.compute, self.count = compute, count

    def rows(self, start: int, stop: int) -> Tensor:
        return self.compute(start, stop)

    def build(self) -> Tensor:
        return by_rows(lambda start, stop: self.compute(start, stop), self.count)


class SlicedSource(Source):
    """Some rows of a described tensor."""

    def __init__(self, whole: DescribedTensor, start: int, stop: int):
        self.whole, self.start, self.stop = whole, start, stop

    def rows(self, start: int, stop: int) -> Tensor | None:
        return rows_of(self.whole, self.start + start, self.start + stop)

    def build(self) -> Tensor:
        found = None if self.learns() else self.rows(0, self.stop - self.start)
        return self.whole.build()[:, self.start : self.stop] if found is None else found

    def learns(self) -> bool:
        return self.whole.source.learns()


class DescribedTensor(Tensor):
    """See this file's docstring.

    Args:
        shape: ``[B, M, C]``.
        dtype, device: of the tensor.
        source: what it is made of.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: Source):
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: Source):
        self.source = source
        self.built: Tensor | None = None
        self.version = 0

    def build(self) -> Tensor:
        """The tensor itself; built once."""
        if self.built is None:
            self.built = self.source.build()
            self.version = 0 if self.built.is_inference() else self.built._version
        return self.built

    def is_as_described(self) -> bool:
        """Whether nobody wrote into the built tensor, which then is what counts."""
        built = self.built
        return built is None or (not built.is_inference() and built._version == self.version)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is LEARNS:
            return args[0].source.learns()
        if args and type(args[0]) is cls and args[0].built is None:
            result = NotImplemented
            if func is Tensor.__getitem__:
                result = _slice(*args)
            elif func is F.linear and not args[0].source.learns() and not torch.is_grad_enabled():
                result = _linear(*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map(built, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Below autograd: whoever comes here has passed by the one above, as an autograd.Function does.
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if type(tensor) is cls and tensor.source.learns():
                raise RuntimeError(
                    f"a described tensor {tuple(tensor.shape)} came to {func} past autograd, and its gradient would be "
                    "lost; call perceiver_fast.restore(model), or compute with tensor.clone()"
                )
        args, kwargs = tree_map(built, (args, kwargs or {}))
        return func(*args, **kwargs)


DESCRIPTORS: Any = Tensor  # holds them, though its annotations tell of values
ASKED = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse")
QUESTIONS = {
    *(getattr(DESCRIPTORS, name).__get__ for name in ASKED), Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__,
    Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip
LEARNS = DESCRIPTORS.requires_grad.__get__


def built(value: Any) -> Any:
    """``value``, or the tensor that it describes."""
    return value.build() if type(value) is DescribedTensor else value


def described(tokens: Tokens | TokenGroups, dtype: torch.dtype, device: torch.device) -> DescribedTensor:
    """The tensor that ``tokens`` describe."""
    return DescribedTensor((tokens.batch, tokens.count, tokens.channels), dtype, device, TokenSource(tokens))


def description(value: Any) -> Tokens | TokenGroups | None:
    """The description of a tensor; None if it has none, or somebody wrote into it."""
    return value.source.tokens if type(value) is DescribedTensor and value.is_as_described() else None


def rows_of(value: Tensor, start: int, stop: int) -> Tensor | None:
    """Rows ``[B, stop - start, C]`` of a described tensor, computed alone; None if only all of them can be had."""
    if type(value) is not DescribedTensor:
        return value[:, start:stop]
    return value.source.rows(start, stop) if value.built is None else value.built[:, start:stop]


def by_rows(compute: Callable[[int, int], Tensor], count: int, rows: int = ROWS) -> Tensor:
    """``[B, count, C]`` from a function that computes some rows; memory beside the result is that of some rows."""
    if count <= rows:
        return compute(0, count)
    out: Any = None
    for start in range(0, count, rows):
        stop = min(count, start + rows)
        part = compute(start, stop)
        if out is None:
            out = part.new_empty(part.shape[0], count, *part.shape[2:])
        out[:, start:stop] = part
    return out


def _slice(value: DescribedTensor, index: Any) -> Any:
    """``value[:, a:b]`` as a described tensor; other indices are not taken."""
    if not (isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None)):
        return NotImplemented
    if not (isinstance(index[1], slice) and index[1].step in (None, 1)):
        return NotImplemented
    batch, count, channels = value.shape
    start, stop, _ = index[1].indices(count)
    stop = max(start, stop)
    source = SlicedSource(value, start, stop)
    return DescribedTensor((batch, stop - start, channels), value.dtype, value.device, source)


def _linear(value: DescribedTensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A linear layer of rows that are computed some at a time."""
    batch, count, _ = value.shape
    if count == 0 or value.source.rows(0, 1) is None:
        return NotImplemented

    def compute(start: int, stop: int) -> Tensor:
        rows: Any = rows_of(value, start, stop)  # as there is one, there are all
        return F.linear(rows, weight, bias)

    return by_rows(compute, count)
