"""``perceiver_pytorch.perceiver_pytorch``'s import path: the Perceiver and what it is built of."""

from perceiver_fast.layers import GEGLU, Attention, EnformerAttentionResidual, FeedForward, PerceiverBlock, PreNorm
from perceiver_fast.models.helpers import LinearNoBias, default, exists, fourier_encode, l1norm
from perceiver_fast.models.helpers import cache_by_key as cache_fn
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
