"""``perceiver_pytorch.gated``'s import path."""

from perceiver_fast.models.gated import Perceiver

__all__ = ["Perceiver"]
