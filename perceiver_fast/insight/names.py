"""The names of the models that are explained, profiled and measured: without torch, which help does not need."""

from __future__ import annotations

import json
from pathlib import Path

TABLE = Path(__file__).with_name("geometries.json")

NAMES: tuple[str, ...] = tuple(json.loads(TABLE.read_text()))
"""As options take them, in the table's order; :mod:`perceiver_fast.insight.geometries` has the models."""
