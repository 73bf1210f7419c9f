"""``python -m benchmarks``: run the benchmarks, print the ratios, keep the numbers."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

from rich.console import Console

from benchmarks.conftest import OPTIONS, SLOW_PEER
from benchmarks.environment import conditions, slug
from benchmarks.output import BUSY, listed, plain, save
from benchmarks.suite import report
from benchmarks.suite.plans import QUICK, select
from perceiver_fast.insight.environment import cpu_name

HERE = Path(__file__).resolve().parent
TABLE_WIDTH = 145  # the least that the tables need
NOTHING_COLLECTED = 5  # pytest's exit code


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="perceiver-fast beside its peers.")
    which = top.add_mutually_exclusive_group()
    for name, settings in OPTIONS.items():
        (which if name in ("--quick", "--geometry", "--all") else top).add_argument(name, **settings)
    top.add_argument("--only", default="", metavar="EXPRESSION", help='as pytest -k takes it: "not (sdpa or compile)"')
    where = "where the numbers go (default: benchmarks/results/<cpu>-<date>.json, numbered; of --quick: nowhere)"
    top.add_argument("--json", type=Path, help=where)
    return top


def run_pytest(geometry: str, args: argparse.Namespace) -> tuple[int, dict | None]:
    """Run the suite on one geometry; returns pytest's exit code and pytest-benchmark's record, None without one."""
    command = [sys.executable, "-m", "pytest", str(HERE), "-v", f"--threads={args.threads}", f"--rootdir={HERE.parent}"]
    command += ["-p", "no:cacheprovider"]  # nothing is left in the checkout
    command += ["--benchmark-columns=median,min,rounds", "--benchmark-group-by=func,param:geometry,param:pass_name"]
    command += ["--quick"] if args.quick else ["--geometry", geometry]
    command += ["--all"] if args.all else []
    for name in ("level", "batch", "dtype", "pass"):
        command += [f"--{name}={value}" for value in getattr(args, name)]
    wanted = [f"({args.only})"] if args.only else []
    wanted += [] if args.all or args.geometry or args.only else [f"not {SLOW_PEER}"]
    command += ["-k", " and ".join(wanted)] if wanted else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command.append(f"--benchmark-json={record}")
        code = subprocess.run(command, check=False, cwd=HERE.parent, env=environment).returncode
        return code, json.loads(record.read_text()) if record.exists() and record.stat().st_size else None


def collect(args: argparse.Namespace, geometries: list[str], path: Path | None) -> tuple[int, dict]:
    """Measure each of ``geometries`` in a process of its own, keeping what there is in ``path``, if any, after each.

    Returns 0, or 1 when something failed, and all results.
    """
    result = {"conditions": conditions(args.threads), "roofs": {}, "rows": [], "missing": []}
    codes = []
    for geometry in geometries:
        code, record = run_pytest(geometry, args)
        codes.append(0 if code == NOTHING_COLLECTED else code)
        if code == NOTHING_COLLECTED:
            result["missing"].append(report.lost(geometry, "it has nothing of what was asked for", "not run"))
        elif record is None:
            result["missing"].append(report.lost(geometry, f"pytest ended with exit code {code} and no record"))
        else:
            result["rows"] += report.rows(record)
            result["missing"] += record["missing"]
            result["roofs"][geometry] = record["roofs"]
        if result["rows"] and path is not None:
            save(path, result)
    return max(map(bool, codes)), result


def free_path() -> Path:
    """Where today's numbers go; no earlier ones are there."""
    stem = f"{slug(cpu_name())}-{datetime.date.today().isoformat()}"
    names = (stem + (f"-{number}" if number > 1 else "") for number in count(1))
    return next(path for path in (HERE / "results" / f"{name}.json" for name in names) if not path.exists())


def show(console: Console, result: dict) -> None:
    """Print the tables, what is missing from them and the conditions."""
    for table in report.tables(result["rows"], result["missing"]):
        console.print(table)
    plain(console, *report.missing_lines(result["missing"]), listed(result["conditions"]))
    if (result["conditions"]["load_at_start"] or 0) > BUSY:
        console.print("The machine was busy with other work when this began: expect noise.")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 when a result is wrong or failed, or 2 when nothing could be measured."""
    args = parser().parse_args(argv)
    path = args.json or (None if args.quick else free_path())
    geometries = select([QUICK] if args.quick else args.geometry, args.all, args.level)
    if not geometries:
        print(f"expected geometries that have --level {' or '.join(args.level)}, got none: see --help", file=sys.stderr)
        return 2
    code, result = collect(args, geometries, path)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)  # also on a terminal: a table cut short says nothing
    show(console, result)
    if not (args.all or args.geometry or args.only):
        console.print(f"not run: {SLOW_PEER}; --geometry and --all measure it")
    if not result["rows"]:
        return code or 2
    plain(console, f"Numbers: {path}" if path else "Numbers were not kept: --json PATH keeps them")
    return code


if __name__ == "__main__":
    sys.exit(main())
