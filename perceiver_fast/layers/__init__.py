"""What models are made of; parameter names are perceiver-pytorch's."""

from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.attention_residual import EnformerAttentionResidual
from perceiver_fast.layers.block import PerceiverBlock
from perceiver_fast.layers.cross_attention import CrossAttention
from perceiver_fast.layers.feed_forward import GEGLU, FeedForward, PreNorm
from perceiver_fast.layers.fourier import AxisCodes, axis_codes

__all__ = [
    "GEGLU",
    "Attention",
    "AxisCodes",
    "CrossAttention",
    "EnformerAttentionResidual",
    "FeedForward",
    "PerceiverBlock",
    "PreNorm",
    "axis_codes",
]
