"""What ncu found out about each kernel, in one line: time, what it is bound by, memory, occupancy, spills.

Reads what ``ncu --csv --page raw`` prints, best with ``--print-units base``: the file that
``perceiver-fast profile --tool ncu`` leaves.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from rich.markup import escape

from benchmarks.output import table
from perceiver_fast.insight.console import wide_console
from perceiver_fast.insight.ncu import BOUND_FROM, LIMITS, METRICS, STALL, Metric

KERNEL = "Kernel Name"
WIDTH = 180  # of the table where it is printed into a file
# What ncu's units are of ours; without --print-units base it scales them, and has spelled them in two ways.
SCALES = {
    "ns": {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9},
    "byte": {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
    "%": {"%": 1, "": 1},
}


class Unreadable(Exception):
    """The file is not what ncu prints; the message says what was expected."""


def read(lines: Iterable[str]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The units of a table of ncu by column, and its rows; what comes before the table is left out.

    Raises:
        Unreadable: there is no table, or not one of the raw page.
    """
    lines = list(lines)
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise Unreadable('expected a table that begins with "ID", got none; make it by ncu --import R --csv --page raw')
    rows = [row for row in csv.DictReader(lines[start:]) if row.get(KERNEL) is not None]
    if not rows or rows[0]["ID"]:
        raise Unreadable("expected units in the first row, got a kernel's or none; make it by ncu --csv --page raw")
    return rows[0], rows[1:]


def number(text: str | None) -> float | None:
    """A cell's number, thousands separated by commas; None where ncu has none (``n/a``, empty, no such column)."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _value(metric: Metric, row: dict[str, str], units: dict[str, str]) -> float | None:
    for name in metric.names:
        value = number(row.get(name))
        if value is not None:
            scales = SCALES.get(metric.unit, {units[name]: 1})  # what is counted has a unit of its own: inst, register
            if units[name] not in scales:
                known = ", ".join(scales)
                raise Unreadable(f"{name}: expected a unit among {known}, got {units[name]!r}; use --print-units base")
            return value * scales[units[name]]
    return None


def _stall(row: dict[str, str]) -> str | None:
    """Why warps waited the longest on average, issuing and waiting for their turn aside."""
    found = {}
    for name, text in row.items():
        match, value = STALL.fullmatch(name or ""), number(text)
        if match and value is not None and match["reason"] not in ("selected", "not_selected"):
            found[match["reason"]] = value
    return max(found, key=found.get, default=None)


def bound_by(values: dict[str, float | None], stall: str | None) -> str:
    """What a kernel is bound by: the part that is nearest to its peak, or latency where none is near.

    Example:
        >>> bound_by({"exp": 81.0, "memory": 12.0}, "math_pipe_throttle")
        'exp'
        >>> bound_by({"exp": 21.0, "memory": 32.0}, "long_scoreboard")
        'latency (long_scoreboard)'
    """
    shares = {limit: values[limit] for limit in LIMITS if values.get(limit) is not None}
    if not shares:
        return "unknown"
    nearest = max(shares, key=shares.get)
    if shares[nearest] >= BOUND_FROM:
        return nearest
    return "latency" if stall is None else f"latency ({stall})"


def summarize(units: dict[str, str], rows: list[dict[str, str]]) -> list[dict]:
    """One dict a kernel, the longest first: ``kernel``, ``launches``, the medians over them of all METRICS by their
    keys (None where ncu has none), ``total`` ns of all launches, ``stall`` (the longest launch's) and ``bound_by``."""
    launches = defaultdict(list)
    for row in rows:
        launches[row[KERNEL]].append({metric.key: _value(metric, row, units) for metric in METRICS} | {"row": row})
    kernels = []
    for kernel, found in launches.items():
        known = {m.key: [launch[m.key] for launch in found if launch[m.key] is not None] for m in METRICS}
        values = {key: statistics.median(of) if of else None for key, of in known.items()}
        stall = _stall(max(found, key=lambda launch: launch["time"] or 0.0)["row"])
        total = sum(known["time"]) if known["time"] else None
        record = {"kernel": kernel, "launches": len(found), "total": total, **values, "stall": stall}
        kernels.append(record | {"bound_by": bound_by(values, stall)})
    return sorted(kernels, key=lambda kernel: -(kernel["total"] or 0.0))


def _cell(kernel: dict, *keys: str, scale: float = 1.0, digits: int = 0) -> str:
    """The sum of a kernel's values, for people."""
    values = [kernel[key] for key in keys]
    return "n/a" if None in values else f"{sum(values) * scale:,.{digits}f}"


def show(kernels: list[dict]) -> None:
    """Print :func:`summarize`'s result for people."""
    headers = ("kernel", "n", "us", "bound by", *(f"{limit} %" for limit in LIMITS))
    headers += ("DRAM MB", "L2 hits %", "occupancy %", "registers", "spills")
    rows = [
        (
            escape(k["kernel"]), _cell(k, "launches"), _cell(k, "time", scale=1e-3, digits=1), k["bound_by"],
            *(_cell(k, key) for key in LIMITS), _cell(k, "dram_read", "dram_written", scale=1e-6, digits=1),
            *(_cell(k, key) for key in ("l2_hits", "occupancy", "registers")), _cell(k, "local_loads", "local_stores"),
        )
        for k in kernels
    ]  # fmt: skip
    caption = "% of the peak over elapsed cycles; medians over launches"
    view = table("kernels by ncu", headers, rows, caption=caption)
    view.columns[0].no_wrap = True  # names are looked for
    wide_console(WIDTH).print(view)


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0, or 2 when the file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nsight.summarize", description=__doc__)
    parser.add_argument("csv", type=Path, help="what ncu --import R --csv --page raw --print-units base printed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        with args.csv.open(newline="") as file:
            kernels = summarize(*read(file))
    except (OSError, UnicodeDecodeError, Unreadable) as reason:
        print(f"summarize: {args.csv}: {reason}", file=sys.stderr)
        return 2
    print(json.dumps(kernels, indent=2)) if args.json else show(kernels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
