"""From pytest-benchmark's record to the rows that are kept and the tables that are read."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from rich.table import Table

import perceiver_fast
from benchmarks.layers import NOT_A_PEER
from benchmarks.peers import OURS
from perceiver_fast import backends, extension
from perceiver_fast.insight.environment import cpu_name

PEERS = ("eager", "reference", "sdpa", "compile", "compile-eager", "transformers", "perceiver-io", NOT_A_PEER)
TITLES = {
    "model": "Models: perceiver-pytorch (eager, with SDPA, torch.compile of either) and perceiver-fast",
    "layer": "One cross-attention layer, from latents and raw input: every library that has one",
    "grid_attention": "grid_attention: in plain PyTorch, dense SDPA given its keys and values, and perceiver-fast",
}
CAPTION = (
    "Median time of a call; below it the rise of resident memory at its peak (and what fast keeps between calls, packed weights), and the peer's time over fast's (under 1, in "
    "red, fast is the slower one). error: the largest relative to float64, of the output, then of a step's gradients. of "
    "roof: what fast counts, done at the measured roofs, over its time."
)
SHOWN_KEPT = 2**27  # bytes; less is what starting threads and libraries leaves, of any peer
ROW_KEYS = ("level", "geometry", "pass", "batch", "dtype", "peer", "threads")
STATS = ("median", "min", "q1", "q3", "iqr", "rounds")
MEASURED_KEYS = (
    "relative_error", "gradient_error", "peak_memory_bytes", "kept_memory_bytes",
    "peak_memory_method", "tokens", "inputs_per_second",
    "tokens_per_second", "pairs_per_second", "multiply_adds", "exponentials", "bytes_at_least", "percent_of_exp_roof",
    "percent_of_copy_roof", "percent_of_fma_roof", "percent_of_roof",
)  # fmt: skip


def conditions(threads: int) -> dict:
    """What the numbers depend on; to be called before the measurements, for ``load_at_start`` to be others' work."""
    return {
        "cpu": cpu_name(),
        "isa": extension.module.active_isa() if extension.module else f"none: {extension.error}",
        "threads": threads,
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("perceiver-pytorch", "transformers", "perceiver-io", "flash-perceiver")},
        "perceiver-fast": perceiver_fast.__version__,
        "forced_backend": backends.forced_backend(),
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    """The installed version of a peer; None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        described = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() or None


def slug(text: str) -> str:
    """``text`` as part of a file name: "Intel(R) Xeon(R) Processor" gives "intel-xeon-processor"."""
    words = re.sub(r"\((r|tm)\)", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def rows(record: dict) -> list[dict]:
    """One flat row per measurement of pytest-benchmark's ``record``; times in seconds."""
    return [
        {key: benchmark["extra_info"][key] for key in ROW_KEYS}
        | {key: benchmark["stats"][key] for key in STATS}
        | {key: benchmark["extra_info"][key] for key in MEASURED_KEYS}
        for benchmark in record["benchmarks"]
    ]


def tables(rows: list[dict], missing: list[dict]) -> list[Table]:
    """One table per level: a row for every geometry and pass, a column for every peer, and the ratios."""
    return [table(level, rows, missing) for level in dict.fromkeys(row["level"] for row in rows)]


