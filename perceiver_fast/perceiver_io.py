"""``perceiver_pytorch.perceiver_io``'s import path: PerceiverIO, its language model, and what they are built of."""

from perceiver_fast.layers import (
    AttentionWithoutDropout as Attention,
    EnformerAttentionResidual,
    FeedForwardWithoutDropout as FeedForward,
    GEGLU,
    PerceiverBlock,
    PreNorm,
    drop_tokens as dropout_seq,
)
from perceiver_fast.models.helpers import LinearNoBias, cache_once as cache_fn, default, exists, l1norm
from perceiver_fast.models.perceiver_io import PerceiverIO, PerceiverLM

__all__ = [
    "Attention",
    "EnformerAttentionResidual",
    "FeedForward",
    "GEGLU",
    "LinearNoBias",
    "PerceiverBlock",
    "PerceiverIO",
    "PerceiverLM",
    "PreNorm",
    "cache_fn",
    "default",
    "dropout_seq",
    "exists",
    "l1norm",
]
