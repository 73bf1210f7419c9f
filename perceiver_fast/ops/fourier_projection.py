"""Fourier position encoding fused with the projection after it: the encoding of all tokens never exists.

A token's code is its raw channels and, for every axis, sines, cosines and the position itself,

    z_m = [feat_m ; for every axis a: sin(pi f_ak p_ma) for k ; cos(pi f_ak p_ma) for k ; p_ma]
    out_m = r_m z_m W + bias

C = F + A (2 K + 1) channels. Kernels compute the codes of a few tokens at a time, in cache, right before the product,
and again in the backward; what is saved is what came in, and r. With LayerNorm r_m = 1 / sqrt(var(z_m) + eps), else 1;
its mean is taken out of W, over its rows, as subtracting it is linear. The CPU kernels take a mean out of the features,
too: their products would lose their digits far from zero.

On a grid of several axes a position's part of the product is a sum of per-axis tables ``T_a = e_a W_a``, n_1 + .. + n_A
rows in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from perceiver_fast import extension, reference
from perceiver_fast.backends import Backend
from perceiver_fast.float64 import float64_device, has_float64, in_float64
from perceiver_fast.ops import blocks
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import differentiable, differentiated_again, transformed
from perceiver_fast.ops.fourier_projection_checks import check
from perceiver_fast.ops.grid_scale import grid_scale_unchecked
from perceiver_fast.ops.library import compute_dtype, kernel_reasons, projected_dtype, unless_autocast
from perceiver_fast.ops.pointwise import PointwiseCall
from perceiver_fast.ops.work import Shape, Work
from perceiver_fast.ranges import op_range

OP = "fourier_projection"


def _forward_work(feat: Shape | None, coords: Shape, frequencies: Shape, weight: Shape) -> Work:
    """feat ``[B, M, F]``, coords ``[B or 1, M, A]``, frequencies ``[A, K]``, weight ``[C, D]``."""
    tokens = prod((coords if feat is None else feat)[:2])
    return Work(tokens * prod(weight), 2 * prod(coords[:2]) * prod(frequencies))


def _backward_work(feat, coords, frequencies, weight, token_grads) -> Work:
    """The gradient of weight, and with token_grads the tokens': a product each."""
    forward = _forward_work(feat, coords, frequencies, weight)
    return Work(forward.multiply_adds * (1 + token_grads), forward.exponentials)


def _forward_outputs(feat, coords, frequencies, weight, bias, eps):
    tokens = (coords if feat is None else feat).shape[:2]
    return weight.new_empty((*tokens, weight.shape[1])), weight.new_empty((0,) if eps is None else tokens)


def _backward_outputs(d_out, feat, coords, frequencies, weight, scale, eps, token_grads):
    dfeat = weight.new_empty(feat.shape if token_grads and feat is not None else (0,))
    return weight.new_empty(weight.shape), dfeat, coords.new_empty(coords.shape if token_grads else (0,))


def _sample(make, dtype=torch.float32, tokens=7, axes=2, bands=3, features=3, width=8, eps=1e-5, token_grads=True):
    coords, frequencies = make(2, tokens, axes, dtype=torch.float64), make(axes, bands, dtype=torch.float64).detach()
    weight = make(features + axes * (2 * bands + 1), width, dtype=dtype)
    feat, bias = make(2, tokens, features, dtype=dtype) if features else None, make(width, dtype=dtype)
    if not token_grads:
        feat, coords = feat.detach(), coords.detach()
    return FourierProjectionFunction.apply(feat, coords, frequencies, weight, bias, eps)


def _trial(make, dtype):
    coords, frequencies = make(2, 70, 2, dtype=torch.float64), make.numbers(2, 3, dtype=torch.float64)
    feat, weight, bias = make(2, 70, 3, dtype=dtype), make(17, 24, dtype=dtype), make(24, dtype=dtype)
    return fourier_projection_unchecked(feat, coords, frequencies, weight, bias, 1e-5)


