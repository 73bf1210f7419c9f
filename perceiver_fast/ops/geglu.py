"""GEGLU of a feed-forward's wide activations, its bias included, in one pass.

    [value, gate] = h + bias        u = value * gate * Phi(gate),  Phi the normal distribution's

The backward reads h again and gives u back beside the gradients, so that whoever needs u for the weights' gradient
(ops/feed_forward.py) does not have to keep it.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from perceiver_fast import reference
from perceiver_fast.ops.checks import check_device, check_dtype, check_floating
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import differentiable, differentiated_again
from perceiver_fast.ops.library import compute_dtype, learns
from perceiver_fast.ops.pointwise import POINTWISE_BACKENDS, PointwiseCall, runs_kernel
from perceiver_fast.ops.work import Work, no_work
from perceiver_fast.ranges import op_range

OP = "geglu"


def _forward_outputs(h, bias):
    return h.new_empty((*h.shape[:-1], h.shape[-1] // 2))


def _backward_outputs(d_u, h, bias):
    d_bias = h.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return h.new_empty(d_u.shape), h.new_empty(h.shape), d_bias


def _sample(make, dtype=torch.float32, bias=torch.float32, rows=(2, 3), width=17):
    return GEGLUFunction.apply(
        make(*rows, 2 * width, dtype=dtype), None if bias is None else make(2 * width, dtype=bias)
    )


def _trial(make, dtype):
    return geglu(make(3, 40, 2 * 72, dtype=dtype), make(2 * 72, dtype=dtype))


GEGLU = declare(
    OP,
    backends=POINTWISE_BACKENDS,
    call=PointwiseCall,
    operators=(
        Operator(
            "geglu_forward(Tensor h, Tensor? bias) -> Tensor",
            _forward_outputs,
            work=lambda h, bias: Work(exponentials=prod(h) // 2),
            triton="geglu.forward",
        ),
        Operator(
            "geglu_backward(Tensor d_u, Tensor h, Tensor? bias) -> (Tensor u, Tensor d_h, Tensor d_bias)",
            _backward_outputs,
            work=no_work,
            triton="geglu.backward",
        ),
    ),
    sample=_sample,
    trial=_trial,
    variants=({}, dict(bias=None), dict(dtype=torch.float64, bias=torch.float64), dict(dtype=torch.bfloat16)),
    instances={
        "bfloat16, 2048 wide": dict(dtype=torch.bfloat16, bias=torch.bfloat16, rows=(64, 256), width=2048),
        "float16 and float32, 1024 wide": dict(dtype=torch.float16, rows=(64, 256), width=1024),
        "float32, 2048 wide": dict(rows=(64, 256), width=2048),
    },
    kernels="(geglu_.*|column_sums)_kernel",
)


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
    if not runs_kernel(GEGLU, h.dtype, h.device):
        return reference.geglu(h, bias)
    if not learns(h, bias):
        return torch.ops.perceiver_fast.geglu_forward(h, bias)
    return GEGLUFunction.apply(h, bias)


def _check(h: Tensor, bias: Tensor | None) -> None:
    check_floating(OP, h=h)
    if h.dim() < 1 or h.shape[-1] % 2:
        raise ValueError(f"{OP}: expected h [.., 2 F], got {tuple(h.shape)}; values and gates are a half of it each")
    if bias is None:
        return
    if bias.shape != h.shape[-1:]:
        raise ValueError(
            f"{OP}: expected bias [{h.shape[-1]}], got {tuple(bias.shape)}; it is added to the last dimension of h"
        )
    check_device(OP, "bias", bias, h, "h")
    check_dtype(OP, "bias", bias, (h.dtype, compute_dtype(h.dtype)), "like h")
