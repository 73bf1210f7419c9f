"""Drop-in models: perceiver-pytorch's arguments, state_dict and numbers."""

from perceiver_fast.models.perceiver import Perceiver
from perceiver_fast.models.perceiver_io import PerceiverIO, PerceiverLM

__all__ = ["Perceiver", "PerceiverIO", "PerceiverLM"]