FOURIER_PROJECTION = declare(
    OP,
    backends=(
        Backend("cpu", lambda call: kernel_reasons(extension.error, "cpu", call.device, call.dtype)),
        Backend("cuda", lambda call: kernel_reasons(extension.cuda_error, "cuda", call.device, call.dtype)),
        Backend("reference", lambda call: []),
    ),
    call=PointwiseCall,
    operators=(
        Operator(
            "fourier_projection_forward(Tensor? feat, Tensor coords, Tensor frequencies, Tensor weight, Tensor? bias, "
            "float? eps) -> (Tensor out, Tensor scale)",
            _forward_outputs,
            work=lambda *a: _forward_work(*a[:4]),
        ),
        Operator(
            "fourier_projection_backward(Tensor d_out, Tensor? feat, Tensor coords, Tensor frequencies, Tensor weight, "
            "Tensor scale, float? eps, bool token_grads) -> (Tensor dweight, Tensor dfeat, Tensor dcoords)",
            _backward_outputs,
            work=lambda *a: _backward_work(a[1], a[2], a[3], a[4], token_grads=a[7]),
        ),
    ),
    sample=_sample,
    trial=_trial,
    variants=({}, dict(eps=None, features=0), dict(token_grads=False), dict(dtype=torch.float64, tokens=70)),
    kernels="(fourier_.*|add_parts)_kernel",
)


class FourierProjectionFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves its inputs and the scale, nothing of size M x C."""

    @staticmethod
    def forward(ctx, feat, coords, frequencies, weight, bias, eps):
        out, scale = torch.ops.perceiver_fast.fourier_projection_forward(feat, coords, frequencies, weight, bias, eps)
        ctx.save_for_backward(feat, coords, frequencies, weight, scale)
        ctx.eps = eps
        return out

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_out):
        feat, coords, frequencies, weight, scale = ctx.saved_tensors
        eps, (to_feat, to_coords, _, to_weight, to_bias, _) = ctx.eps, ctx.needs_input_grad

        def kernel():
            dweight, dfeat, dcoords = torch.ops.perceiver_fast.fourier_projection_backward(
                d_out, feat, coords, frequencies, weight, scale, eps, to_feat or to_coords
            )
            return dfeat if to_feat else None, dcoords if to_coords else None, dweight

        dfeat = dcoords = dweight = None
        if to_feat or to_coords or to_weight:
            if differentiated_again():

                def form(feat, coords, weight):
                    return blocks.fourier_projection(feat, coords, frequencies, weight, None, eps)

                needed = to_feat, to_coords, to_weight
                dfeat, dcoords, dweight = differentiable(kernel, form, (feat, coords, weight), (d_out,), needed)
            else:
                dfeat, dcoords, dweight = kernel()
        return dfeat, dcoords, None, dweight if to_weight else None, d_out.sum((0, 1)) if to_bias else None, None


def centred(weight: Tensor, channels: int) -> Tensor:
    """``weight`` less its mean over dimension ``channels``: centring a projection is the same as centring what it projects.

    The mean is taken in float64. A token far from zero multiplies what a mean in float32 leaves of the sum.
    """
    if has_float64(weight.device):
        return weight - weight.mean(channels, keepdim=True, dtype=torch.float64).to(weight.dtype)
    centred = weight - weight.mean(channels, keepdim=True)
    return centred - centred.mean(channels, keepdim=True)  # what the first mean was rounded by


@op_range(OP)
def fourier_projection_unchecked(
    feat: Tensor | None,
    coords: Tensor,
    frequencies: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """:func:`fourier_projection` at given positions and frequencies; inputs are not checked.

    Args:
        feat: ``[B, M, F]`` or None.
        coords: float64 ``[Bc, M, A]``, Bc = 1 or B; on the CPU if the device has no float64.
        frequencies: float64 ``[A, K]``, in half periods a unit of position; where coords are.
        weight: ``[C, D]``, rows feat, then for every axis sines, cosines, position. It need not be centred.
        bias: ``[D]`` or None.
        eps: LayerNorm's epsilon, or None for no LayerNorm.

    Returns:
        ``[B, M, D]``, the dtype of weight, or autocast's when it is on.
    """
    device, compute = weight.device, compute_dtype(weight.dtype)
    result = projected_dtype(weight)
    backend = "blocks" if transformed() else FOURIER_PROJECTION.require(PointwiseCall(weight.dtype, device))
    with unless_autocast(device):
        feat, bias = (None if t is None else t.to(compute) for t in (feat, bias))
        weight = weight.to(compute)
        if backend == "blocks":
            out = blocks.fourier_projection(feat, coords, frequencies, weight, bias, eps)
        elif backend == "reference":
            out = reference.fourier_projection(feat, coords, frequencies, weight, bias, eps)
        else:
            weight = weight if eps is None else centred(weight, 0)
            out = FourierProjectionFunction.apply(feat, coords, frequencies, weight, bias, eps)
    return out.to(result)


def _on_grid(
    feat: Tensor | None,
    positions: list[Tensor],
    frequencies: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float | None,
) -> Tensor:
    """The projection on a grid of these positions, from the tables of its axes; all in the dtype of weight."""
    sizes, axis_channels = [len(p) for p in positions], 2 * frequencies.shape[1] + 1
    if eps is not None:
        weight = centred(weight, 0)
    feat_weight, *axis_weights = weight.split([0 if feat is None else feat.shape[-1]] + [axis_channels] * len(sizes))
    total = bias if eps is None and bias is not None else weight.new_zeros(weight.shape[1])
    for axis, (position, w) in enumerate(zip(positions, axis_weights)):
        table = fourier_projection_unchecked(None, position.view(1, -1, 1), frequencies[axis : axis + 1], w)[0]
        total = total.unsqueeze(-2) + table  # [n_1, .., n_axis, D]
    # In place: [B, M, D] is large here, and a fresh one costs more than the arithmetic on it.
    fresh = not transformed()  # which may batch one operand and not the other
    out = total.unsqueeze(0)
    if feat is not None:
        out = feat.unflatten(1, sizes) @ feat_weight
        out = out.add_(total) if fresh else out + total
    if eps is not None:
        codes = [reference.fourier_encode(p.unsqueeze(1), f) for p, f in zip(positions, frequencies.split(1))]
        mean = torch.cat([code.mean(1) for code in codes])
        square = torch.cat([code.var(1, unbiased=False) * axis_channels for code in codes])
        raw = weight.new_zeros(1, *sizes, 0) if feat is None else feat.unflatten(1, sizes)
        widths = [axis_channels] * len(sizes)
        scale = grid_scale_unchecked(raw, mean.to(weight), square.to(weight), widths, eps).unsqueeze(-1)
        # The gradient of scale needs what is multiplied.
        out = out.mul_(scale) if fresh and not scale.requires_grad else out * scale
        if bias is not None:
            out = out.add_(bias) if fresh else out + bias
    return out.flatten(1, -2)


def _in_kernel_order(weight: Tensor, axes: int, bands: int, layout: str) -> Tensor:
    """Rows in the order of another layout, feat first, brought into the order of the kernels."""
    features = weight.shape[0] - axes * (2 * bands + 1)
    waves = [axes * bands, axes * bands]
    if layout == "deepmind":
        feat, position, sine, cosine = weight.split([features, axes, *waves])
    else:
        feat, sine, cosine, position = weight.split([features, *waves, axes])
    per_axis = [sine.unflatten(0, (axes, bands)), cosine.unflatten(0, (axes, bands)), position.unsqueeze(1)]
    return torch.cat([feat, torch.cat(per_axis, 1).flatten(0, 1)])


@op_range(OP)
def fourier_projection(
    coords: Tensor | Sequence[int],
    weight: Tensor,
    *,
    num_freq_bands: int,
    max_freq: float | Sequence[float],
    feat: Tensor | None = None,
    bias: Tensor | None = None,
    norm_eps: float | None = None,
    layout: str = "perceiver-pytorch",
) -> Tensor:
    """``LayerNorm([feat, fourier_encode(coords)]) weight + bias`` without the M x C encoding.

    Args:
        coords: positions ``[B, M, A]``, or ``[M, A]`` when the whole batch shares them; floating point, and computed
            with in float64. Or the sizes of a grid, a tuple of ints: then positions are evenly spaced in [-1, 1] along
            every axis and M, their product, runs in row-major order.
        weight: ``[C, D]``, C = F + A (2 num_freq_bands + 1).
        num_freq_bands: frequencies an axis, K; may be 0.
        max_freq: frequencies are evenly spaced in [1, max_freq / 2]. One number, or one per axis.
        feat: raw channels ``[B, M, F]``. Default: none, F = 0.
        bias: ``[D]``. Default: none.
        norm_eps: epsilon of a LayerNorm (without affine part) of the whole token before the projection. Default: no
            LayerNorm.
        layout: order of the rows of weight. ``"perceiver-pytorch"`` (default): feat, then for every axis K sines,
            K cosines and the position. ``"deepmind"``, that of transformers' Perceiver: feat, then the positions of
            all axes, the sines of all axes and the cosines of all axes. ``"vecset"``, 3DShape2VecSet's: feat, sines,
            cosines, positions.

    Returns:
        ``[B, M, D]``, the dtype of weight, or autocast's when it is on; B = 1 when neither coords nor feat has a batch.
        float64 weights are computed in float64, all others in float32; sines and cosines are those of phases in
        float64 either way. Differentiable any number of times in coords, feat, weight and bias.

    Raises:
        TypeError, ValueError: a wrong type, dtype, rank, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Source:
        Jaegle et al., "Perceiver", ICML 2021, sec. 3.2; perceiver-pytorch 0.11.0, ``fourier_encode``; transformers,
        ``generate_fourier_features``. The fusion is this package's.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import fourier_projection
        >>> points, colours = torch.rand(2, 1000, 3), torch.rand(2, 1000, 4)
        >>> weight = torch.randn(4 + 3 * (2 * 6 + 1), 32)
        >>> fourier_projection(points, weight, num_freq_bands=6, max_freq=10.0, feat=colours, norm_eps=1e-5).shape
        torch.Size([2, 1000, 32])
        >>> fourier_projection((8, 9), torch.randn(26, 32), num_freq_bands=6, max_freq=(8.0, 9.0)).shape
        torch.Size([1, 72, 32])
    """
    max_freqs = check(coords, weight, num_freq_bands, max_freq, feat, bias, norm_eps, layout)
    device = weight.device

    def spaced(low: float, high: float, count: int) -> Tensor:
        return torch.linspace(low, high, count, dtype=torch.float64, device="cpu").to(float64_device(device))

    frequencies = torch.stack([spaced(1.0, highest / 2, num_freq_bands) for highest in max_freqs])
    if layout != "perceiver-pytorch":
        weight = _in_kernel_order(weight, len(max_freqs), num_freq_bands, layout)
    if isinstance(coords, Tensor):
        coords = in_float64(coords if coords.dim() == 3 else coords.unsqueeze(0))
        return fourier_projection_unchecked(feat, coords, frequencies, weight, bias, norm_eps)
    positions = [spaced(-1.0, 1.0, size) for size in coords]
    if len(positions) == 1:
        return fourier_projection_unchecked(feat, positions[0].view(1, -1, 1), frequencies, weight, bias, norm_eps)
    compute = compute_dtype(weight.dtype)
    result = projected_dtype(weight)
    with unless_autocast(device):
        feat, bias = (None if t is None else t.to(compute) for t in (feat, bias))
        weight = weight.to(compute)
        return _on_grid(feat, positions, frequencies, weight, bias, norm_eps).to(result)
