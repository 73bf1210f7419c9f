"""``perceiver_pytorch.perceiver_io``'s import path."""

from perceiver_fast.models.perceiver_io import PerceiverIO, PerceiverLM

__all__ = ["PerceiverIO", "PerceiverLM"]
