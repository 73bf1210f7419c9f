"""LayerNorm's per-token scale for tokens on a grid, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def grid_scale(
    feat: Tensor, axis_mean: Tensor, axis_square: Tensor, axis_channels: Sequence[int], eps: float
) -> Tensor:
    """``1 / sqrt(var + eps)`` of every token ``[feat_m, e_1(i_1), .., e_A(i_A)]``, without building it.

    The variance is a sum of squares about the mean, part by part, so nothing cancels:
    ``C var = sum_f (x_f - mu)^2 + sum_a (square_a[i_a] + C_a (mean_a[i_a] - mu)^2)``.

    Args:
        feat: raw channels ``[B, *sizes, F]``.
        axis_mean: ``[sum(sizes)]``, the mean of every axis code.
        axis_square: ``[sum(sizes)]``, the sum of squares of every axis code about its mean.
        axis_channels: channels of every axis code, C_a.
        eps: LayerNorm's epsilon.

    Returns:
        ``[B, *sizes]``, the dtype of feat.
    """
    channels = feat.shape[-1] + sum(axis_channels)
    of_feat, of_axes = grid_deviations(feat, axis_mean, axis_channels)
    total = of_feat.square().sum(-1)
    for width, deviation, square in zip(axis_channels, of_axes, along_axes(axis_square, feat)):
        total = total + square + width * deviation.square()
    return 1 / (total / channels + eps).sqrt()  # rsqrt's derivative has its cube, which underflows far from zero


def grid_deviations(feat: Tensor, axis_mean: Tensor, axis_channels: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """What the mean mu over a token's channels leaves of them, where that is little, too.

    Returns:
        ``feat - mu [B, *sizes, F]``, and for every axis ``mean_a - mu [B, *sizes]``.
    """
    features, axes = feat.shape[-1], along_axes(axis_mean, feat)
    # Two steps: less the mean of the raw channels, then less what the mean of all is from there.
    shift = (feat.detach() * (1 / max(features, 1))).sum(-1)
    feat, axes = feat - shift.unsqueeze(-1), [mean - shift for mean in axes]
    total = feat.sum(-1) + sum(width * mean for width, mean in zip(axis_channels, axes))
    mu = total / (features + sum(axis_channels))
    return feat - mu.unsqueeze(-1), [mean - mu for mean in axes]


def along_axes(joined: Tensor, feat: Tensor) -> list[Tensor]:
    """Split ``[sum(sizes)]`` by axis, each part shaped to broadcast along its axis of ``[B, *sizes]``."""
    sizes = feat.shape[1:-1]
    parts = joined.split(list(sizes))
    return [part.view([-1 if a == axis else 1 for a in range(len(sizes))]) for axis, part in enumerate(parts)]
