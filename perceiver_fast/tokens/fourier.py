"""Fourier position codes of one axis.

``e(i) = [sin(pi f_k p_i) for k] + [cos(pi f_k p_i) for k] + [p_i]`` with p_i evenly spaced in [-1, 1] and the K
frequencies f_k evenly spaced in [1, max_freq / 2], as in perceiver-pytorch. Computed in float64 and then rounded: at
high frequencies sin(pi f p) loses digits in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

_CACHE_SIZE = 64
_cache: dict[tuple, AxisCodes] = {}
_uses_cache: ContextVar[bool] = ContextVar("uses_cache", default=True)


@contextmanager
def uncached() -> Iterator[None]:
    """Codes that are asked for inside, in this thread, are computed anew: for whoever counts what they cost."""
    token = _uses_cache.set(False)
    try:
        yield
    finally:
        _uses_cache.reset(token)


class AxisCodes(NamedTuple):
    """Codes of every index of one axis, and their statistics for LayerNorm."""

    code: Tensor  # [n, 2K + 1]
    mean: Tensor  # [n], over the channels
    square: Tensor  # [n], sum of squares about the mean


def evenly_spaced(size: int, start: int = 0, stop: int | None = None) -> Tensor:
    """``size`` positions from -1 to 1, or those from ``start`` to ``stop``: float64, on the CPU, as some devices have none."""
    whole = start == 0 and (stop is None or stop == size)
    if whole and not torch.compiler.is_exporting():
        return torch.linspace(-1.0, 1.0, size, dtype=torch.float64, device="cpu")
    # The same numbers, to the last digit but one, for any size and part: an exported linspace is for one.
    index = torch.arange(start, size if stop is None else stop, dtype=torch.float64, device="cpu")
    last = index[-1:] if whole else torch.tensor([size - 1.0], dtype=torch.float64)
    step = 2 / last.clamp_min(1)
    return torch.where((2 * index < last) | (last == 0), step * index - 1, 1 - step * (last - index))


def _compute(size: int, num_bands: int, max_freq: float, dtype: torch.dtype, device: torch.device) -> AxisCodes:
    position = evenly_spaced(size).unsqueeze(1)
    frequency = torch.linspace(1.0, max_freq / 2, num_bands, dtype=torch.float64, device="cpu")
    angle = position * frequency * math.pi
    code = torch.cat([angle.sin(), angle.cos(), position], 1)
    mean = code.mean(1)
    square = (code - mean.unsqueeze(1)).square().sum(1)
    return AxisCodes(*(t.to(device, dtype) for t in (code, mean, square)))


def _cached(size: int, num_bands: int, max_freq: float, dtype: torch.dtype, device: torch.device) -> AxisCodes:
    key = (size, num_bands, max_freq, dtype, device)
    if _uses_cache.get() and (codes := _cache.get(key)) is not None:
        return codes
    with torch.inference_mode(False), torch.no_grad():  # usable in training whatever mode it was first asked for in
        codes = _compute(*key)
    if type(codes.code) is Tensor:  # not a fake tensor of some tracer
        _cache[key] = codes
        if len(_cache) > _CACHE_SIZE:
            _cache.pop(next(iter(_cache)), None)  # the oldest
    return codes


# Under torch.compile the cache hides behind an op; it returns copies, since a compiled graph owns its outputs. Exported
# programs have torch's operators instead: they may run where there is no Python, or no package of ours.
def _axis_codes_op(
    size: int, num_bands: int, max_freq: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    code, mean, square = _cached(size, num_bands, max_freq, dtype, device)
    return code.clone(), mean.clone(), square.clone()


def _fake_axis_codes(size, num_bands, max_freq, dtype, device):
    code = torch.empty(size, 2 * num_bands + 1, dtype=dtype, device=device)
    return code, code.new_empty(size), code.new_empty(size)


if not hasattr(torch.ops.perceiver_fast, "axis_codes"):  # it is where this package is imported again
    torch.library.custom_op("perceiver_fast::axis_codes", _axis_codes_op, mutates_args=()).register_fake(
        _fake_axis_codes
    )


def axis_codes(size: int, num_bands: int, max_freq: float, dtype: torch.dtype, device: torch.device) -> AxisCodes:
    """Codes of an axis of ``size`` positions, cached per argument list; do not write to them.

    Args:
        size: number of positions on the axis.
        num_bands: number of frequencies K.
        max_freq: the highest frequency is max_freq / 2, in half periods over the axis.
        dtype: of the result; the computation is float64.
        device: of the result.

    Returns:
        AxisCodes: code ``[size, 2 K + 1]``, mean ``[size]`` and square ``[size]``.

    Source:
        perceiver-pytorch 0.11.0, ``fourier_encode``; Jaegle et al., "Perceiver", ICML 2021, sec. 3.2.

    Example:
        >>> import torch
        >>> from perceiver_fast.layers import axis_codes
        >>> axis_codes(5, 2, 8.0, torch.float32, torch.device("cpu")).code.shape
        torch.Size([5, 5])
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return _compute(size, num_bands, float(max_freq), dtype, device)
        return AxisCodes(*torch.ops.perceiver_fast.axis_codes(size, num_bands, max_freq, dtype, device))
    return _cached(size, num_bands, float(max_freq), dtype, device)
