"""``perceiver_pytorch.perceiver_io``'s import path: PerceiverIO, its language model, and what they are built of."""

from perceiver_fast.layers import GEGLU, EnformerAttentionResidual, PerceiverBlock, PreNorm
from perceiver_fast.layers.without_dropout import Attention, FeedForward
from perceiver_fast.models.helpers import LinearNoBias, default, dropout_seq, exists, l1norm
from perceiver_fast.models.helpers import cache_once as cache_fn
from perceiver_fast.models.perceiver_io import PerceiverIO
from perceiver_fast.models.perceiver_lm import PerceiverLM

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
