"""GEGLU of a feed-forward's wide activations, its bias included, in one pass.

    [value, gate] = h + bias        u = value * gate * Phi(gate),  Phi the normal distribution's

The backward reads h again and gives u back beside the gradients, so that whoever needs u for the weights' gradient
(ops/feed_forward.py) does not have to keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perceiver_fast import backends, extension, reference
from perceiver_fast.backends import Backend, Choice
from perceiver_fast.ops.derivatives import differentiable, differentiated_again, transformed
from perceiver_fast.ops.library import (
    compute_dtype,
    cpu_error,
    kernel_reasons,
    learns,
    library,
    register_triton,
    triton_reasons,
)
from perceiver_fast.ranges import op_range

OP = "geglu"

library.define("geglu_forward(Tensor h, Tensor? bias) -> Tensor")
library.define("geglu_backward(Tensor d_u, Tensor h, Tensor? bias) -> (Tensor u, Tensor d_h, Tensor d_bias)")
register_triton("geglu_forward", "geglu", "forward")
register_triton("geglu_backward", "geglu", "backward")


@library.fake("geglu_forward")
def _(h, bias):
    return h.new_empty((*h.shape[:-1], h.shape[-1] // 2))


@library.fake("geglu_backward")
def _(d_u, h, bias):
    d_bias = h.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return h.new_empty(d_u.shape), h.new_empty(h.shape), d_bias


class GEGLUFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves h and the bias."""

    @staticmethod
    def forward(ctx, h, bias):
        ctx.save_for_backward(h, bias)
        return torch.ops.perceiver_fast.geglu_forward(h, bias)

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_u):
        h, bias = ctx.saved_tensors

        def kernel():
            _, d_h, d_bias = torch.ops.perceiver_fast.geglu_backward(d_u, h, bias)
            return d_h, None if bias is None else d_bias

        if differentiated_again():
            return differentiable(kernel, reference.geglu, (h, bias), (d_u,), ctx.needs_input_grad)
        return kernel()


@dataclass(frozen=True)
class PointwiseCall:
    """What the choice of a backend may depend on: dtypes of the operands, and their device."""

    dtype: torch.dtype
    device: torch.device


POINTWISE = (torch.float64, torch.float32, torch.bfloat16)  # what the CPU kernels take


def pointwise_backends() -> tuple[Backend, ...]:
    """The backends of ops that pass over activations once: geglu and layer_norm."""
    return (
        Backend("cpu", lambda c: kernel_reasons(cpu_error(extension.error), "cpu", c.device, c.dtype, POINTWISE)),
        Backend("triton", lambda c: triton_reasons(c.device, c.dtype)),
        Backend("reference", lambda c: []),
    )


BACKENDS = pointwise_backends()
_runs_kernel: dict[tuple, bool] = {}


def runs_kernel(choose: Callable[[PointwiseCall], Choice], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel runs a pass over activations, rather than plain PyTorch.

    Under torch.compile it is plain PyTorch, and under torch.func's transforms. Answers are kept: finding one anew takes as long as a small kernel.

    Raises:
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.
    """
    if torch.compiler.is_compiling():
        backends.require(choose(PointwiseCall(dtype, device)))
        return False
    if transformed():
        return False
    key = choose, dtype, device, backends.forced_backend()
    if key not in _runs_kernel:
        _runs_kernel[key] = backends.require(choose(PointwiseCall(dtype, device))).backend != "reference"
    return _runs_kernel[key]


def choose_geglu(call: PointwiseCall) -> Choice:
    """The backend that runs ``call``."""
    return backends.choose(OP, BACKENDS, call)


@op_range(OP)
def geglu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """``value * gelu(gate)`` of ``[value, gate] = h + bias``, the exact gelu.

    Under torch.compile it is plain PyTorch, which the compiler fuses with what is around it.

    Args:
        h: ``[.., 2 F]``, floating point.
        bias: ``[2 F]``, the dtype of h, or float32 beside half precision. Default: None.

    Returns:
        ``[.., F]``, the dtype of h. Differentiable any number of times in h and bias.

    Raises:
        TypeError, ValueError: wrong dtype, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Source:
        Shazeer, "GLU variants improve transformer", 2020.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import geglu
        >>> geglu(torch.randn(2, 5, 8), torch.zeros(8)).shape
        torch.Size([2, 5, 4])
    """
    _check(h, bias)
    if not runs_kernel(choose_geglu, h.dtype, h.device):
        return reference.geglu(h, bias)
    if not learns(h, bias):
        return torch.ops.perceiver_fast.geglu_forward(h, bias)
    return GEGLUFunction.apply(h, bias)


def _check(h: Tensor, bias: Tensor | None) -> None:
    if not h.is_floating_point():
        raise TypeError(f"geglu: expected a floating-point h, got {h.dtype}; convert it with h.float()")
    if h.dim() < 1 or h.shape[-1] % 2:
        raise ValueError(f"geglu: expected h [.., 2 F], got {tuple(h.shape)}; values and gates are a half of it each")
    if bias is None:
        return
    if bias.shape != h.shape[-1:] or bias.device != h.device:
        raise ValueError(
            f"geglu: expected bias [{h.shape[-1]}] on {h.device}, got {tuple(bias.shape)} on {bias.device}; "
            "it is added to the last dimension of h"
        )
    dtypes = dict.fromkeys((h.dtype, compute_dtype(h.dtype)))  # one of them, or two
    if bias.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"geglu: expected bias in {expected}, got {bias.dtype}; convert it with bias.to(..)")
