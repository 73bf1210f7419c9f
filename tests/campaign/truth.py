"""What the truth is computed with in float64, where torch's own functions lose digits: LayerNorm and GELU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


def two_pass_layer_norm(x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """torch.nn.functional.layer_norm, but that constant tokens, however large, have a deviation of exactly zero."""
    mean = x.mean(-1, keepdim=True)
    mean = mean + (x - mean).mean(-1, keepdim=True)
    y = x - mean
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def tail_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """torch.nn.functional.gelu, but with digits far below zero, where torch's ``1 + erf`` has lost them."""
    if approximate != "none":
        raise ValueError(f"expected the exact gelu, got approximate={approximate!r}; add it here")
    return x * 0.5 * torch.special.erfc(-x * 0.5**0.5)


@contextmanager
def right_in_float64() -> Iterator[None]:
    """Within, torch.nn.functional.layer_norm and gelu, and what calls them, are :func:`two_pass_layer_norm` and :func:`tail_gelu`."""
    at = "torch.nn.functional."
    with mock.patch(at + "layer_norm", two_pass_layer_norm), mock.patch(at + "gelu", tail_gelu):
        yield
