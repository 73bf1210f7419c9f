"""LayerNorm and the linear layer after it, for few rows or wide weights: ``(normalised x * gain + shift) weight^T``.

A product that takes less time than the calls that ask for it runs in C++ kernels of its own, forward and backward one call
each. A large one runs on the library that is fastest here (ops/linear.py). The normalised rows exist while they are multiplied,
in the forward and again in the backward; what is saved is what came in, and their statistics. Where x has no gradient,
those of gain and shift need no product of their own: with ``G = d_out^T z`` of the normalised z,

    d_weight = G gain + sum_n d_out_n shift^T        d_gain = column sums of weight * G        d_shift = weight^T sum_n d_out_n
"""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_fast import reference
from perceiver_fast.ops.checks import check_alike, check_memory, check_shape
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import differentiable, differentiated_again
from perceiver_fast.ops.latent_layers import CPU_BACKENDS
from perceiver_fast.ops.library import learns, unless_autocast
from perceiver_fast.ops.linear import LARGE, forward_product, grad_input_product, grad_weight_product
from perceiver_fast.ops.pointwise import PointwiseCall, runs_kernel
from perceiver_fast.ops.work import Work
from perceiver_fast.ranges import op_range

OP = "layer_norm_linear"
FEW = 2**21  # normalised numbers, 8 MB: written and read again at little cost
WIDE = 3 * 2**19  # numbers of a weight, 6 MB: what streams the rows through it reads it from memory again and again
PART = 128  # rows of a weight that are added up at a time


def is_small(rows: int, channels: int, out_channels: int) -> bool:
    """Whether the product takes so little time that it runs in kernels of this op."""
    return rows * channels * out_channels < LARGE


def is_for(rows: int, channels: int, out_channels: int, dtype: torch.dtype) -> bool:
    """Whether this op is the way to project rows, rather than the kernel of fourier_projection, which keeps a tile of them.

    That kernel normalises a tile of rows in cache and multiplies it with the whole weight, which it has to bring into its
    own order first. It is for many rows and narrow weights. This op is for little work, and on a library for few rows, and
    for weights that fill the cache; then it may be of any number of rows, as the result is at least as large as the rows.
    """
    if rows * channels * out_channels == 0 or channels == 1:  # one channel is normalised to zero, whatever it is
        return False
    if is_small(rows, channels, out_channels):
        return dtype in (torch.float32, torch.float64)
    if dtype != torch.float32:
        return False
    return rows * channels <= FEW or (channels * out_channels >= WIDE and out_channels >= channels)


def _work(x, weight) -> Work:
    return Work(x[0] * x[1] * weight[0])


def _sample(make, dtype=torch.float32, rows=70, channels=6, out_channels=10, learns=True):
    x = make(rows, channels, dtype=dtype)
    parameters = [make(*shape, dtype=dtype) for shape in ((channels,), (channels,), (out_channels, channels))]
    return FewRowsFunction.apply(x if learns else x.detach(), *parameters, 1e-5)


LAYER_NORM_LINEAR = declare(
    OP,
    backends=CPU_BACKENDS,
    call=PointwiseCall,
    operators=(
        Operator(
            "layer_norm_linear_forward(Tensor x, Tensor gain, Tensor shift, Tensor weight, float eps) -> Tensor out",
            lambda x, gain, shift, weight, eps: x.new_empty((x.shape[0], weight.shape[0])),
            work=lambda x, gain, shift, weight, eps: _work(x, weight),
        ),
        Operator(
            "layer_norm_linear_backward(Tensor d_out, Tensor x, Tensor gain, Tensor shift, Tensor weight, float eps, "
            "bool to_x) -> (Tensor d_x, Tensor d_gain, Tensor d_shift, Tensor d_weight)",
            lambda d_out, x, gain, shift, weight, eps, to_x: (
                x.new_empty((x.shape[0] if to_x else 0, x.shape[1])),
                *(p.new_empty(p.shape) for p in (gain, shift, weight)),
            ),
            work=lambda d_out, x, gain, shift, weight, *_: Work(2 * _work(x, weight).multiply_adds),
        ),
    ),
    sample=_sample,
    variants=({}, dict(dtype=torch.float64, rows=1, learns=False)),
)


class FewRowsFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves its inputs."""

    @staticmethod
    def forward(ctx, x, gain, shift, weight, eps):
        ctx.save_for_backward(x, gain, shift, weight)
        ctx.eps = eps
        return torch.ops.perceiver_fast.layer_norm_linear_forward(x, gain, shift, weight, eps)

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_out):
        leaves, eps, needed = ctx.saved_tensors, ctx.eps, ctx.needs_input_grad[:4]

        def kernel():
            return torch.ops.perceiver_fast.layer_norm_linear_backward(d_out, *leaves, eps, needed[0])

        grads = differentiable(kernel, _form(eps), leaves, (d_out,), needed) if differentiated_again() else kernel()
        return *(grad if need else None for grad, need in zip(grads, needed)), None


def _form(eps):
    """The function in plain PyTorch, which derivatives beyond the first are taken of."""
    return lambda x, gain, shift, weight: reference.layer_norm_linear(x, gain, shift, weight, eps)


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
            return *differentiable(kernel, _form(eps), (x, gain, shift, weight), (d_out,), needed), None
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


def layer_norm_linear(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """``LayerNorm(x) weight^T``, whose backward normalises again rather than save what it normalised.

    Args:
        x: ``[.., C]``, floating point.
        gain, shift: LayerNorm's weight and bias ``[C]``, the dtype of x.
        weight: of the linear layer, ``[D, C]``, the dtype of x.
        eps: LayerNorm's epsilon, more than 0. Default: 1e-5.

    Returns:
        ``[.., D]``, the dtype of x. Differentiable any number of times in all tensors. Half precision runs in plain PyTorch.

    Raises:
        TypeError, ValueError: wrong dtype, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import layer_norm_linear
        >>> layer_norm_linear(torch.randn(2, 30, 8), torch.ones(8), torch.zeros(8), torch.randn(12, 8)).shape
        torch.Size([2, 30, 12])
    """
    check_alike(OP, x=x, gain=gain, shift=shift, weight=weight)
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not eps > 0:
        raise ValueError(
            f"{OP}: expected x [.., C], a weight [D, C] and eps above 0, got {tuple(x.shape)}, {tuple(weight.shape)} and {eps}; "
            "give both the same channels"
        )
    for name, t in (("gain", gain), ("shift", shift)):
        check_shape(OP, name, t, x.shape[-1:], "give one number for every channel of x")
    if x.numel() == 0 or weight.numel() == 0 or not runs_kernel(LAYER_NORM_LINEAR, x.dtype, x.device):
        return reference.layer_norm_linear(x, gain, shift, weight, eps)
    return layer_norm_linear_unchecked(x, gain, shift, weight, eps)


@op_range(OP)
def layer_norm_linear_unchecked(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) weight^T`` on the CPU, where the C++ kernels run; inputs are not checked.

    Args:
        x: ``[.., C]``, not empty, float32 or float64.
        gain, shift: LayerNorm's weight and bias ``[C]``, the dtype of x.
        weight: ``[D, C]``, the dtype of x.
        eps: LayerNorm's epsilon, more than 0.

    Returns:
        ``[.., D]``. Differentiable any number of times in all tensors.
    """
    check_memory(OP, gain, shift, weight)
    rows = x.reshape(-1, x.shape[-1])
    if is_small(rows.shape[0], rows.shape[1], len(weight)):
        if learns(x, gain, shift, weight):
            out = FewRowsFunction.apply(rows, gain, shift, weight, eps)
        else:
            out = torch.ops.perceiver_fast.layer_norm_linear_forward(rows, gain, shift, weight, eps)
    elif learns(x, gain, shift, weight):
        out = LayerNormLinearFunction.apply(rows, gain, shift, weight, eps)
    else:
        out = forward_product(_normalize(rows, gain, shift, eps)[0], weight)
    return out.view(*x.shape[:-1], -1)
