"""``perceiver_pytorch.experimental``'s import path: the Perceiver and what it is built of."""

from perceiver_fast.layers import Attention, FeedForward, LinearAttention, PreNorm
from perceiver_fast.models.experimental import Perceiver
from perceiver_fast.models.helpers import cache_by_key as cache_fn
from perceiver_fast.models.helpers import default, exists, fourier_encode

__all__ = [
    "Attention",
    "FeedForward",
    "LinearAttention",
    "Perceiver",
    "PreNorm",
    "cache_fn",
    "default",
    "exists",
    "fourier_encode",
]
