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
    mu = grid_mean(feat, axis_mean, axis_channels)
    total = (feat - mu.unsqueeze(-1)).square().sum(-1)
    for width, mean, square in zip(axis_channels, along_axes(axis_mean, feat), along_axes(axis_square, feat)):
        total = total + square + width * (mean - mu).square()
    return (total / channels + eps).rsqrt()


def grid_mean(feat: Tensor, axis_mean: Tensor, axis_channels: Sequence[int]) -> Tensor:
    """Mean over the channels of every token, ``[B, *sizes]``."""
    axes = sum(width * mean for width, mean in zip(axis_channels, along_axes(axis_mean, feat)))
    return (feat.sum(-1) + axes) / (feat.shape[-1] + sum(axis_channels))


def along_axes(joined: Tensor, feat: Tensor) -> list[Tensor]:
    """Split ``[sum(sizes)]`` by axis, each part shaped to broadcast along its axis of ``[B, *sizes]``."""
    sizes = feat.shape[1:-1]
    parts = joined.split(list(sizes))
    return [part.view([-1 if a == axis else 1 for a in range(len(sizes))]) for axis, part in enumerate(parts)]