def table(level: str, rows: list[dict], missing: list[dict]) -> Table:
    """The table of one level; :func:`tables` makes all."""
    rows, missing = ([row for row in some if row["level"] == level] for some in (rows, missing))
    peers = [peer for peer in PEERS if any(row["peer"] == peer for row in (*rows, *missing))]
    result = Table(
        title=TITLES.get(level, f"{level}: plain PyTorch and perceiver-fast"), caption=CAPTION, show_lines=True
    )
    result.add_column("geometry\npass", no_wrap=True)
    headers = [peer.replace("-", "\n") for peer in (*peers, OURS)]
    for header in (*headers, "over\nbest", "error:\npeers\nfast", "fast:\nM tokens\na second", "fast:\nof roof"):
        result.add_column(header, justify="right", no_wrap=True)
    for group in dict.fromkeys(group_of(row) for row in [*rows, *missing]):
        sides = {row["peer"]: row for row in rows if group_of(row) == group}
        outcomes = {row["peer"]: row["outcome"] for row in missing if group_of(row) == group}
        result.add_row(
            "\n".join(group),
            *(cell(sides, peer) if peer in sides else outcomes.get(peer, "not run") for peer in (*peers, OURS)),
            best_ratio(sides),
            compared_errors(sides),
            shown(sides, "tokens_per_second", 1e-6, ""),
            shown(sides, "percent_of_roof", 1, " %"),
        )
    return result


def group_of(row: dict) -> tuple[str, str]:
    """What one line of a table is about."""
    batch = "" if row["batch"] == 1 else f", batch {row['batch']}"
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return row["geometry"], f"{row['pass']}{batch}{dtype}"


def shown(sides: dict[str, dict], key: str, factor: float, unit: str) -> str:
    """A number of ours."""
    value = sides.get(OURS, {}).get(key)
    return "-" if value is None else f"{significant(value * factor)}{unit}"


def significant(value: float) -> str:
    """Three significant digits, and every digit before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(sides: dict[str, dict], peer: str) -> str:
    """A peer's time, its memory and how many times ours its time is."""
    row = sides[peer]
    peak = row["peak_memory_bytes"]
    lines = [f"{significant(row['median'] * 1e3)} ms", "-" if peak is None else f"{significant(peak / 2**20)} MiB"]
    if peer != OURS and OURS in sides:
        lines.append(ratio(row, sides[OURS]))
    elif (kept := row["kept_memory_bytes"]) and kept > SHOWN_KEPT:
        lines.append(f"+{significant(kept / 2**20)} kept")
    return "\n".join(lines)


def ratio(row: dict, ours: dict) -> str:
    """A peer's time over ours, in red where ours is the longer."""
    value = row["median"] / ours["median"]
    return f"{value:.2f}x" if value >= 1 else f"[red]{value:.2f}x[/red]"


def best_ratio(sides: dict[str, dict]) -> str:
    """The same of the fastest peer, and its name."""
    peers = [peer for peer in sides if peer not in (OURS, NOT_A_PEER)]
    if OURS not in sides or not peers:
        return "-"
    best = min(peers, key=lambda peer: sides[peer]["median"])
    return f"{ratio(sides[best], sides[OURS])}\n{best}"


def compared_errors(sides: dict[str, dict]) -> str:
    """The largest relative errors, over the peers and below it ours; of a step the gradients' after a comma."""
    others = [row for peer, row in sides.items() if peer not in (OURS, NOT_A_PEER)]
    return "\n".join(_errors(rows) for rows in (others, [sides[OURS]] if OURS in sides else []))


def _errors(rows: list[dict]) -> str:
    found = [[row[key] for row in rows if row[key] is not None] for key in ("relative_error", "gradient_error")]
    return ", ".join(f"{max(values):.0e}" for values in found if values) or "-"


def lost(geometry: str, reason: str, outcome: str = "failed") -> dict:
    """What is missing when the process that measured ``geometry`` left no record."""
    every = {"level": "every level", "pass": "every pass", "peer": "every peer", "batch": 1, "dtype": "float32"}
    return {**every, "geometry": geometry, "outcome": outcome, "reason": reason}


def missing_lines(missing: list[dict]) -> list[str]:
    """What was not measured, and why: one line per reason."""
    lines = {}
    for row in missing:
        lines.setdefault((row["outcome"], row["level"], row["peer"], row["reason"]), []).append(" ".join(group_of(row)))
    return [
        f"{outcome}: {level}, {peer} on {', '.join(where)}: {reason}"
        for (outcome, level, peer, reason), where in lines.items()
    ]
