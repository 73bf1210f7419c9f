"""LayerNorms that are right for numbers far from zero, for the truth: torch's own lose digits of them in float64, too."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

from torch import Tensor


def two_pass_layer_norm(x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """torch.nn.functional.layer_norm, but that constant tokens, however large, have a deviation of exactly zero."""
    mean = x.mean(-1, keepdim=True)
    mean = mean + (x - mean).mean(-1, keepdim=True)
    y = x - mean
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def two_pass_layer_norms() -> AbstractContextManager:
    """Within, torch.nn.functional.layer_norm, and so nn.LayerNorm, is :func:`two_pass_layer_norm`."""
    return mock.patch("torch.nn.functional.layer_norm", two_pass_layer_norm)
