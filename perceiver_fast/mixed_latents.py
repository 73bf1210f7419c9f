"""``perceiver_pytorch.mixed_latents``'s import path: the Perceiver and what it is built of."""

from perceiver_fast.layers import Attention, FeedForward, PreNorm
from perceiver_fast.layers import mixer as Mixer
from perceiver_fast.models.helpers import cache_by_key as cache_fn
from perceiver_fast.models.helpers import default, exists, fourier_encode
from perceiver_fast.models.mixed_latents import Perceiver

__all__ = [
    "Attention",
    "FeedForward",
    "Mixer",
    "Perceiver",
    "PreNorm",
    "cache_fn",
    "default",
    "exists",
    "fourier_encode",
]
