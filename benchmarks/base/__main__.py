"""``python -m benchmarks.base REV``: this checkout beside another of its revisions, in turns, by identical code.

The revision is checked out and built in a temporary folder. Each side is a living process (``worker.py``) with the
same weights and input, and they are timed in turns, base and new, again and again: noise of the machine that lasts longer
than a turn hits both, and the ratio of a round's two times is free of it. A difference counts when the 95 % confidence
interval of the rounds' median ratio excludes 1 and the median is beyond the threshold.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import ExitStack
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks import output
from benchmarks.base.measure import Worker, WorkerError, measure
from benchmarks.base.tree import build, commit_of, is_dirty, stale_source, worktree
from benchmarks.compare_view import coloured
from benchmarks.environment import DEFAULT_THREADS, ROOT, conditions
from benchmarks.statistic import LEAST_ROUNDS
from perceiver_fast.insight.console import CannotRun, Report, at_least, positive, progress, wide_console
from perceiver_fast.insight.geometries import GEOMETRIES

GEOMETRY_NAMES, QUICK = ("cross-only", "readme"), ("cross-only",)
PASSES, DTYPES = ("forward", "step"), ("float32", "bfloat16")
ROUNDS, QUICK_ROUNDS = 20, 10
THRESHOLD = 0.05
HEADERS = ("geometry, pass", "base", "new", "ratio", "95 % interval", "difference:\noutput", "\ngradient", "verdict")
CAPTION = (
    "Medians of the rounds; ratio: median of the rounds' ratios, and its interval; difference: of the results, relative"
)


def warnings(facts: dict[str, dict], dirty: bool) -> list[str]:
    """What a reader has to know of the two sides.

    Raises:
        CannotRun: one lacks the C++ kernels, and nobody asked for that.
    """
    for side, found in facts.items():
        if found["extension_error"] and os.environ.get("PERCEIVER_FAST_SKIP_BUILD", "") in ("", "0"):
            advice = "build it, or set PERCEIVER_FAST_SKIP_BUILD=1 to compare without"
            raise CannotRun(f"{side}: {found['extension_error']}; {advice}")
    lines = [f"{side} runs without the C++ kernels" for side, found in facts.items() if found["isa"] is None]
    if dirty:
        lines.append("this checkout differs from its commit: its changes are part of the new side")
    if source := stale_source(ROOT):
        lines.append(f"new's extension is older than {source.relative_to(ROOT)}: build it again if that changed")
    return lines


def run(args: argparse.Namespace, say: Report) -> dict:
    """Check out, build and measure; returns everything, as JSON holds it."""
    result = {
        "conditions": conditions(args.threads),
        "base": {"revision": args.revision, "commit": commit_of(ROOT, args.revision)},
        "new": {"commit": commit_of(ROOT, "HEAD"), "dirty": is_dirty(ROOT)},
    }
    with ExitStack() as stack:
        say(f"checking out {args.revision}")
        folder = stack.enter_context(worktree(ROOT, result["base"]["commit"]))
        say(f"building {args.revision}", "minutes")
        build(folder / "tree", folder / "build", lambda line: say(f"building {args.revision}", line))
        trees = {"base": folder / "tree", "new": ROOT}
        sides = [stack.enter_context(Worker(*side, folder / side[0], args.threads)) for side in trees.items()]
        try:
            facts = {side.name: side.ask("facts") for side in sides}
        except WorkerError as error:
            raise CannotRun(f"{error}; `pip install -e .` makes this checkout importable") from error
        result |= {"warnings": warnings(facts, result["new"]["dirty"]), "rows": [], "missing": []}
        for side, found in facts.items():
            result[side] |= found
        names = args.geometry or (QUICK if args.quick else GEOMETRY_NAMES)
        rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
        for name, pass_name, dtype in product(names, args.passes or PASSES, args.dtype or DTYPES[:1]):
            case = {"pass": pass_name, "dtype": dtype, "batch": args.batch}
            try:
                result["rows"].append(measure(sides, GEOMETRIES[name], case, rounds, args.threshold, folder, say))
            except WorkerError as error:
                result["missing"].append({"geometry": name, **case, "reason": str(error)})
    return result


def show(console: Console, result: dict) -> None:
    """Print for people: warnings first."""
    output.warn(console, result["warnings"])
    base, new = result["base"], result["new"]
    changes = " with changes" if new["dirty"] else ""
    title = escape(f"{base['revision']} ({base['commit'][:9]}) → {new['commit'][:9]}{changes}")
    rows = [
        (
            output.described(row),
            *(output.milliseconds(row[side]["median"]) for side in ("base", "new")),
            f"{row['ratio']:.3f}x",
            f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
            *(
                "-" if (apart := row[f"{what}_difference"]) is None else f"{apart:.1e}"
                for what in ("output", "gradient")
            ),
            coloured([row["verdict"], *(["other results"] if not row["same_results"] else [])]),
        )
        for row in result["rows"]
    ]
    console.print(output.table(title, HEADERS, rows, left=(0, len(HEADERS) - 1), caption=CAPTION))
    output.plain(console, *(f"not measured: {output.described(row)}: {row['reason']}" for row in result["missing"]))
    output.plain(console, output.listed(result["conditions"]))


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.base",
        description="This checkout beside another of its revisions, which is built in a temporary folder; in turns.",
    )
    add, unless = top.add_argument, f"(default: {', '.join(GEOMETRY_NAMES)})"
    add("revision", metavar="REV", help="a commit, branch or tag: HEAD~3, main, v0.1")
    add("--geometry", action="append", choices=list(GEOMETRIES), help=f"repeat for several {unless}")
    add("--pass", dest="passes", action="append", choices=PASSES, help="repeat for several (default: both)")
    add("--dtype", action="append", choices=DTYPES, help="bfloat16: autocast; repeat for several (default: float32)")
    add("--batch", type=positive, default=1, help="inputs at once (default: %(default)s)")
    add("--quick", action="store_true", help=f"{', '.join(QUICK)} alone, unless --geometry; {QUICK_ROUNDS} rounds")
    add("--rounds", type=at_least(LEAST_ROUNDS), help=f"turns of each side (default: {ROUNDS})")
    add("--threads", type=positive, default=DEFAULT_THREADS, help="of either side (default: %(default)s)")
    help = "the smallest change that counts (default: %(default)s)"
    add("--threshold", type=float, default=THRESHOLD, metavar="SHARE", help=help)
    add("--json", type=Path, metavar="PATH", help="where to keep the numbers; -: standard output, instead of the table")
    add("--fail", action="store_true", help="exit code 1 when the new side is slower")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 when results differ, something could not be measured, or with ``--fail`` is slower; 2 when nothing could.
    """
    args = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no temporary folder behind either
    try:
        if args.json and str(args.json) != "-":
            args.json.parent.mkdir(parents=True, exist_ok=True)
        with progress() as say:
            result = run(args, say)
    except (CannotRun, OSError) as error:
        print(f"base: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("base: interrupted; its temporary folder is gone", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    output.deliver(result, args.json, lambda: show(wide_console(), result))
    if not result["rows"]:
        print(f"base: nothing could be measured: {result['missing'][0]['reason']}", file=sys.stderr)
        return 2
    slower = args.fail and any(row["verdict"] == "slower" for row in result["rows"])
    return int(bool(slower or result["missing"] or not all(row["same_results"] for row in result["rows"])))


if __name__ == "__main__":
    sys.exit(main())
