"""``perceiver_pytorch.experimental``'s import path."""

from perceiver_fast.models.experimental import Perceiver

__all__ = ["Perceiver"]
