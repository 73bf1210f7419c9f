"""LayerNorm's scale of every token of a grid in one pass over its raw channels."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.kernels.checks import HALF_OR_FLOAT, Check
from perceiver_fast.kernels.launch import Launch

CHECK = Check("grid_scale")
ELEMENTS = 2048  # of a program's tile of tokens x channels


@triton.jit
def grid_scale_kernel(
    feat, axis_mean, axis_square, scale, tokens, eps,
    AXES: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, FS: tl.constexpr,
):  # fmt: skip
    """``1 / sqrt(var + eps)`` of BLOCK tokens.

        C var = sum_f (x_f - mu)^2 + sum_a (square_a[i_a] + C_a (mean_a[i_a] - mu)^2)

    Grid: a program for BLOCK tokens.

        feat                    [tokens, F]   in   fp32, fp16 or bf16, dense
        axis_mean, axis_square  [entries]     in   fp32, fp16 or bf16, axes joined in order
        scale                   [tokens]      out  dtype of feat

        tokens  all of them, batch and grid in row-major order
        eps     LayerNorm's
        AXES    of every axis, the last first: its size, channels C_a of its code, and where its entries begin
        F, C    raw channels of a token, and all of its channels
        FS      power of two, at least F

    The mean is taken off in two steps, as the reference does: first the mean of the raw channels, then what is left.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = tl.arange(0, FS)
    there = token < tokens
    inside = there[:, None] & (f < F)[None, :]
    x = tl.load(feat + token[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
    shift = tl.sum(x * (1 / max(F, 1)), 1)  # a sum alone could overflow
    x = tl.where(inside, x - shift[:, None], 0.0)
    mu = tl.sum(x, 1)
    means, squares = (), tl.zeros([BLOCK], tl.float32)
    rest = token
    for a in tl.static_range(len(AXES)):
        at = AXES[a][2] + rest % AXES[a][0]
        rest = rest // AXES[a][0]
        mean = tl.load(axis_mean + at, mask=there, other=0.0).to(tl.float32) - shift
        squares += tl.load(axis_square + at, mask=there, other=0.0).to(tl.float32)
        mu += AXES[a][1] * mean
        means = means + (mean,)
    mu = mu / C
    x = tl.where(inside, x - mu[:, None], 0.0)
    squares += tl.sum(x * x, 1)
    for a in tl.static_range(len(AXES)):
        squares += AXES[a][1] * (means[a] - mu) * (means[a] - mu)
    tl.store(scale + token, (1 / tl.sqrt(squares / C + eps)).to(scale.dtype.element_ty), mask=there)


def forward(feat: Tensor, axis_mean: Tensor, axis_square: Tensor, axis_channels: list[int], eps: float) -> Tensor:
    """Kernel of the operator ``grid_scale_forward``: see :mod:`perceiver_fast.ops.grid_scale`.

    Raises:
        RuntimeError: another dtype or size.
    """
    sizes, widths = tuple(feat.shape[1:-1]), tuple(axis_channels)
    CHECK.expect(feat.dim() >= 3, "feat [B, *sizes, F] of at least one axis", f"shape {list(feat.shape)}")
    CHECK.expect(len(widths) == len(sizes) and min(widths) >= 0, "axis_channels of every axis", list(widths))
    CHECK.dtype("feat", feat, *HALF_OR_FLOAT)
    for name, t in (("axis_mean", axis_mean), ("axis_square", axis_square)):
        CHECK.dtype(name, t, *HALF_OR_FLOAT)
        CHECK.shape(name, t, (sum(sizes),), "[sum(sizes)]")
    CHECK.eps(eps)
    scale, features = feat.new_empty(feat.shape[:-1]), feat.shape[-1]
    if scale.numel() == 0:
        return scale
    axes = tuple((size, width, sum(sizes[:a])) for a, (size, width) in enumerate(zip(sizes, widths)))
    power = triton.next_power_of_2(max(features, 1))
    block = max(1, min(256, ELEMENTS // power))
    arguments = dict(
        feat=feat.contiguous(), axis_mean=axis_mean.contiguous(), axis_square=axis_square.contiguous(), scale=scale,
        tokens=scale.numel(), eps=eps, AXES=axes[::-1], F=features, C=features + sum(widths), BLOCK=block,
        FS=power,
    )  # fmt: skip
    Launch(grid_scale_kernel, math.ceil(scale.numel() / block), arguments).run()
    return scale
