"""What fourier_projection expects of its arguments, said in full when something else comes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from perceiver_fast.ops.checks import check_device, check_floating, check_shape
from perceiver_fast.reference.fourier_projection import LAYOUTS

OP = "fourier_projection"


def check(coords, weight, num_freq_bands, max_freq, feat, bias, norm_eps, layout) -> tuple[float, ...]:
    """Raises TypeError or ValueError with what was expected and got; returns max_freq, one per axis."""
    if layout not in LAYOUTS:
        raise ValueError(f"{OP}: expected layout to be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if not isinstance(num_freq_bands, int) or num_freq_bands < 0:
        raise ValueError(f"{OP}: expected num_freq_bands to be an int of at least 0, got {num_freq_bands!r}")
    if norm_eps is not None and not norm_eps >= 0:
        raise ValueError(f"{OP}: expected norm_eps to be None or at least 0, got {norm_eps!r}")
    optional = {name: t for name, t in (("feat", feat), ("bias", bias)) if t is not None}
    check_floating(OP, weight=weight, **optional)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"{OP}: expected weight [C, D] with D at least 1, got shape {tuple(weight.shape)}")
    batch, tokens, axes = _check_coords(coords, weight)
    for name, t in optional.items():
        check_device(OP, name, t, weight, "weight")
    features = 0
    if feat is not None:
        if feat.dim() != 3 or feat.shape[1] != tokens or (batch != 1 and feat.shape[0] != batch):
            expected = f"[{'B' if batch == 1 else batch}, {tokens}, F]"
            raise ValueError(
                f"{OP}: expected feat {expected} for the positions given by coords, got shape {tuple(feat.shape)}"
            )
        features = feat.shape[2]
    channels = features + axes * (2 * num_freq_bands + 1)
    if weight.shape[0] != channels:
        raise ValueError(
            f"{OP}: expected weight [C, D] with C = F + A (2 num_freq_bands + 1) = {features} + {axes} * "
            f"{2 * num_freq_bands + 1} = {channels} rows, got shape {tuple(weight.shape)}"
            + ("; is it a Linear's weight, to be transposed?" if weight.shape[1] == channels else "")
        )
    if bias is not None:
        check_shape(OP, "bias", bias, (weight.shape[1],), "it is added to the outputs of weight")
    return _check_max_freq(max_freq, axes)


def _check_coords(coords, weight) -> tuple[int, int, int]:
    """Batch size (1: shared), tokens and axes."""
    if isinstance(coords, Tensor):
        if not coords.is_floating_point():  # they are computed with in float64
            raise TypeError(
                f"{OP}: expected coords to be floating point, got {coords.dtype}; convert it with .double()"
            )
        check_device(OP, "coords", coords, weight, "weight")
        if coords.dim() not in (2, 3) or coords.shape[-1] == 0:
            raise ValueError(
                f"{OP}: expected coords [B, M, A] or [M, A] with at least one axis, got shape {tuple(coords.shape)}"
            )
        batch = coords.shape[0] if coords.dim() == 3 else 1
        return batch, coords.shape[-2], coords.shape[-1]
    if not isinstance(coords, Sequence) or isinstance(coords, str) or not all(isinstance(n, int) for n in coords):
        raise TypeError(
            f"{OP}: expected coords to be a tensor, or a tuple of ints (the sizes of a grid), got {coords!r}"
        )
    if len(coords) == 0 or min(coords) < 1:
        raise ValueError(f"{OP}: expected a grid of at least one axis and sizes of at least 1, got {tuple(coords)}")
    return 1, math.prod(coords), len(coords)


def _check_max_freq(max_freq, axes: int) -> tuple[float, ...]:
    per_axis = tuple(max_freq) if isinstance(max_freq, Sequence) else (max_freq,) * axes
    if len(per_axis) != axes:
        raise ValueError(
            f"{OP}: expected max_freq to be one number or one for each of the {axes} axes, got {len(per_axis)}: "
            f"{max_freq!r}"
        )
    for value in per_axis:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{OP}: expected max_freq to be finite, a float or one per axis, got {max_freq!r}")
    return tuple(float(value) for value in per_axis)
