"""A transformer's GEGLU feed-forward: two products and what lies between them.

    h = z W1^T        u = geglu(h + b1)        out = u W2^T

The bias of the second product is left to whoever adds the result to the stream (ops/layer_norm.py). For the backward
z and h are saved and u is computed again, in the pass that computes h's gradient: 9 numbers a channel of z where plain
PyTorch keeps 17 (perceiver-pytorch 0.11.0, counted by saved_tensors_hooks).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_fast import reference
from perceiver_fast.ops.derivatives import differentiable, differentiated_again
from perceiver_fast.ops.geglu import GEGLU, geglu
from perceiver_fast.ops.library import compute_dtype, learns, unless_autocast
from perceiver_fast.ops.linear import forward_product, grad_input_product, grad_weight_product, linear
from perceiver_fast.ops.pointwise import runs_kernel
from perceiver_fast.ops.rounding import rounded
from perceiver_fast.ranges import op_range


class FeedForwardFunction(torch.autograd.Function):
    """Forward and backward of the whole; saves z, h and the parameters."""

    @staticmethod
    def forward(ctx, z, weight1, bias1, weight2):
        h = forward_product(z, weight1)
        ctx.save_for_backward(z, h, weight1, bias1, weight2)
        return forward_product(torch.ops.perceiver_fast.geglu_forward(h, bias1), weight2)

    @staticmethod
    @op_range("feed_forward.backward")
    def backward(ctx, d_out):
        z, h, weight1, bias1, weight2 = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if differentiated_again():
            inputs = z, weight1, bias1, weight2
            return differentiable(
                lambda: _gradients(d_out, z, h, weight1, bias1, weight2, needed), _plain, inputs, (d_out,), needed
            )
        return _gradients(d_out, z, h, weight1, bias1, weight2, needed)


def _plain(z, weight1, bias1, weight2):
    return F.linear(reference.geglu(F.linear(z, weight1), bias1), weight2)


def _gradients(d_out, z, h, weight1, bias1, weight2, needed):
    needs_z, needs_weight1, needs_bias1, needs_weight2 = needed
    d_out = d_out.contiguous()
    d_u = grad_input_product(d_out, weight2)
    u, d_h, d_bias1 = torch.ops.perceiver_fast.geglu_backward(d_u, h, bias1)
    del d_u, h
    d_weight2 = grad_weight_product(d_out, u) if needs_weight2 else None
    del u
    d_weight1 = grad_weight_product(d_h, z) if needs_weight1 else None
    d_z = grad_input_product(d_h, weight1) if needs_z else None
    return d_z, d_weight1, d_bias1 if needs_bias1 else None, d_weight2


@op_range("feed_forward")
def feed_forward(z: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    """``geglu(z weight1^T + bias1) weight2^T``.

    Args:
        z: ``[.., D]``, floating point.
        weight1: ``[2 F, D]``, values then gates.
        bias1: ``[2 F]``.
        weight2: ``[D', F]``.

    Returns:
        ``[.., D']``, the dtype of z. Differentiable any number of times.

    Raises:
        ValueError: sizes do not fit.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import feed_forward
        >>> feed_forward(torch.randn(2, 5, 8), torch.randn(64, 8), torch.zeros(64), torch.randn(8, 32)).shape
        torch.Size([2, 5, 8])
    """
    if z.shape[-1:] != weight1.shape[1:] or bias1.shape != weight1.shape[:1] or 2 * weight2.shape[1] != len(weight1):
        raise ValueError(
            f"feed_forward: expected weight1 [2 F, {z.shape[-1]}], bias1 [2 F] and weight2 [D', F], got "
            f"{tuple(weight1.shape)}, {tuple(bias1.shape)} and {tuple(weight2.shape)}; values and gates are half of 2 F each"
        )
    bias1 = bias1 if bias1.dtype in (z.dtype, compute_dtype(z.dtype)) else bias1.to(z.dtype)
    if learns(z, weight1, bias1, weight2) and runs_kernel(GEGLU, z.dtype, z.device):
        with unless_autocast(z.device):
            flat = z.reshape(-1, z.shape[-1])
            out = FeedForwardFunction.apply(flat, rounded(weight1, z.dtype), bias1, rounded(weight2, z.dtype))
            return out.view(*z.shape[:-1], weight2.shape[0])
    return linear(geglu(linear(z, weight1), bias1), weight2)
