"""``perceiver_pytorch.perceiver_pytorch``'s import path: the Perceiver and what it is built of."""

from perceiver_fast.layers import Attention, EnformerAttentionResidual, FeedForward, GEGLU, PerceiverBlock, PreNorm
from perceiver_fast.models.helpers import LinearNoBias, cache_by_key as cache_fn, default, exists, fourier_encode, l1norm
from perceiver_fast.models.perceiver import Perceiver

__all__ = [
    "Attention",
    "EnformerAttentionResidual",
    "FeedForward",
    "GEGLU",
    "LinearNoBias",
    "Perceiver",
    "PerceiverBlock",
    "PreNorm",
    "cache_fn",
    "default",
    "exists",
    "fourier_encode",
    "l1norm",
]
