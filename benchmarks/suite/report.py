"""From pytest-benchmark's record to the rows that are kept and the tables that are read."""

from __future__ import annotations

from rich.table import Table

from benchmarks.output import described, digits, mebibytes, milliseconds, pass_of, table, times_ours
from benchmarks.sides import OURS, SMART

PEERS = ("eager", "reference", "sdpa", "compile", "compile-eager", "transformers", "perceiver-io", SMART)
TITLES = {
    "model": "Models: perceiver-pytorch (eager, with SDPA, torch.compile of either) and perceiver-fast",
    "layer": "One cross-attention layer, from latents and raw input: every library that has one",
    "grid_attention": "grid_attention: in plain PyTorch, dense SDPA given its keys and values, and perceiver-fast",
}
CAPTION = (
    "Median time of a call; below it the rise of resident memory at its peak (and "
    "what stays between calls, where that is much), and the peer's time over fast's (under 1, in red, fast is the slower one). error: the largest relative to "
    "float64, of the output, then of a step's gradients. of roof: what fast counts, done at the measured roofs, over its time."
)
LAST = ("over\nbest", "error:\npeers\nfast", "fast:\nM tokens\na second", "fast:\nof roof")
SHOWN_KEPT = 2**27  # bytes; less is what starting threads and libraries leaves, of any peer
STATS = ("median", "min", "q1", "q3", "iqr", "rounds")


def rows(record: dict) -> list[dict]:
    """One flat row per measurement of pytest-benchmark's ``record``; times in seconds."""
    return [
        benchmark["extra_info"] | {key: benchmark["stats"][key] for key in STATS} for benchmark in record["benchmarks"]
    ]


def tables(rows: list[dict], missing: list[dict]) -> list[Table]:
    """One table per level: a row for every geometry and pass, a column for every peer, and the ratios."""
    made = []
    for level in dict.fromkeys(row["level"] for row in rows):
        lines = {}
        for row in (*rows, *missing):
            if row["level"] == level:
                lines.setdefault(f"{row['geometry']}\n{pass_of(row)}", {})[row["peer"]] = row
        peers = [*(peer for peer in PEERS if any(peer in found for found in lines.values())), OURS]
        title = TITLES.get(level, f"{level}: plain PyTorch and perceiver-fast")
        headers = ("geometry\npass", *(peer.replace("-", "\n") for peer in peers), *LAST)
        lines = [_line(name, found, peers) for name, found in lines.items()]
        made.append(table(title, headers, lines, caption=CAPTION, show_lines=True))
    return made


def _line(name: str, found: dict[str, dict], peers: list[str]) -> list[str]:
    """A line of a table; ``found`` are rows by their peers, measured or missing."""
    sides = {peer: row for peer, row in found.items() if "median" in row}
    outcomes = {peer: row["outcome"] for peer, row in found.items() if peer not in sides}
    ours = sides.get(OURS, {})
    others = {peer: row for peer, row in sides.items() if peer not in (OURS, SMART)}
    over_best = "-"
    if ours and others:
        best = min(others, key=lambda peer: others[peer]["median"])
        over_best = f"{times_ours(others[best]['median'] / ours['median'])}\n{best}"
    speed, share = ours.get("tokens_per_second"), ours.get("percent_of_roof")
    return [
        name,
        *(_cell(sides[peer], ours) if peer in sides else outcomes.get(peer, "not run") for peer in peers),
        over_best,
        "\n".join(map(_errors, (list(others.values()), [ours] if ours else []))),
        "-" if speed is None else digits(speed / 1e6),
        "-" if share is None else f"{digits(share)} %",
    ]


def _cell(row: dict, ours: dict) -> str:
    """A peer's time, its memory and how many times ours its time is."""
    lines = [milliseconds(row["median"]), mebibytes(row["peak_memory_bytes"])]
    if row["peer"] != OURS and ours:
        lines.append(times_ours(row["median"] / ours["median"]))
    elif (kept := row["kept_memory_bytes"]) and kept > SHOWN_KEPT:
        lines.append(f"+{digits(kept / 2**20)} kept")
    return "\n".join(lines)


def _errors(rows: list[dict]) -> str:
    """The largest relative errors; of a step the gradients' after a comma."""
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
        lines.setdefault((row["outcome"], row["level"], row["peer"], row["reason"]), []).append(described(row))
    return [
        f"{outcome}: {level}, {peer} on {', '.join(where)}: {reason}"
        for (outcome, level, peer, reason), where in lines.items()
    ]
