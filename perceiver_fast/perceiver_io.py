"""``perceiver_pytorch.perceiver_io``'s import path."""

from perceiver_fast.layers import EnformerAttentionResidual
from perceiver_fast.models.perceiver_io import PerceiverIO, PerceiverLM

__all__ = ["EnformerAttentionResidual", "PerceiverIO", "PerceiverLM"]
