"""The benchmarks: ``test_<level>`` measures every peer of that level on every geometry that has it.

benchmarks/conftest.py parametrises them.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.sides import Case
from benchmarks.suite.levels import LEVELS
from benchmarks.suite.measure import measure
from perceiver_fast.insight.geometries import GEOMETRIES


def _benchmark_of(level: str) -> Callable:
    def test(benchmark, geometry: str, batch: int, pass_name: str, dtype: str, peer: str) -> None:
        measure(benchmark, Case(level, GEOMETRIES[geometry], pass_name, peer, batch, dtype))

    test.__name__ = f"test_{level}"
    return test


globals().update({f"test_{level}": _benchmark_of(level) for level in LEVELS})
