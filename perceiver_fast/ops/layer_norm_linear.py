"""LayerNorm and the linear layer after it, for wide weights: ``(normalised x * gain + shift) weight^T``.

The product runs on the library that is fastest here (ops/linear.py). The normalised rows exist while they are multiplied,
in the forward and again in the backward; what is saved is what came in, and their statistics. Where x has no gradient,
those of gain and shift need no product of their own: with ``G = d_out^T z`` of the normalised z,

    d_weight = G gain + sum_n d_out_n shift^T        d_gain = column sums of weight * G        d_shift = weight^T sum_n d_out_n
"""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_fast import reference
from perceiver_fast.ops.checks import check_memory
from perceiver_fast.ops.derivatives import differentiable, differentiated_again
from perceiver_fast.ops.library import learns, unless_autocast
from perceiver_fast.ops.linear import LARGE, forward_product, grad_input_product, grad_weight_product
from perceiver_fast.ranges import op_range

OP = "layer_norm_linear"
FEW = 2**21  # normalised numbers, 8 MB: written and read again at little cost
WIDE = 3 * 2**19  # numbers of a weight, 6 MB: what streams the rows through it reads it from memory again and again
PART = 128  # rows of a weight that are added up at a time


def is_wide(rows: int, channels: int, out_channels: int) -> bool:
    """Whether this op is the way to project rows, rather than the kernel of fourier_projection, which keeps a tile of them.

    That kernel normalises a tile of rows in cache and multiplies it with the whole weight, which it has to bring into its
    own order first. It is for many rows and narrow weights. This op is for few rows, and for weights that fill the cache;
    then it may be of any number of rows, as the result is at least as large as the rows.
    """
    if rows * channels * out_channels < LARGE:
        return False
    return rows * channels <= FEW or (channels * out_channels >= WIDE and out_channels >= channels)


def _normalize(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of ``x [n, C]``, and the rows' means and inverse deviations ``[n]``."""
    _, z, mean, rstd = torch.ops.perceiver_fast.layer_norm_forward(x, None, None, gain, shift, eps, x.dtype)
    return z, mean, rstd


class LayerNormLinearFunction(torch.autograd.Function):
    """Saves its inputs, and two numbers a row; nothing of the size of x or of the result."""

    @staticmethod
    def forward(ctx, x, gain, shift, weight, eps):
        z, mean, rstd = _normalize(x, gain, shift, eps)
        ctx.save_for_backward(x, gain, shift, weight, mean, rstd)
        ctx.eps = eps
        return forward_product(z, weight)

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_out):
        x, gain, shift, weight, mean, rstd = ctx.saved_tensors
        eps, needed = ctx.eps, ctx.needs_input_grad[:4]

        def kernel():
            d = d_out.contiguous()
            with unless_autocast(x.device):  # a backward may be called under it
                if needed[0]:
                    return _all_gradients(d, x, gain, shift, weight, mean, rstd, eps, needed[3])
                return None, *_gradients_of_parameters(d, x, gain, shift, weight, eps)

        if differentiated_again():

            def form(x, gain, shift, weight):
                z = reference.add_layer_norm(x, None, None, gain, shift, eps, x.dtype, smooth=True)[1]
                return z @ weight.T

            return *differentiable(kernel, form, (x, gain, shift, weight), (d_out,), needed), None
        return *(grad if need else None for grad, need in zip(kernel(), needed)), None


def _all_gradients(d_out, x, gain, shift, weight, mean, rstd, eps, to_weight):
    """Those of x, gain, shift and weight, as they are of the two layers."""
    d_weight = grad_weight_product(d_out, _normalize(x, gain, shift, eps)[0]) if to_weight else None
    d_z = grad_input_product(d_out, weight)
    d_x, _, d_gain, d_shift, _ = torch.ops.perceiver_fast.layer_norm_backward(
        None, d_z, x, mean, rstd, gain, branch_bias=False
    )
    return d_x, d_gain, d_shift, d_weight


def _gradients_of_parameters(d_out, x, gain, shift, weight, eps):
    """Those of gain, shift and weight: one product."""
    product = grad_weight_product(d_out, _normalize(x, torch.ones_like(gain), torch.zeros_like(shift), eps)[0])
    sums = d_out.sum(0)
    d_weight = (product * gain).addr_(sums, shift)
    # In parts: a library adds up one row after the other, and rounding grows with the length of a sum.
    d_shift = torch.stack([s @ part for s, part in zip(sums.split(PART), weight.split(PART))]).sum(0)
    return product.mul_(weight).sum(0), d_shift, d_weight


@op_range(OP)
def layer_norm_linear_unchecked(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) weight^T`` on the CPU, where the C++ kernels of layer_norm run; inputs are not checked.

    Args:
        x: ``[.., C]``, float32.
        gain, shift: LayerNorm's weight and bias ``[C]``, float32.
        weight: ``[D, C]``, float32.
        eps: LayerNorm's epsilon.

    Returns:
        ``[.., D]``. Differentiable any number of times in all tensors.
    """
    check_memory(OP, gain, shift, weight)
    rows = x.reshape(-1, x.shape[-1])
    if learns(x, gain, shift, weight):
        out = LayerNormLinearFunction.apply(rows, gain, shift, weight, eps)
    else:
        out = forward_product(_normalize(rows, gain, shift, eps)[0], weight)
    return out.view(*x.shape[:-1], -1)
