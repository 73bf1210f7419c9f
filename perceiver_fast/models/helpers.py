"""Helper functions of perceiver-pytorch, with its signatures, for projects that import them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.layers.sequence_dropout import drop_tokens

T = TypeVar("T")

LinearNoBias = functools.partial(nn.Linear, bias=False)


def exists(val: object) -> bool:
    """Whether ``val`` is not None."""
    return val is not None


def default(val: T | None, d: T) -> T:
    """``val``, or ``d`` where that is None."""
    return d if val is None else val


def l1norm(t: Tensor, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """``t`` divided by its L1 norm along ``dim``, at least ``eps``."""
    return F.normalize(t, p=1, dim=dim, eps=eps)


def dropout_seq(seq: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor | None]:
    """:func:`perceiver_fast.layers.drop_tokens`, with perceiver-pytorch's names of function and arguments."""
    return drop_tokens(seq, mask, dropout)


def cache_by_key(f: Callable[..., T]) -> Callable[..., T]:
    """``cache_fn`` of ``perceiver_pytorch.perceiver_pytorch``: a function that calls ``f`` once for every ``key``.

    Beside the arguments of ``f`` it takes ``key=None``, the cache key, and ``_cache=True``; with False it calls ``f``
    in any case and caches nothing.

    Source:
        perceiver-pytorch 0.11.0.

    Example:
        >>> from perceiver_fast.perceiver_pytorch import cache_fn
        >>> build = cache_fn(lambda: object())
        >>> build() is build(), build() is build(_cache=False), build() is build(key=1)
        (True, False, False)
    """
    results: dict[Hashable, T] = {}

    @functools.wraps(f)
    def cached_fn(*args: Any, _cache: bool = True, key: Hashable = None, **kwargs: Any) -> T:
        if not _cache:
            return f(*args, **kwargs)
        if key not in results:
            results[key] = f(*args, **kwargs)
        return results[key]

    return cached_fn


def cache_once(f: Callable[..., T]) -> Callable[..., T]:
    """``cache_fn`` of ``perceiver_pytorch.perceiver_io``: a function that calls ``f`` once.

    Like :func:`cache_by_key`, but without cache keys: an argument ``key`` is passed to ``f``.

    Source:
        perceiver-pytorch 0.11.0.
    """
    results: list[T] = []

    @functools.wraps(f)
    def cached_fn(*args: Any, _cache: bool = True, **kwargs: Any) -> T:
        if not _cache:
            return f(*args, **kwargs)
        if not results or results[0] is None:
            results[:] = [f(*args, **kwargs)]
        return results[0]

    return cached_fn


def fourier_encode(x: Tensor, max_freq: float, num_bands: int = 4) -> Tensor:
    """Fourier codes of positions, in the dtype of ``x``, as perceiver-pytorch computes them.

    The models of this package compute positions in float64 (:func:`perceiver_fast.layers.axis_codes`).

    Args:
        x: positions ``[..]``, floating point.
        max_freq: the highest frequency is max_freq / 2.
        num_bands: number of frequencies, K. Default: 4.

    Returns:
        ``[.., 2 K + 1]``: K sines, K cosines and the position.

    Source:
        perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast.perceiver_pytorch import fourier_encode
        >>> fourier_encode(torch.zeros(5, 2), max_freq=10.0, num_bands=3).shape
        torch.Size([5, 2, 7])
    """
    x = x.unsqueeze(-1)
    scales = torch.linspace(1.0, max_freq / 2, num_bands, device=x.device, dtype=x.dtype)
    angle = x * scales * math.pi
    return torch.cat([angle.sin(), angle.cos(), x], dim=-1)
