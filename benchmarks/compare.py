"""``python -m benchmarks.compare OLD.json NEW.json``: what became slower, larger or less exact, and what is only noise.

Both are results of ``python -m benchmarks``. Rows are matched by level, geometry, pass, batch, dtype and peer. The peers
that are not ours have not changed: what happened to their times happened to the machine, so ours are also judged over
the geometric mean of their ratios. A difference counts when it exceeds the threshold and twice the standard deviation of
these, and the two spreads are apart: from the first to the third quartile, or from the fastest call to the median in
results that hold no quartiles.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

from benchmarks.compare_view import markdown, show
from benchmarks.output import BUSY, as_json
from benchmarks.statistic import judge
from perceiver_fast.insight.console import CannotRun, wide_console

KEY = ("level", "geometry", "pass", "batch", "dtype", "peer")
OURS = "fast"
NO_WITNESSES = ("reference", "smart-dense")  # peers that this package has a part in: they tell nothing of the machine
VERSIONS = ("python", "torch", "perceiver-pytorch", "transformers", "perceiver-io")
WATCHED = ("cpu", "isa", "cores", "threads", *VERSIONS, "forced_backend")
THRESHOLD = 0.1
LEAST_MEMORY = 2**20  # what the resident set differs by between two equal calls
LEAST_ERROR = 1e-6  # below it an error is float32's rounding
LESS_EXACT = 2.0
BAD = {"slower", "more memory", "less exact", "failed"}


def load(path: Path) -> dict:
    """The result in ``path``, its rows keyed in ``"by_key"``.

    Raises:
        CannotRun: the file cannot be read, or is no result of ``python -m benchmarks``.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CannotRun(f"{path}: expected a result of python -m benchmarks --json, but {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        hint = "; pytest-benchmark's own files are for `pytest-benchmark compare`" if "benchmarks" in result else ""
        raise CannotRun(f'{path}: expected a result of python -m benchmarks, with "rows", got none{hint}')
    by_key = {}
    for row in result["rows"]:
        if absent := [name for name in (*KEY, "median") if name != "batch" and name not in row]:
            raise CannotRun(f"{path}: expected every row to have {', '.join(absent)}, got {sorted(row)}")
        if not row["median"] > 0:
            raise CannotRun(f"{path}: expected medians of more than 0 seconds, got {row['median']}")
        if key_of(row) in by_key:
            raise CannotRun(f"{path}: expected one row for {' '.join(map(str, key_of(row)))}, got two")
        by_key[key_of(row)] = row
    return {"conditions": {}, "missing": [], **result, "by_key": by_key}


def key_of(row: dict) -> tuple:
    """What a row is matched by. The first results did not write a batch down, and had the dtype in the pass."""
    old = {"dtype": "bfloat16"} if row["pass"].endswith("-bf16") else {}
    row = {"batch": 1, "dtype": "float32", **row, **old, "pass": row["pass"].removesuffix("-bf16")}
    return tuple(row[name] for name in KEY)


def is_ours(peer: str) -> bool:
    """Whether the package is what a peer measures: "fast", and its variants "fast-..."."""
    return peer.split("-")[0] == OURS


def spread(row: dict) -> tuple[float, float]:
    """Between which seconds half of a row's calls are; from the fastest to the median where nothing more is known."""
    if row.get("q1") is not None and row.get("q3") is not None:
        return row["q1"], row["q3"]
    least = row.get("min") or row["median"]
    if row.get("iqr") is not None:
        return max(least, row["median"] - row["iqr"] / 2), row["median"] + row["iqr"] / 2
    return least, row["median"]


def judge_time(old: dict, new: dict, machine: float, threshold: float) -> str:
    """slower, faster or same; ``machine`` is the ratio of times of what did not change."""
    (old_low, old_high), (new_low, new_high) = spread(old), spread(new)
    ratios = new["median"] / old["median"], new_low / old_high, new_high / old_low
    ratio, low, high = (ratio / machine for ratio in ratios)
    return judge(ratio, low, high, threshold)


def judge_rest(old: dict, new: dict, threshold: float) -> list[str]:
    """What can be said of memory and errors; nothing, mostly."""
    found = []
    before, after = old.get("peak_memory_bytes"), new.get("peak_memory_bytes")
    if before is not None and after is not None and abs(after - before) > LEAST_MEMORY:
        found += ["more memory"] if after > before * (1 + threshold) else []
        found += ["less memory"] if before > after * (1 + threshold) else []
    errors = [(old.get(name), new.get(name)) for name in ("relative_error", "gradient_error")]
    if any(None not in pair and pair[1] > max(LEAST_ERROR, LESS_EXACT * pair[0]) for pair in errors):
        found.append("less exact")
    return found


def machine_change(old: dict, new: dict) -> dict | None:
    """How the times of the peers that are not ours changed.

    Returns:
        None when no such peer is in both; else ``factor``, the geometric mean of their ratios, ``lowest``, ``highest``,
        how many ``rows`` these are, and their ``noise``: twice the standard deviation of the logarithms, as a share.
    """
    ratios = [
        new["by_key"][key]["median"] / row["median"]
        for key, row in old["by_key"].items()
        if key in new["by_key"] and not is_ours(row["peer"]) and row["peer"] not in NO_WITNESSES
    ]
    if not ratios:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    noise = math.expm1(2 * statistics.stdev(logs)) if len(logs) > 1 else 0.0
    factor = math.exp(statistics.mean(logs))
    return {"factor": factor, "lowest": min(ratios), "highest": max(ratios), "rows": len(ratios), "noise": noise}


def warnings(old: dict, new: dict) -> list[str]:
    """What differs between the runs but the package."""
    before, after = old["conditions"], new["conditions"]
    lines = [
        f"{name} differs: {before[name]}, then {after[name]}"
        for name in WATCHED
        if name in before and name in after and before[name] != after[name]
    ]
    for which, conditions in (("old", before), ("new", after)):
        if (load := conditions.get("load_at_start") or 0) > BUSY:
            lines.append(f"the machine was busy with other work when the {which} run began: load {load}")
    return lines


def why_missing(key: tuple, result: dict) -> dict | None:
    """The record of what was not measured that covers ``key``, which has no row in ``result``."""
    for row in result["missing"]:
        lost = row["level"].startswith("every ")  # with all that was to be measured of a geometry
        if row["geometry"] == key[KEY.index("geometry")] if lost else key_of(row) == key:
            return row
    return None


def compare(old: dict, new: dict, threshold: float = THRESHOLD) -> dict:
    """Every row of two loaded results, side by side, as JSON holds it; times in seconds, memory in bytes."""
    machine = machine_change(old, new)
    factor = machine["factor"] if machine else 1.0
    time_threshold = max(threshold, machine["noise"]) if machine else threshold
    rows = []
    for key in dict.fromkeys([*old["by_key"], *new["by_key"]]):
        sides = {"old": old["by_key"].get(key), "new": new["by_key"].get(key)}
        row = dict(zip(KEY, key, strict=True)) | {"ratio": None, "normalised": None, "note": None}
        if sides["old"] and sides["new"]:
            row["ratio"] = sides["new"]["median"] / sides["old"]["median"]
            row["normalised"] = row["ratio"] / factor
            row["verdict"] = [judge_time(sides["old"], sides["new"], factor, time_threshold)]
            row["verdict"] += judge_rest(sides["old"], sides["new"], threshold)
        else:
            there, gone = ("old", new) if sides["old"] else ("new", old)
            reason = why_missing(key, gone) or {}
            row["note"] = reason.get("reason")
            row["verdict"] = [f"only in {there}"]
            row["verdict"] += ["failed"] if gone is new and reason.get("outcome") == "failed" else []
        row["regression"] = is_ours(row["peer"]) and bool(BAD & set(row["verdict"]))
        for name in ("median", "peak_memory_bytes", "relative_error", "gradient_error"):
            row |= {f"{side}_{name}": (values or {}).get(name) for side, values in sides.items()}
        rows.append(row)
    return {
        "old": old["conditions"].get("git_commit"),
        "new": new["conditions"].get("git_commit"),
        "warnings": warnings(old, new),
        "threshold": threshold,
        "time_threshold": time_threshold,
        "machine": machine,
        "rows": rows,
        "regressions": sum(row["regression"] for row in rows),
    }


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Two results of python -m benchmarks: slower, larger or less exact, and what is only noise.",
        epilog="Files that pytest-benchmark wrote itself (--benchmark-json) are for `pytest-benchmark compare`.",
    )
    top.add_argument("old", type=Path, metavar="OLD.json")
    top.add_argument("new", type=Path, metavar="NEW.json")
    help = "smallest change of time or memory that counts (default: %(default)s)"
    top.add_argument("--threshold", type=float, default=THRESHOLD, metavar="SHARE", help=help)
    top.add_argument("--json", action="store_true", help="print JSON")
    top.add_argument("--markdown", type=Path, metavar="FILE", help="also write a table for a pull request")
    top.add_argument("--fail", action="store_true", help="exit code 1 on a regression of ours")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 on a regression with ``--fail``, or 2 when there is nothing to compare."""
    args = parser().parse_args(argv)
    try:
        if not args.threshold >= 0:
            raise CannotRun(f"--threshold: expected a share of at least 0, got {args.threshold}")
        old, new = load(args.old), load(args.new)
        if not old["by_key"].keys() & new["by_key"].keys():
            raise CannotRun("the files have no row in common: expected the same geometries and passes in both")
        comparison = compare(old, new, args.threshold)
        if args.markdown:
            args.markdown.write_text(markdown(comparison))
    except (CannotRun, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(as_json(comparison), end="")
    else:
        show(wide_console(), comparison)
    return 1 if args.fail and comparison["regressions"] else 0


if __name__ == "__main__":
    sys.exit(main())
