"""Which attention weights are dropped, as a function of a seed and of indices; csrc/core/dropout.h computes the same.

Every query row and every token has a 32-bit hash, the upper half of splitmix64 (Sebastiano Vigna) of its index and the
seed. A weight is dropped with probability p: if lowbias32 (Chris Wellons) of the two hashes, xored, is below p 2^32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WRAP = 1 << 64


def _signed(x: int) -> int:
    """The int64 of the same 64 bits as the unsigned ``x``."""
    return (x + (1 << 63)) % _WRAP - (1 << 63)


def _shift(x: Tensor, bits: int) -> Tensor:
    """``x`` shifted right as an unsigned number; torch's shift of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """A 64-bit hash of int64, elementwise."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _lowbias32(x: Tensor) -> Tensor:
    """A 32-bit hash of 32-bit numbers in int64, elementwise."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_threshold(probability: float) -> int:
    """The number p 2^32: weights whose hash is below it are dropped."""
    return min(int(probability * 2**32), 2**32 - 1)


def dropout_scale(probability: float) -> float:
    """What the weights that are not dropped are multiplied by: the inverse of their share."""
    return 2**32 / (2**32 - dropout_threshold(probability))


def dropout_keep(seed: Tensor, rows: int | Tensor, tokens: int | Tensor, probability: float) -> Tensor:
    """Which weights are not dropped, bool ``[rows, tokens]``.

    Args:
        seed: int64, one element; or two, the second being the index of the first token among all tokens.
        rows: number of query rows: batch, heads and queries in row-major order; or the indices of some, int64.
        tokens: number of tokens, or the indices of some, int64.
        probability: of a weight to be dropped.
    """
    mixed = _splitmix64(seed[0])
    row = rows if isinstance(rows, Tensor) else torch.arange(rows, dtype=torch.int64, device=seed.device)
    token = tokens if isinstance(tokens, Tensor) else torch.arange(tokens, dtype=torch.int64, device=seed.device)
    if seed.numel() == 2:
        token = token + seed[1]
    row_hash = _shift(_splitmix64(mixed ^ _splitmix64(2 * row)), 32)
    token_hash = _shift(_splitmix64(mixed ^ _splitmix64(2 * token + 1)), 32)
    return _lowbias32(row_hash[:, None] ^ token_hash) >= dropout_threshold(probability)


def apply_dropout(
    weight: Tensor, seed: Tensor | None, probability: float, tokens: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Attention weights ``[.., N, M]`` with some dropped and the others scaled up; leading dimensions are rows.

    Args:
        weight, seed, probability: see :func:`dropout_keep`.
        tokens: indices ``[M]`` of the tokens, int64. Default: 0 to M - 1.
        rows: indices of the rows, int64, as many as there are. Default: 0 on.

    Raises:
        ValueError: there is no seed.
    """
    if seed is None:
        raise ValueError(f"dropout: expected a seed to drop weights with probability {probability}, got None")
    count, length = weight.shape[:-1].numel(), weight.shape[-1]
    keep = dropout_keep(seed, count if rows is None else rows, length if tokens is None else tokens, probability)
    return weight * keep.view(weight.shape) * dropout_scale(probability)
