"""The points of scaling curves, as a CSV file holds them, and the exponents that are fitted to them."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import linear_regression

from benchmarks.output import replace_file

MEASURED = "measured"
DECADES = 2.0  # at the large end, which a fit is made over


@dataclass(frozen=True)
class Point:
    """One peer at one size; what was not measured is None.

    ``status`` is measured, or why the peer stops here: out of memory, would not fit (so much more than is allowed that it
    was not tried), too slow, failed.
    """

    axis: str  # what grows along the curve: tokens or latents
    peer: str
    tokens: int  # M
    latents: int  # N
    pass_name: str  # forward or step
    dtype: str  # float32 or bfloat16
    threads: int  # that computed
    status: str
    median: float | None = None  # seconds of a call; q1, q3 and min likewise
    q1: float | None = None
    q3: float | None = None
    min: float | None = None
    rounds: int | None = None  # calls that these are of
    peak_memory_bytes: int | None = None  # by which the resident set grew at its peak in a call; without the input
    input_bytes: int | None = None
    needed_bytes: int | None = None  # about what the peer would have needed, where it stopped for that
    difference: float | None = None  # from the first peer's output, and gradients' norms; relative
    detail: str = ""  # how the peer stopped

    @property
    def size(self) -> int:
        """Where on its axis the point is."""
        return self.tokens if self.axis == "tokens" else self.latents


_TYPES = {field.name: {"str": str, "int": int, "float": float}[field.type.split(" ")[0]] for field in fields(Point)}


def write(path: Path, conditions: dict, points: list[Point]) -> None:
    """Write all to ``path``, conditions as comments; the file is complete at any moment."""
    text = io.StringIO()
    for key, value in conditions.items():
        text.write(f"# {key}: {' '.join(str(value).split())}\n")
    table = csv.DictWriter(text, list(_TYPES), lineterminator="\n")
    table.writeheader()
    for point in points:
        table.writerow({name: "" if (value := getattr(point, name)) is None else value for name in _TYPES})
    replace_file(path, text.getvalue())


def read(path: Path) -> tuple[dict[str, str], list[Point]]:
    """Conditions, all as text, and points of what :func:`write` wrote.

    Raises:
        ValueError: ``path`` holds something else; the message says what was expected.
    """
    lines = path.read_text().splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ")]
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    if table.fieldnames != list(_TYPES):
        raise ValueError(f"{path}: expected the columns {', '.join(_TYPES)}, got {table.fieldnames}")
    points = [
        Point(**{name: kind(row[name]) if row[name] or kind is str else None for name, kind in _TYPES.items()})
        for row in table
    ]
    return dict(line.split(": ", 1) for line in comments if ": " in line), points


def curve(points: list[Point], axis: str, peer: str, value: str) -> list[tuple[int, float]]:
    """Sizes and values above zero of one peer, from small to large; ``value`` is median or peak_memory_bytes."""
    found = [(point.size, getattr(point, value)) for point in points if (point.axis, point.peer) == (axis, peer)]
    return sorted((size, number) for size, number in found if number)


def exponent(line: list[tuple[int, float]], decades: float = DECADES) -> float | None:
    """The power of size that the last ``decades`` of a curve grow with, by least squares; None of fewer than two points.

    Example:
        >>> exponent([(1, 9.0), (10**3, 2e3), (10**4, 2e4), (10**5, 2e5)])
        1.0
    """
    logs = [(math.log10(size), math.log10(value)) for size, value in line]
    logs = [(x, y) for x, y in logs if x > logs[-1][0] - decades - 1e-2]  # grids are about half decades
    return round(linear_regression(*zip(*logs, strict=True)).slope, 3) if len(logs) > 1 else None
