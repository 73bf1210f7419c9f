"""The campaign's table: in the terminal, as JSON, as markdown, and in the pages that show it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from . import OUT, ROOT
from .outcome import (
    BEYOND_2X,
    BEYOND_5X,
    CASES_BEYOND_2X,
    CRASH,
    ERROR,
    EXPECTED_SHARE,
    FLOAT64,
    KINDS,
    NON_FINITE,
    is_failure,
)
from .sweep import Sweep

PAGES = {"reliability.md": "table", "accuracy.md": "numeric"}
START, END = "<!-- table: make campaign -->", "<!-- end of the campaign's table -->"
NUMERIC = (BEYOND_2X, BEYOND_5X, FLOAT64, NON_FINITE)


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def record(sweeps: list[Sweep], left_out: dict[str, str], seed: int, minutes: float) -> dict:
    """All of it as plain data.

    Args:
        sweeps: what ran.
        left_out: what could not run, and why.
        seed, minutes: as asked for.
    """
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    rows = [
        {"run": s.run.name, "cases": s.cases, "seconds": round(s.seconds), "counts": dict(s.total.counts)}
        for s in sweeps
    ]
    for row, sweep in zip(rows, sweeps):
        row["found"] = {kind: sweep.total.counts[kind] for kind in KINDS if sweep.total.counts[kind]}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git.stdout.strip() or "unknown",
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "seed": seed,
        "minutes": minutes,
        "rows": rows,
        "left out": left_out,
        "failures": [failure for sweep in sweeps for failure in sweep.failures],
    }


def beyond_chance(row: dict) -> bool:
    """Whether more results than chance explains are beyond twice plain PyTorch's error: three of few are, or those of one case."""
    if row["counts"].get(CASES_BEYOND_2X, 2) < 2:
        return False
    compared = row["counts"].get("results", 0)
    return row["counts"].get(BEYOND_2X, 0) > max(3, EXPECTED_SHARE * compared)


def failed(found: dict) -> bool:
    """Whether the campaign found something."""
    return any(any(map(is_failure, row["found"])) or beyond_chance(row) for row in found["rows"])


def conditions(found: dict) -> str:
    """Where and when, in a sentence."""
    return (
        f"{found['date']}, commit `{found['commit']}`, {found['processor']}, {found['cores']} cores, torch "
        f"{found['torch']}, {found['minutes']:g} minutes, seed {found['seed']}."
    )


def as_table(header: list[str], rows: list[list]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def table(found: dict) -> str:
    """A row a run: cases, and what was found."""
    rows = []
    for row in found["rows"]:
        what = ", ".join(f"{count:,} {kind}" for kind, count in row["found"].items()) or "nothing"
        rows.append([row["run"], f"{row['cases']:,}", f"{row['seconds']:,} s", what])
    rows += [[name, "0", "0 s", f"not run: {why}"] for name, why in found["left out"].items()]
    return as_table(["part", "cases", "time", "found"], rows)


def numeric(found: dict) -> str:
    """A row a run that compares numbers: results, those beyond the bounds, and those that could not be compared."""
    rows = []
    for row in found["rows"]:
        counts = row["counts"]
        if counts.get("results"):
            kinds = [f"{counts.get(kind, 0):,}" for kind in NUMERIC]
            rest = [f"{counts.get(name, 0):,}" for name in ("unstable", "left out, plain PyTorch not finite")]
            rows.append([row["run"], f"{row['cases']:,}", f"{counts['results']:,}", *kinds, *rest])
    header = [
        "run",
        "cases",
        "results",
        "beyond 2x",
        "beyond 5x",
        "float64 beyond 1e-9",
        "non-finite",
        "unstable",
        "no yardstick",
    ]
    return as_table(header, rows)


def write(found: dict) -> None:
    """JSON and markdown into out/campaign."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "campaign.json").write_text(json.dumps(found, indent=2) + "\n")
    words = [conditions(found), table(found), numeric(found), failures(found)]
    (OUT / "campaign.md").write_text("\n\n".join(words) + "\n")


def failures(found: dict, most: int = 40) -> str:
    """The findings and how to see each again; beyond 2x is told by its number alone."""
    told = [failure for failure in found["failures"] if is_failure(failure["kind"])]
    lines = []
    for failure in told[:most]:
        again = failure.get("command") or f"--part {failure.get('part')} --case {failure.get('case', {}).get('seed')}"
        said = failure["found"].strip().splitlines() or [""]
        first = said[-1] if failure["kind"] == ERROR else " ".join(said[:2]) if failure["kind"] == CRASH else said[0]
        what = f"{failure['what']}: " if failure.get("what") else ""
        lines.append(f"* {failure['run']}, `{again}`: {failure['kind']}: {what}{first[:200]}")
    if len(told) > most:
        lines.append(f"* and {len(told) - most} more: campaign.json has all")
    return "\n".join(lines)


def write_docs(found: dict, folder: Path = ROOT / "docs") -> None:
    """The tables into the pages that show them, between their marks."""
    for name, kind in PAGES.items():
        page = folder / name
        before, rest = page.read_text().split(START)
        _, after = rest.split(END)
        shown = [table(found), failures(found, most=10)] if kind == "table" else [numeric(found)]
        words = "\n\n".join([conditions(found), *filter(None, shown)])
        page.write_text(f"{before}{START}\n\n{words}\n\n{END}{after}")
