"""What models are made of; parameter names are perceiver-pytorch's."""

from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.attention_residual import EnformerAttentionResidual
from perceiver_fast.layers.block import PerceiverBlock
from perceiver_fast.layers.feed_forward import GEGLU, FeedForward
from perceiver_fast.layers.gru_gating import GRUGating
from perceiver_fast.layers.linear_attention import LinearAttention
from perceiver_fast.layers.mixer import mixer
from perceiver_fast.layers.pre_norm import PreNorm, Residual
from perceiver_fast.layers.sequence_dropout import drop_tokens
from perceiver_fast.tokens.fourier import AxisCodes, axis_codes

__all__ = [
    "GEGLU",
    "Attention",
    "AxisCodes",
    "EnformerAttentionResidual",
    "FeedForward",
    "GRUGating",
    "LinearAttention",
    "PerceiverBlock",
    "PreNorm",
    "Residual",
    "axis_codes",
    "drop_tokens",
    "mixer",
]
