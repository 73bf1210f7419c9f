"""Other people's models, made faster in place."""

from perceiver_fast.adapters.accelerating import accelerate
from perceiver_fast.adapters.forwards import restore

__all__ = ["accelerate", "restore"]
