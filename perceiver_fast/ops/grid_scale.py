"""LayerNorm's scale of every token of a grid, from raw channels and per-axis statistics.

    mu_m = (sum_f x_mf + sum_a C_a mean_a[i_a]) / C
    r_m  = 1 / sqrt((sum_f (x_mf - mu_m)^2 + sum_a (square_a[i_a] + C_a (mean_a[i_a] - mu_m)^2)) / C + eps)

The mean itself is never needed: subtracting it is linear, so the layers centre their weights instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index

import torch
from torch import Tensor

from perceiver_fast import extension, reference
from perceiver_fast.backends import Backend
from perceiver_fast.ops.checks import check_device, check_dtype, check_floating, check_shape
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.ops.library import compute_dtype, cpu_error, kernel_reasons, learns, triton_reasons
from perceiver_fast.ops.pointwise import PointwiseCall
from perceiver_fast.ops.work import no_work
from perceiver_fast.ranges import op_range
from perceiver_fast.reference.grid_scale import grid_deviations

OP = "grid_scale"
CPU_DTYPES = (torch.float32, torch.float64)


def _outputs(feat, axis_mean, axis_square, axis_channels, eps):
    return feat.new_empty(feat.shape[:-1])


def _sample(make, dtype=torch.float32, sizes=(5, 6), features=3):
    statistics = make(sum(sizes), dtype=dtype), make.positive(sum(sizes), dtype=dtype)
    feat = make(2, *sizes, features, dtype=dtype)
    return GridScaleFunction.apply(feat, *statistics, [7] * len(sizes), 1e-5, "kernel")


def _trial(make, dtype):
    statistics = make(43, dtype=dtype), make.positive(43, dtype=dtype)
    return grid_scale(make(2, 3, 40, 3, dtype=dtype), *statistics, [5, 7])


GRID_SCALE = declare(
    OP,
    backends=(
        Backend("cpu", lambda c: kernel_reasons(cpu_error(extension.error), "cpu", c.device, c.dtype, CPU_DTYPES)),
        Backend("triton", lambda call: triton_reasons(call.device, call.dtype)),
        Backend("reference", lambda call: []),
    ),
    call=PointwiseCall,
    operators=(
        Operator(
            "grid_scale_forward(Tensor feat, Tensor axis_mean, Tensor axis_square, SymInt[] axis_channels, float eps) "
            "-> Tensor",
            _outputs,
            work=no_work,
            triton="grid_scale.forward",
        ),
    ),
    sample=_sample,
    trial=_trial,
    variants=({}, dict(dtype=torch.float64, sizes=(7,))),
    instances={"float32": dict(sizes=(224, 224)), "bfloat16, 64 channels": dict(dtype=torch.bfloat16, features=64)},
)


class GridScaleFunction(torch.autograd.Function):
    """The kernel or plain PyTorch forward, with gradients in plain PyTorch, which has all further ones: inputs and codes
    seldom need them.

    Deviations from the mean sum to zero, so the mean counts as a constant: ``d var / d x_f = 2 (x_f - mu) / C``, and
    ``d r / d x_f = -r^3 (x_f - mu) / C``.
    """

    @staticmethod
    def forward(ctx, feat, axis_mean, axis_square, axis_channels, eps, backend):
        scale = _run(backend)(feat, axis_mean, axis_square, axis_channels, eps)
        ctx.save_for_backward(feat, axis_mean, scale)
        ctx.set_materialize_grads(False)
        ctx.axis_channels = axis_channels
        return scale

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_scale):
        feat, axis_mean, scale = ctx.saved_tensors
        if d_scale is None:
            return (None,) * 6
        widths = ctx.axis_channels
        # Multiplied in an order in which no token's magnitude matters: its scale is one over it, d_scale as large as it.
        # A variance that overflowed has a scale of zero, and no gradient.
        of_feat, of_axes = grid_deviations(feat, axis_mean, widths)
        lost = scale == 0
        factor = -(d_scale.masked_fill(lost, 0.0) * scale) * scale / (feat.shape[-1] + sum(widths))
        d_feat = None
        if ctx.needs_input_grad[0]:
            normalized = (of_feat * scale.unsqueeze(-1)).masked_fill(lost.unsqueeze(-1), 0.0)
            d_feat = factor.unsqueeze(-1) * normalized
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return d_feat, None, None, None, None, None
        d_mean, d_square = [], []
        for axis, (width, deviation) in enumerate(zip(widths, of_axes)):
            others = [d for d in range(factor.dim()) if d != axis + 1]
            d_mean.append((factor * (deviation * scale).masked_fill(lost, 0.0)).sum(others) * width)
            d_square.append((factor * scale).sum(others) / 2)
        return d_feat, torch.cat(d_mean), torch.cat(d_square), None, None, None


def _run(backend: str) -> Callable[..., Tensor]:
    return reference.grid_scale if backend == "reference" else torch.ops.perceiver_fast.grid_scale_forward


def grid_scale(
    feat: Tensor, axis_mean: Tensor, axis_square: Tensor, axis_channels: Sequence[int], eps: float = 1e-5
) -> Tensor:
    """LayerNorm's ``1 / sqrt(var + eps)`` of every token ``[feat_m, e_1(i_1), .., e_A(i_A)]``, without building it.

    Args:
        feat: raw channels ``[B, n_1, .., n_A, F]``, floating point.
        axis_mean: ``[n_1 + .. + n_A]``, the mean of every axis code, axes joined in order; the dtype of feat, or float32 beside half precision.
        axis_square: ``[n_1 + .. + n_A]``, the sum of squares of every axis code about its own mean; the same dtypes.
        axis_channels: channels of every axis' code, one int an axis.
        eps: LayerNorm's epsilon, at least 0. Default: 1e-5, torch's.

    Returns:
        ``[B, n_1, .., n_A]``, the dtype of feat; zero, and without a gradient, for a token whose variance overflows.
        Differentiable any number of times in feat, axis_mean and axis_square.

    Raises:
        TypeError, ValueError: a wrong type, dtype, rank, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import grid_scale
        >>> grid_scale(torch.ones(1, 2, 2, 1), torch.zeros(4), torch.full((4,), 2.0), [2, 2]).shape
        torch.Size([1, 2, 2])
    """
    try:
        widths = [index(width) for width in axis_channels]
    except TypeError:
        raise TypeError(f"{OP}: expected axis_channels to be ints, one an axis, got {axis_channels!r}") from None
    _check(feat, axis_mean, axis_square, widths, eps)
    return grid_scale_unchecked(feat, axis_mean, axis_square, widths, eps)


@op_range(OP)
def grid_scale_unchecked(
    feat: Tensor, axis_mean: Tensor, axis_square: Tensor, axis_channels: Sequence[int], eps: float = 1e-5
) -> Tensor:
    """:func:`grid_scale` for callers whose tensors fit each other; they are not checked."""
    if transformed():
        return reference.grid_scale(feat, axis_mean, axis_square, axis_channels, eps)
    backend = GRID_SCALE.require(PointwiseCall(feat.dtype, feat.device))
    if learns(feat, axis_mean, axis_square):
        return GridScaleFunction.apply(feat, axis_mean, axis_square, axis_channels, eps, backend)
    return _run(backend)(feat, axis_mean, axis_square, axis_channels, eps)


def _check(feat, axis_mean, axis_square, widths, eps) -> None:
    check_floating(OP, feat=feat, axis_mean=axis_mean, axis_square=axis_square)
    for name, t in (("axis_mean", axis_mean), ("axis_square", axis_square)):
        check_dtype(OP, name, t, (feat.dtype, compute_dtype(feat.dtype)), "like feat")
        check_device(OP, name, t, feat, "feat")
    if not widths or min(widths) < 0 or max(widths) >= 2**31:
        raise ValueError(f"{OP}: expected axis_channels of at least one axis, ints from 0 on, got {widths}")
    if feat.dim() != len(widths) + 2:
        raise ValueError(
            f"{OP}: expected feat [B, n_1, .., n_A, F] of {len(widths)} axes, as axis_channels has, got shape "
            f"{tuple(feat.shape)}; give one number of channels an axis"
        )
    entries = (sum(feat.shape[1:-1]),)
    check_shape(OP, "axis_mean", axis_mean, entries, "it has an entry for every index of every axis of feat")
    check_shape(OP, "axis_square", axis_square, entries, "it has an entry for every index of every axis of feat")
    if not eps >= 0:
        raise ValueError(f"{OP}: expected eps of at least 0, got {eps}")
