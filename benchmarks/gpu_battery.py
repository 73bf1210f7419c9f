"""The GPU battery, in one command: build, GPU tests, and timings against perceiver-pytorch and dense attention.

    python benchmarks/gpu_battery.py --out DIR

Needs no network. benchmarks/GPU.md is its manual.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ in ("__main__", "__mp_main__"):  # this checkout's packages, whatever is installed; and no file beside this
    sys.path[0] = str(ROOT)

from benchmarks.gpu import cases, machine, prepare, record, runs  # noqa: E402
from benchmarks.gpu.steps import Steps  # noqa: E402
from benchmarks.output import plain  # noqa: E402

INTERRUPTED = 130


class Refused(RuntimeError):
    """What was asked for cannot be done here."""


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(
        prog="python benchmarks/gpu_battery.py",
        description="Build, test and time perceiver-fast on a GPU. benchmarks/GPU.md is the manual.",
    )
    top.add_argument("--out", type=Path, metavar="DIR", help="where battery.json, logs and reports go")
    top.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)g)")
    top.add_argument("--run", choices=runs.RUNS, help="one of two runs for a GPU that one has for minutes only")
    top.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run at tiny sizes")
    top.add_argument("--no-build", action="store_true", help="leave the extension as it is")
    top.add_argument("--no-tests", action="store_true", help="time only")
    which = top.add_argument_group("which cases (default: all, the most telling first; repeat an option for several)")
    which.add_argument(
        "--quick", action="store_true", help=f"{', '.join(cases.HEAD)}: op, forward, batch 8, no compile"
    )
    for name, known in (("geometry", cases.NAMES), ("dtype", cases.DTYPES), ("level", cases.LEVELS)):
        which.add_argument(f"--{name}", action="append", default=[], choices=known)
    which.add_argument("--pass", dest="passes", action="append", default=[], choices=cases.PASSES)
    which.add_argument("--batch", action="append", default=[], type=cases.batch_size, metavar="B")
    name = {"type": cases.parse_case, "metavar": "NAME"}
    which.add_argument("--case", action="append", default=[], help="exactly this, as --list names it", **name)
    which.add_argument("--compile", choices=("headline", "all", "none"), help="where compiled peers are measured")
    which.add_argument("--list", action="store_true", help="print the cases in their order, and stop")
    loop = top.add_argument_group("one case in a loop, for ncu and nsys; nothing is measured")
    loop.add_argument("--profile", help="the case; marks the loop by cudaProfilerStart and Stop", **name)
    loop.add_argument("--side", default="fast", help="whose (default: %(default)s)")
    loop.add_argument("--iterations", type=int, default=20, help="calls (default: %(default)s)")
    top.add_argument("--commit", help="what to record where there is no git (default: ask git)")
    return top


def chosen(args: argparse.Namespace) -> tuple[list[cases.Case], list[dict]]:
    """The cases asked for, in order, and those left out with the reason."""
    if args.case:
        return args.case, []
    options = {"levels": args.level, "geometries": args.geometry, "batches": args.batch}
    options |= {"dtypes": args.dtype, "passes": args.passes}
    quick = {"levels": ["op"], "geometries": cases.HEAD, "batches": [8], "passes": ["forward"]} if args.quick else {}
    return cases.select(**quick | {name: values for name, values in options.items() if values})


def capability() -> str | None:
    """The device's, as "90".

    Raises:
        Refused: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise Refused(f"torch {torch.__version__} sees no CUDA device; --device cpu makes a dry run")
    return "{}{}".format(*torch.cuda.get_device_capability())


