"""The GPU battery, in one command: build, GPU tests, and timings against perceiver-pytorch and dense attention.

    python benchmarks/gpu_battery.py --out DIR

Needs no network. benchmarks/GPU.md is its manual.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ in ("__main__", "__mp_main__"):  # this checkout's packages, whatever is installed; and no file beside this
    sys.path[0] = str(ROOT)

from benchmarks.gpu import cases, machine, prepare, record  # noqa: E402
from benchmarks.gpu.worker import Worker, WorkerLost  # noqa: E402
from benchmarks.output import plain, save  # noqa: E402

BUILD_SHARE, TEST_SHARE = 0.3, 0.3  # of the time, at most
CASE_SECONDS = 75.0  # a case that takes longer hangs
LEAST_SECONDS = 10.0  # with less left no case is started
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


def timed(args: argparse.Namespace, result: dict, wanted: list[cases.Case], start: float, end: float) -> None:
    """Measure the cases, keeping after each what there is."""
    dry = args.device == "cpu"
    compile_mode = args.compile or ("none" if args.quick or dry else "headline")
    options = {"device": args.device, "dry": dry, "compile_mode": compile_mode}
    worker = Worker(options, lambda line: print(line, flush=True))
    path, measured = args.out / "battery.json", result["cases"]
    result["compile"] = compile_mode
    try:
        if wanted and time.monotonic() < end:
            result["conditions"] |= worker.start()
        for number, case in enumerate(wanted, 1):
            seconds = end - time.monotonic()
            if seconds <= (0 if dry else LEAST_SECONDS):
                break
            print(f"[{number}/{len(wanted)}, {seconds:.0f} s left] {case.name}", flush=True)
            measured.append(worker.run(case, min(end, time.monotonic() + CASE_SECONDS)))
            print(f"  {record.summary(measured[-1])}", flush=True)
            save(path, result)
        if result["outcome"] == "running":
            result["outcome"] = "complete" if len(measured) == len(wanted) else "budget spent"
    except KeyboardInterrupt:
        result["outcome"] = "interrupted"
    except WorkerLost as error:
        result["outcome"] = f"failed: {error}"
    finally:
        reason = "the time was spent" if result["outcome"] == "budget spent" else result["outcome"]
        result["skipped"] += [{"case": case.name, "reason": reason} for case in wanted[len(measured) :]]
        worker.stop(at_once=result["outcome"] == "interrupted")
        result["conditions"]["clocks_at_end"] = machine.clocks()
        result["seconds"] = round(time.monotonic() - start, 1)
        save(path, result)


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
    end = start + seconds
    arch = None if args.device == "cpu" else capability()
    args.out.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result = {
        "format": 1,
        "outcome": "running",
        "dry_run": args.device == "cpu",
        "command": command_line(args),
        "conditions": {"date": now, "clocks_at_start": machine.clocks()},
        "build": {"outcome": "left out"},
        "tests": {"outcome": "left out"},
        "cases": [],
        "skipped": skipped,
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a time limit sends: to be kept like an interrupt
    try:
        if not args.no_build:
            result["build"] = prepare.build(args.out, BUILD_SHARE * seconds, arch)
        if not args.no_tests:
            result["tests"] = prepare.test(args.out, TEST_SHARE * seconds)
    except KeyboardInterrupt:
        result["outcome"], end = "interrupted", time.monotonic()
    from benchmarks.environment import git_commit  # imports the package, so after it was built

    result["conditions"]["git_commit"] = args.commit or git_commit()
    timed(args, result, wanted, start, end)
    return show(args, result)


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
