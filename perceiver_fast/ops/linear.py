"""Linear layers of the latents: the same product as torch's, on the library that is fastest here.

On the CPU large products go where linear_choice.py found the most speed. On a GPU, in small products and under
torch.compile it is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_fast.backends import Choice, forced_backend
from perceiver_fast.ops.checks import check_memory
from perceiver_fast.ops.derivatives import differentiated_again, transformed
from perceiver_fast.ops.library import autocast_dtype, learns, unless_autocast
from perceiver_fast.ops.linear_choice import BFLOAT16, forced_library, library_of, verdict, wide_bfloat16
from perceiver_fast.ops.linear_libraries import KINDS, LIBRARIES
from perceiver_fast.ops.rounding import rounded
from perceiver_fast.ranges import op_range
from perceiver_fast.tracing import intercepted

OP = "linear"
LARGE = 2**24  # multiply-adds, about a tenth of a millisecond: below it every library is as good
# Or numbers of a weight: a few rows take as long to read it, and libraries differ by two to four times at that.
LARGE_WEIGHT = 2**19


def is_large(rows: int, channels: int, out_channels: int, device: torch.device) -> bool:
    """Whether it matters which library runs a product; only then is one chosen."""
    if torch.compiler.is_compiling():
        return False
    numbers = channels * out_channels
    few = numbers < LARGE_WEIGHT or rows == 0
    if type(rows) is int and rows * numbers < LARGE and few:  # asked first, since most calls of small models end here
        return False
    if device.type != "cpu" or forced_backend() == "reference" or transformed() or intercepted():
        return False
    return rows * numbers >= LARGE or (numbers >= LARGE_WEIGHT and rows > 0)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of the stream ``x [.., D]`` are computed in: autocast's, or that of x.

    Where float32 is the faster one, autocast to bfloat16 is not taken up.
    """
    dtype = autocast_dtype(x.device)
    if dtype is None or x.dtype == torch.float64:
        return x.dtype
    rows, channels = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    if dtype == torch.bfloat16 and x.dtype == torch.float32 and is_large(rows, channels, channels, x.device):
        return torch.float32 if wide_bfloat16() else dtype
    return dtype


def linear_library(rows: int, channels: int, out_channels: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The library that runs a forward product, how sure that choice is, and what the others were measured at."""
    if dtype not in (torch.float32, torch.bfloat16) or not is_large(rows, channels, out_channels, device):
        return Choice(OP, "torch")
    return large_library(dtype)


def large_library(dtype: torch.dtype) -> Choice:
    """The library that runs large forward products of float32 or bfloat16: see :func:`linear_library`."""
    operands = torch.float32 if dtype == torch.bfloat16 and wide_bfloat16() else dtype
    chosen = library_of("forward", operands)
    if forced_library() != "auto":
        return Choice(OP, f"{chosen} ({forced_library()} is forced)")
    found = verdict("forward" if operands == torch.float32 else BFLOAT16)
    speeds = dict(found.gflops)
    measured = speeds.pop(found.chosen, None)
    how = found.how if measured is None else f"{measured:.0f} GFLOP/s, {found.how}"
    return Choice(OP, f"{chosen} ({how})", {name: [f"{speed:.0f} GFLOP/s"] for name, speed in speeds.items()})


def _product(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """One kind of product of two matrices of one dtype, on the library that is fastest at it."""
    rows, channels = a.shape
    dtype, library = a.dtype, "torch"
    if is_large(rows, channels, b.shape[0] if kind == "forward" else b.shape[1], a.device):
        if dtype == torch.bfloat16 and wide_bfloat16():
            a, b = a.float(), b.float()
        library = library_of(kind, a.dtype)
    product: Any = LIBRARIES[library].products()[kind]
    return product(a, b).to(dtype)


def forward_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x [n, k] @ weight [m, k]^T``."""
    return _product("forward", x, weight)


def grad_input_product(d_out: Tensor, weight: Tensor) -> Tensor:
    """``d_out [n, m] @ weight [m, k]``."""
    return _product("grad_input", d_out, weight)


def grad_weight_product(d_out: Tensor, x: Tensor) -> Tensor:
    """``d_out [n, m]^T @ x [n, k]``."""
    return _product("grad_weight", d_out, x)


class LinearFunction(torch.autograd.Function):
    """Connects the three products; saves x and weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return forward_product(x, weight)

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        if differentiated_again():  # torch's own products have all further derivatives
            d_x = d_out @ weight if ctx.needs_input_grad[0] else None
            return d_x, d_out.transpose(-1, -2) @ x if ctx.needs_input_grad[1] else None
        d_out = d_out.contiguous()
        d_x = grad_input_product(d_out, weight) if ctx.needs_input_grad[0] else None
        return d_x, grad_weight_product(d_out, x) if ctx.needs_input_grad[1] else None


@op_range(OP)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias``, as :func:`torch.nn.functional.linear` but for where it is computed.

    Args:
        x: ``[.., k]``, floating point.
        weight: ``[m, k]``; it is computed with in the dtype of x.
        bias: ``[m]`` or None.

    Returns:
        ``[.., m]``, the dtype of x. Differentiable any number of times.

    Raises:
        ValueError: sizes do not fit.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import linear
        >>> linear(torch.randn(2, 5, 8), torch.randn(3, 8)).shape
        torch.Size([2, 5, 3])
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"linear: expected x [.., {weight.shape[-1]}] for weight {tuple(weight.shape)}, got {tuple(x.shape)}; "
            "the last dimension of x is multiplied with the last of weight"
        )
    if autocast_dtype(x.device) is None:
        return _linear(x, weight, bias)
    with unless_autocast(x.device):  # the dtype is that of x
        return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.numel() // max(x.shape[-1], 1)
    cast = rounded(weight, x.dtype)
    out_channels, channels = weight.shape
    if not is_large(rows, channels, out_channels, x.device):
        return F.linear(x, cast, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))
    check_memory(OP, weight, bias)
    flat = x.reshape(rows, x.shape[-1]).contiguous()
    kinds = KINDS if learns(x, weight) else KINDS[:1]  # what only infers compares no libraries for training
    torchs = all(library_of(kind, x.dtype) == "torch" for kind in kinds)
    if torchs and not (x.dtype == torch.bfloat16 and wide_bfloat16()):
        out = F.linear(flat, cast)
    else:
        out = LinearFunction.apply(flat, cast)
    out = out.view(*x.shape[:-1], out_channels)
    return out if bias is None else out + bias.to(x.dtype)
