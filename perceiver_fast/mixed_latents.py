"""``perceiver_pytorch.mixed_latents``'s import path."""

from perceiver_fast.models.mixed_latents import Perceiver

__all__ = ["Perceiver"]
