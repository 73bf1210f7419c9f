"""``python -m tests.campaign``: fuzz the package for some minutes, print a table, and keep what fails.

Exit status: 0 nothing was found, 1 something was, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

from . import OUT
from .child import Child
from .outcome import is_failure
from .plan import BUILDING, PARTS, ordinary, sanitized
from .report import as_table, beyond_chance, failed, failures, numeric, record, table, write, write_docs
from .sweep import Run, Sweep


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser("python -m tests.campaign", description=__doc__)
    options.add_argument("--minutes", type=float, default=10.0, help="for all of it, builds too (default: %(default)s)")
    options.add_argument("--seed", type=int, help="the first case's; the others follow (default: drawn, and printed)")
    options.add_argument("--part", action="append", choices=list(PARTS), help="only this; repeatable (default: all)")
    options.add_argument("--cases", type=int, help="at most so many of each run (default: what the time allows)")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: %(default)s)")
    options.add_argument("--isa", help="run on this instruction set alone (default: every one of this machine)")
    options.add_argument(
        "--case", type=int, metavar="SEED", help="run one case of one --part by its seed, and print it"
    )
    options.add_argument("--file", type=Path, help="run the case of a failure saved in out/campaign")
    options.add_argument(
        "--write-docs", action="store_true", help="put the tables into docs/ (default: leave docs alone)"
    )
    options.add_argument("--list", action="store_true", help="name the parts and what they do")
    return options


def one_case(run: Run, case: dict) -> int:
    """Run a case, print it and what was found."""
    print(json.dumps(case, indent=2))
    with Child(run.part, run.env, run.folder) as child:
        outcome = child.run(case)
    print(json.dumps(outcome.counts, indent=2))
    for kind, text in outcome.findings.items():
        print(f"{kind}: {text}")
    return int(any(map(is_failure, outcome.findings)))


class Progress:
    """One line that tells what runs; on a terminal it is written over.

    Args:
        end: when the campaign ends, as time.monotonic() counts.
    """

    def __init__(self, end: float):
        self.end, self.last, self.terminal = end, 0.0, sys.stderr.isatty()

    def __call__(self, sweep: Sweep) -> None:
        now = time.monotonic()
        if now - self.last < (0.5 if self.terminal else 30):
            return
        self.last = now
        found = sum(is_failure(failure["kind"]) for failure in sweep.failures)
        left = max(0, round(self.end - now))
        text = f"{sweep.run.name}: {sweep.cases:,} cases, {found} found; {left // 60}:{left % 60:02d} left"
        print(
            f"\r\033[K{text}" if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )


def campaign(parts: list[str], args: argparse.Namespace, seed: int, end: float) -> tuple[list, dict[str, str]]:
    """Run the parts, each for its share of what time is left when its turn comes.

    Returns:
        What ran, and what could not be built, with the reason.
    """
    progress, planned, left_out = Progress(end), [], {}
    if "sanitizers" in parts:
        print("building with sanitizers, minutes the first time ..", file=sys.stderr, flush=True)
        seconds = BUILDING * (end - time.monotonic())
        planned, left_out = sanitized(seconds, seed, args.jobs, args.cases, progress)
    for part in parts:
        if part != "sanitizers":
            planned += ordinary(part, seed, args.jobs, args.cases, args.isa, progress)
    swept = []
    for index, share in enumerate(planned):
        weight = share.weight / sum(other.weight for other in planned[index:])
        swept.append(share.start(max(0.0, end - time.monotonic()) * weight))
    if progress.terminal:
        print(file=sys.stderr)
    return swept, left_out


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for; returns the exit status."""
    options = parser()
    args = options.parse_args(argv)
    if args.list:
        print(as_table(["part", "what it does"], [list(row) for row in PARTS.items()]))
        return 0
    env = {} if args.isa is None else {"PERCEIVER_FAST_CPU_ISA": args.isa}
    if args.file is not None:
        saved = json.loads(args.file.read_text())
        return one_case(Run(saved["part"], env=saved["env"] | env), saved["case"])
    if args.case is not None:
        if args.part is None or len(args.part) != 1 or args.part == ["sanitizers"]:
            options.error("--case: expected one --part that the seed is of, e.g. --part numeric --case 7")
        return one_case(
            Run(args.part[0], env=env), importlib.import_module(f"{__package__}.{args.part[0]}").draw(args.case)
        )
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    end = time.monotonic() + 60 * args.minutes
    print(f"seed {seed}, {args.minutes:g} minutes, {args.jobs} processes", file=sys.stderr)
    swept, left_out = campaign(args.part or list(PARTS), args, seed, end)
    found = record(swept, left_out, seed, args.minutes)
    write(found)
    print(f"{table(found)}\n\n{numeric(found)}\n\n{failures(found)}")
    for row in found["rows"]:
        if beyond_chance(row):
            print(f"{row['run']}: more results beyond twice plain PyTorch's error than chance explains")
    print(f"kept in {OUT.relative_to(OUT.parents[1])}")
    if args.write_docs:
        write_docs(found)
    return int(failed(found))


if __name__ == "__main__":
    sys.exit(main())
