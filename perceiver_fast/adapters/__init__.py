"""Other people's models, made faster in place: see docs/accelerate.md."""

from perceiver_fast.adapters.accelerating import accelerate
from perceiver_fast.adapters.forwards import restore
from perceiver_fast.adapters.report import Check, Report, Row

__all__ = ["Check", "Report", "Row", "accelerate", "restore"]
