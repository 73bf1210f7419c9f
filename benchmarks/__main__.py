"""``python -m benchmarks``: run the benchmarks, print the ratios, keep the numbers."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.geometries import GEOMETRIES, select
from benchmarks.measure import DEFAULT_THREADS

HERE = Path(__file__).resolve().parent
TABLE_WIDTH = 120  # the least that the tables need
BUSY = 0.5  # a load average above this is other work
QUICK_GEOMETRY = "cross-only"
SLOW_PEER = "compile-eager"  # compiles for as long as "compile" and is seldom the faster of the two


def parser() -> argparse.ArgumentParser:
    """All options."""
    slow = ", ".join(name for name, geometry in GEOMETRIES.items() if not geometry.default)
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="perceiver-fast beside perceiver-pytorch.")
    which = top.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help=f"only {QUICK_GEOMETRY}")
    which.add_argument(
        "--geometry",
        action="append",
        default=[],
        choices=list(GEOMETRIES),
        help=f"one to measure, also by {SLOW_PEER}; repeat for several (default: all but {slow})",
    )
    which.add_argument("--all", action="store_true", help=f"every geometry, also {slow}, and {SLOW_PEER}")
    top.add_argument("--only", default="", metavar="EXPRESSION", help='as pytest -k takes it: "forward and not sdpa"')
    top.add_argument("--threads", type=int, default=DEFAULT_THREADS, help="threads (default: %(default)s)")
    top.add_argument("--json", type=Path, help="where the numbers go (default: benchmarks/results/<cpu>-<date>.json)")
    return top


def with_slow_peer(args: argparse.Namespace) -> bool:
    """Whether the request is for everything there is to know about a geometry."""
    return bool(args.all or args.geometry)


def run_pytest(geometry: str, args: argparse.Namespace) -> tuple[int, dict | None]:
    """Run the suite on one geometry; returns pytest's exit code and pytest-benchmark's record, None without one."""
    command = [sys.executable, "-m", "pytest", str(HERE), "-v", "--threads", str(args.threads), "--geometry", geometry]
    command += ["--benchmark-columns=median,min,rounds", "--benchmark-group-by=func,param:geometry,param:pass_name"]
    wanted = [f"({args.only})"] if args.only else []
    wanted += [] if with_slow_peer(args) or args.only else [f"not {SLOW_PEER}"]
    command += ["-k", " and ".join(wanted)] if wanted else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command.append(f"--benchmark-json={record}")
        code = subprocess.run(command, check=False, cwd=HERE.parent, env=environment).returncode
        return code, json.loads(record.read_text()) if record.exists() and record.stat().st_size else None


def collect(args: argparse.Namespace, path: Path) -> tuple[int, dict]:
    """Measure every geometry in a process of its own, keeping what there is in ``path`` after each.

    Returns the first exit code that is not 0, and all results.
    """
    result = {"conditions": report.conditions(args.threads), "rows": [], "missing": []}
    codes = []
    for geometry in select([QUICK_GEOMETRY] if args.quick else args.geometry, args.all):
        code, record = run_pytest(geometry, args)
        codes.append(code)
        if record is None:
            result["missing"].append(report.lost(geometry, f"pytest ended with exit code {code} and no record"))
        else:
            result["rows"] += report.rows(record)
            result["missing"] += record["missing"]
        if result["rows"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
    return next((code for code in codes if code), 0), result


def show(console: Console, result: dict) -> None:
    """Print the tables, what is missing from them and the conditions."""
    for table in report.tables(result["rows"], result["missing"]):
        console.print(table)
    for line in report.missing_lines(result["missing"]):
        console.print(line, highlight=False, markup=False)
    conditions = result["conditions"]
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()), highlight=False, markup=False)
    if (conditions["load_at_start"] or 0) > BUSY:
        console.print("The machine was busy with other work when this began: expect noise.")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns pytest's exit code."""
    args = parser().parse_args(argv)
    today = datetime.date.today().isoformat()
    path = args.json or HERE / "results" / f"{report.slug(report.cpu_name())}-{today}.json"
    code, result = collect(args, path)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    show(console, result)
    if not with_slow_peer(args):
        console.print(f"not run: {SLOW_PEER}; --geometry and --all measure it")
    if not result["rows"]:
        return code or 1
    console.print(f"Numbers: {path}", highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
