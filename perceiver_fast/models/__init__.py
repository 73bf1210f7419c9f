"""Drop-in models: perceiver-pytorch's arguments, state_dict and numbers."""

from perceiver_fast.models.perceiver import Perceiver

__all__ = ["Perceiver"]
