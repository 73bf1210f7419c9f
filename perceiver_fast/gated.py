"""``perceiver_pytorch.gated``'s import path: the Perceiver and what it is built of."""

from perceiver_fast.layers import Attention, FeedForward, GRUGating, PreNorm, Residual
from perceiver_fast.models.gated import Perceiver
from perceiver_fast.models.helpers import cache_by_key as cache_fn
from perceiver_fast.models.helpers import default, exists, fourier_encode

__all__ = [
    "Attention",
    "FeedForward",
    "GRUGating",
    "Perceiver",
    "PreNorm",
    "Residual",
    "cache_fn",
    "default",
    "exists",
    "fourier_encode",
]
