"""Descriptions of tokens, made from a model's input: data on a grid, or data and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perceiver_fast.float64 import float64_device, in_float64
from perceiver_fast.ops.library import compute_dtype
from perceiver_fast.tokens.base import Tokens
from perceiver_fast.tokens.dense import DenseTokens
from perceiver_fast.tokens.fourier import AxisCodes, axis_codes, evenly_spaced
from perceiver_fast.tokens.grid import GridTokens
from perceiver_fast.tokens.points import PointTokens
from perceiver_fast.tracing import known, own

if TYPE_CHECKING:
    from perceiver_fast.shards.agreement import Place

ONE_AXIS_LIMIT = 1024  # positions; on one axis a grid's tables have an entry for every query and token, as logits do


def describe_grid(
    data: Tensor, num_freq_bands: int, max_freq: float, embedding: Tensor | None = None, place: Place | None = None
) -> Tokens:
    """Describe the tokens of data on a grid: raw channels, and Fourier codes of their positions.

    Args:
        data: ``[B, n_1, .., n_A, F]``.
        num_freq_bands, max_freq: number of frequencies of the codes, K, and twice the highest one.
        embedding: ``[E]``, channels that all tokens share, between their raw channels and the codes. Default: none.
        place: of the data's rows among those of the whole grid, along the first axis. Default: they are the whole.

    Returns:
        GridTokens; for one long axis PointTokens at evenly spaced positions; without frequencies DenseTokens.
    """
    data = own(data)
    start, total = (0, data.shape[1]) if place is None else place
    if data.dim() == 3 and known(data.shape[1]) > ONE_AXIS_LIMIT:
        positions = grid_positions(total, data.device, start, start + data.shape[1])
        return describe_points(data, positions, num_freq_bands, max_freq, embedding)
    dtype = compute_dtype(data.dtype)
    sizes = (total, *data.shape[2:-1])
    codes = tuple(axis_codes(size, num_freq_bands, max_freq, dtype, data.device) for size in sizes)
    if place is not None:
        codes = AxisCodes(*(t[start : start + data.shape[1]] for t in codes[0])), *codes[1:]
    if embedding is not None:  # like the code of one more axis, which has one index
        data, codes = data.unsqueeze(1), (_shared_code(embedding.to(dtype)), *codes)
    return _with_frequencies(GridTokens(data, codes), num_freq_bands)


def _with_frequencies(tokens: Tokens, num_freq_bands: int) -> Tokens:
    """``tokens``, or where positions have no sines and cosines, the tensor that they describe.

    A white pixel in the corner of an image is ``[1, 1, 1, 1, 1]`` then: LayerNorm makes zeros of it, times the largest of
    all scales. Only a token that exists can be that exact, and with one channel an axis it costs no more.
    """
    return tokens if num_freq_bands > 0 else DenseTokens(tokens.materialize())


def _shared_code(embedding: Tensor) -> AxisCodes:
    """The code ``[1, E]`` of an axis of one index, differentiable in ``embedding [E]`` with its statistics."""
    mean = embedding.mean(0, keepdim=True)
    return AxisCodes(embedding.unsqueeze(0), mean, (embedding - mean).square().sum(0, keepdim=True))


def grid_positions(size: int, device: torch.device, start: int = 0, stop: int | None = None) -> Tensor:
    """``size`` positions evenly spaced in [-1, 1], or some of them: float64 ``[1, M, 1]``; on the CPU if ``device`` has none."""
    return evenly_spaced(size, start, stop).to(float64_device(device)).view(1, -1, 1)


def describe_points(
    data: Tensor, coords: Tensor, num_freq_bands: int, max_freq: float, embedding: Tensor | None = None
) -> Tokens:
    """Describe the tokens of data at given positions: raw channels, and Fourier codes of the positions.

    Args:
        data: ``[B, M, F]``.
        coords: ``[B, M, A]``, or ``[1, M, A]`` or ``[M, A]`` when the whole batch shares them.
        num_freq_bands, max_freq, embedding: see :func:`describe_grid`.
    """
    data, coords = own(data), own(coords if coords.dim() == 3 else coords.unsqueeze(0))
    coords = in_float64(coords)
    frequency = torch.linspace(1.0, max_freq / 2, num_freq_bands, dtype=torch.float64, device="cpu").to(coords.device)
    if embedding is not None:
        data = torch.cat([data, embedding.expand(*data.shape[:-1], -1)], -1)
    return _with_frequencies(PointTokens(data, coords, frequency.expand(coords.shape[-1], -1)), num_freq_bands)