def show(args: argparse.Namespace, result: dict) -> int:
    """Print the tables, also into battery.txt; returns the exit code."""
    from rich.console import Console

    from benchmarks.environment import slug

    complaints = record.complaints(result)
    conditions = result["conditions"]
    day = conditions["date"][:10]
    with (args.out / "battery.txt").open("w") as file:
        for console in (Console(width=140), Console(width=140, file=file)):
            for table in record.tables(result):
                console.print(table)
            plain(
                console,
                f"build: {result['build']['outcome']}",
                f"tests: {result['tests']['outcome']} ({result['tests'].get('tests', 0)})",
                *(f"{kind}: {result[kind]['outcome']}" for kind in record.COMMANDS if kind in result),
                f"skipped: {record.skipped_line(result)}",
                *(f"FAILED: {line}" for line in complaints),
            )
    name = f"{slug(conditions.get('device', 'unknown'))}-{day}.json"
    print(f"{result['outcome']} in {result['seconds']:.0f} s; {args.out / 'battery.json'}")
    if not result["dry_run"]:
        print(f"to keep it: cp {args.out / 'battery.json'} benchmarks/results/{name}")
    return INTERRUPTED if result["outcome"] == "interrupted" else int(bool(complaints))


def run(args: argparse.Namespace, wanted: list[cases.Case], skipped: list[dict]) -> int:
    """The whole battery; returns its exit code: 0, or 1 for failing tests or a wrong result of ours."""
    start, seconds = time.monotonic(), 60 * args.minutes
    prepare.link_kernels()
    if args.run:
        seconds, steps = runs.RUNS[args.run]
        steps = tuple(replace(step, cases=step.cases[:1]) for step in steps) if args.device == "cpu" else steps
    else:
        steps = runs.everything(seconds, wanted, not args.no_build, not args.no_tests)
    arch = None if args.device == "cpu" else capability()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(
        "PERCEIVER_FAST_TRUST_KERNELS", "1"
    )  # trials and tests ask, and no time is to hold their asking
    compile_mode = args.compile or ("none" if args.quick or args.device == "cpu" else "headline")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    known = args.commit if any(step.kind == "build" for step in steps) else commit(args)
    result = {
        "format": 1,
        "outcome": "running",
        "dry_run": args.device == "cpu",
        "command": command_line(args),
        "compile": compile_mode,
        "conditions": {"date": now, "git_commit": known, "clocks_at_start": machine.clocks()},
        "build": {"outcome": "left out"},
        "tests": {"outcome": "left out"},
        "cases": [],
        "skipped": [] if args.run else skipped,
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a time limit sends: to be kept like an interrupt
    doing = Steps(args.out, result, arch, compile_mode)
    doing.save()
    doing.run(steps, start + seconds - (runs.MARGIN if args.run else 0))
    result["conditions"]["git_commit"] = commit(args)
    doing.save()
    return show(args, result)


def commit(args: argparse.Namespace) -> str | None:
    """What is measured. To ask git imports the package, which may have to be built before."""
    from benchmarks.environment import git_commit

    return args.commit or git_commit()


def command_line(args: argparse.Namespace) -> str:
    """As typed, without this machine's folders."""
    names = {str(args.out): "DIR", f"--out={args.out}": "--out=DIR"}
    return shlex.join(["python", "benchmarks/gpu_battery.py", *(names.get(part, part) for part in sys.argv[1:])])


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    top = parser()
    args = top.parse_args(argv)
    wanted, skipped = chosen(args)
    if args.list:
        print("\n".join(case.name for case in wanted))
        return 0
    try:
        if args.profile:
            return profile(args)
        if args.out is None:
            raise Refused("--out DIR is needed: results are written there after every case")
        if not wanted:
            raise Refused(f"nothing to measure: {skipped[0]['case']} is {skipped[0]['reason']}")
        return run(args, wanted, skipped)
    except Refused as error:
        top.error(str(error))


def profile(args: argparse.Namespace) -> int:
    """Run one side of one case in a loop."""
    if args.device == "cuda":
        capability()
    import torch

    from benchmarks.gpu import measure_case, sides

    if args.side not in sides.PEERS:
        raise Refused(f"--side: expected one of {', '.join(sides.PEERS)}, got {args.side!r}")
    measure_case.use_exact_float32()
    measure_case.profile(args.profile, args.side, torch.device(args.device), args.device == "cpu", args.iterations)
    return 0


if __name__ == "__main__":
    sys.exit(main())
