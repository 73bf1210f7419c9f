"""Linear layers of the latents: the same product as torch's, on the library that is fastest here.

On the CPU large products go where linear_libraries.py measured the most speed, in inference with weights packed in
advance and cached until the parameter changes. On a GPU, in small products and under torch.compile it is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_fast.backends import Choice, forced_backend
from perceiver_fast.cache import ParameterCache
from perceiver_fast.ops.derivatives import differentiated_again, transformed
from perceiver_fast.ops.library import autocast_dtype, unless_autocast
from perceiver_fast.ops.linear_libraries import LIBRARIES, library_of, linear_settings, measure, wide_bfloat16
from perceiver_fast.ranges import op_range
from perceiver_fast.tracing import intercepted

OP = "linear"
LARGE = 2**24  # multiply-adds, about a tenth of a millisecond: below it every library is as good


def is_large(rows: int, channels: int, out_channels: int, device: torch.device) -> bool:
    """Whether it matters which library runs a product; only then is one chosen."""
    if device.type != "cpu" or forced_backend() == "reference" or torch.compiler.is_compiling() or transformed():
        return False
    if intercepted():
        return False
    return rows * channels * out_channels >= LARGE


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
    """The library that runs a forward product in inference, and what the others were measured at."""
    if not is_large(rows, channels, out_channels, device):
        return Choice(OP, "torch")
    if dtype not in (torch.float32, torch.bfloat16):
        return Choice(OP, "torch")
    operands = torch.float32 if dtype == torch.bfloat16 and wide_bfloat16() else dtype
    chosen, speeds = library_of("packed", operands), measure(operands)["packed"]
    why = {name: [f"{speed:.0f} GFLOP/s"] for name, speed in speeds.items() if name != chosen}
    return Choice(OP, f"{chosen} ({speeds[chosen]:.0f} GFLOP/s)", why)


def _product(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """One kind of product of two matrices of one dtype, on the library that is fastest at it."""
    inner = a.shape[0] if kind == "grad_weight" else a.shape[1]
    others = a.numel() // max(inner, 1) * (b.numel() // max(inner, 1))
    dtype, library = a.dtype, "torch"
    if is_large(1, inner, others, a.device):
        if dtype == torch.bfloat16 and wide_bfloat16():
            a, b = a.float(), b.float()
        library = library_of(kind, a.dtype)
    return LIBRARIES[library].products()[kind](a, b).to(dtype)


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


class _Packed:
    """A weight packed for products with one number of rows: from the second product in a row with that number on.

    ``product`` multiplies by it, once there is one; ``seen`` says that the first product has come.
    """

    product: Callable[[Tensor], Tensor] | None = None
    seen = False


def _packed_key(rows: int, dtype: torch.dtype) -> tuple:
    return rows, dtype, torch.get_num_threads(), linear_settings(), forced_backend()


def _quick_product(cache: ParameterCache, name: str, x: Tensor, weight: Tensor) -> Tensor | None:
    """``x [.., k] @ weight^T`` where nothing has changed since it was last computed with packed weights, else None.

    A few comparisons: what it takes to find that out anew costs as much as the smaller products.
    """
    found = cache.peek(name, weight)
    if found is None or type(x) is not Tensor or not x.is_contiguous():
        return None
    (key, dtype, library), packed = found
    if packed.product is None or dtype != x.dtype or library == "torch":
        return None
    shape = x.shape
    if shape[-1] != weight.shape[1] or key != _packed_key(x.numel() // shape[-1], dtype):
        return None
    return packed.product(x)


def packed_product(cache: ParameterCache, name: str, x: Tensor, weight: Tensor) -> Tensor | None:
    """``x [n, k] @ weight^T`` by packed weights in ``cache``, or None where that has no use yet.

    Packing costs a few parts in a hundred of the product, and some libraries pack for one number of rows: it is done
    when a number of rows comes the second time in turn, with the same weight.
    """
    wide = x.dtype == torch.bfloat16 and wide_bfloat16()
    dtype = torch.float32 if wide else x.dtype
    library = library_of("packed", dtype)
    if library == "torch" and dtype == weight.dtype:
        return None
    key = _packed_key(x.shape[0], x.dtype), dtype, library  # the dtype of x is what weights are rounded to
    packed = cache.get(name, (weight,), _Packed, key)  # a new one where nothing can be cached
    if packed.product is None:
        if not packed.seen:
            packed.seen = True
            return None
        packed.product = _pack(library, weight, x, dtype)
    return packed.product(x) if x.dtype == dtype else packed.product(x.to(dtype)).to(x.dtype)


def _pack(library: str, weight: Tensor, x: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        operand = weight.detach().to(x.dtype).to(dtype)
        if LIBRARIES[library].pack:
            return LIBRARIES[library].pack(operand, x.shape[0])
        return lambda x: LIBRARIES["torch"].forward(x, operand)


@op_range(OP)
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, cache: ParameterCache | None = None, name: str = "weight"
) -> Tensor:
    """``x @ weight^T + bias``, as :func:`torch.nn.functional.linear` but for where it is computed.

    Args:
        x: ``[.., k]``, floating point.
        weight: ``[m, k]``; it is computed with in the dtype of x.
        bias: ``[m]`` or None.
        cache: where packed weights are cached in inference, under ``name``. Default: they are not.

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
    if cache is not None and not torch.compiler.is_compiling() and not transformed():
        out = _quick_product(cache, name, x, weight)
        if out is not None:
            return out if bias is None else out + bias.to(x.dtype)
    with unless_autocast(x.device):  # the dtype is that of x
        return _linear(x, weight, bias, cache, name)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, cache: ParameterCache | None, name: str) -> Tensor:
    rows = x.numel() // max(x.shape[-1], 1)
    if not is_large(rows, *weight.shape, x.device):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    flat, out = x.reshape(rows, x.shape[-1]).contiguous(), None
    if cache is not None:
        cache.clear_in_training()
        out = None if torch.is_grad_enabled() else packed_product(cache, name, flat, weight)
    if out is None:
        cast = weight.to(x.dtype)
        torchs = all(library_of(kind, x.dtype) == "torch" for kind in ("forward", "grad_input", "grad_weight"))
        if torchs and not (x.dtype == torch.bfloat16 and wide_bfloat16()):
            out = F.linear(flat, cast)
        else:
            out = LinearFunction.apply(flat, cast)
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(x.dtype)
