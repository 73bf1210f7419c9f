"""All levels by their names, which are those of the benchmarks: ``test_<level>``."""

from __future__ import annotations

from benchmarks.suite import grid, layers, models, ops

LEVELS = {"model": models.LEVEL, "layer": layers.LEVEL, "grid_attention": grid.LEVEL, **ops.LEVELS}
