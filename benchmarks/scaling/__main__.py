"""``python -m benchmarks.scaling``: time and peak memory of one cross-attention as its input, or its latents, grow.

The model is cross-only: one cross-attention to a square grid, by perceiver-fast and by perceiver-pytorch in the forms its
users run it in, each point in processes of its own. A peer stops where it would need more memory than there is, by its
last point or by failing within its limit, and where a call takes too long. Points are stored one by one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import output
from benchmarks.environment import DEFAULT_THREADS, conditions, slug
from benchmarks.scaling.plot import draw
from benchmarks.scaling.point import PEERS, Fingerprint, Limits, Stopped, available_bytes, case_of, difference, measure
from benchmarks.scaling.record import MEASURED, Point, curve, exponent, read, write
from benchmarks.sides import DTYPES, OURS, Case
from benchmarks.suite.memory import memory_method
from benchmarks.suite.models import PEERS as MODELS
from perceiver_fast.insight.console import Report, positive, progress, wide_console
from perceiver_fast.insight.environment import cpu_name

RESULTS = Path(__file__).resolve().parents[1] / "results"
PASSES = ("forward", "step")
SIDES = {"tokens": (32, 56, 100, 178, 316, 562, 1000, 1778, 3162), "latents": (224,)}  # squares: half decades of M
LATENTS = {"tokens": (512,), "latents": (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)}
QUICK = 5  # the sizes of an axis that --quick keeps
LIMIT_SECONDS = 60.0
HOPELESS = 4  # times the allowed memory: a peer expected to need more is not even tried
SAME = {"float32": 1e-3, "bfloat16": 1e-1}  # what peers' results may differ by
VALUES = {"time": "median", "memory": "peak_memory_bytes"}  # what exponents are fitted to


def sizes(axis: str, quick: bool) -> list[tuple[int, int]]:
    """The grid's side and the latents of every point of an axis, from small to large."""
    every = [(side, latents) for side in SIDES[axis] for latents in LATENTS[axis]]
    return every[:QUICK] if quick else every


def sweep(axis: str, args: argparse.Namespace, say: Report) -> Iterator[Point]:
    """Measure the points of an axis, all peers at one size after the other; a peer's last one says why it stopped."""
    going: dict[str, Point | None] = dict.fromkeys(args.peers)  # and the last point of each
    for side, latents in sizes(axis, args.quick):
        truth = None
        for peer, last in list(going.items()):
            case = case_of(peer, side, latents, args.pass_name, args.dtype)
            limits = Limits(args.threads, args.limit_memory or available_bytes(), args.limit_seconds)
            say(f"{axis}: M = {side * side:,}, N = {latents:,}: {peer}")
            point, found = _point(axis, case, limits, last)
            if truth is None:
                truth = found  # of the first one nothing is known
            elif found is not None:
                point = replace(point, difference=difference(found, truth))
            going[peer] = point
            if point.status != MEASURED:
                del going[peer]
            yield point


def _point(axis: str, case: Case, limits: Limits, last: Point | None) -> tuple[Point, Fingerprint | None]:
    """The point of a case, and the fingerprint of its results when it ran; ``last`` is the peer's point before."""
    shape, needed = case.geometry, None
    point = Point(
        axis, case.peer, shape.tokens, shape.queries, case.pass_name, case.dtype, limits.threads, MEASURED,
        input_bytes=shape.tokens * shape.channels * torch.float32.itemsize,
    )  # fmt: skip
    if last is not None and last.peak_memory_bytes:
        needed = round(last.peak_memory_bytes * (shape.tokens * shape.queries) / (last.tokens * last.latents))
        if needed > HOPELESS * limits.bytes:
            detail = (
                f"would need about {output.mebibytes(needed)}, {output.mebibytes(limits.bytes)} are allowed: not run"
            )
            return replace(point, status="would not fit", needed_bytes=needed, detail=detail), None
    try:
        row = measure(case, limits)
    except Stopped as stop:
        lacking = needed if stop.status == "out of memory" else None
        return replace(point, status=stop.status, needed_bytes=lacking, detail=str(stop)), None
    found = row.pop("fingerprint")
    if row["median"] > limits.seconds:
        row |= {"status": "too slow", "detail": f"a call takes more than {limits.seconds:g} s"}
    return replace(point, **row), found


def exponents(points: list[Point]) -> dict[str, dict[str, float | None]]:
    """By axis, the powers that our time and memory grow with over the last two decades."""
    return {
        axis: {name: exponent(curve(points, axis, OURS, value)) for name, value in VALUES.items()}
        for axis in dict.fromkeys(point.axis for point in points)
    }


def show(console: Console, facts: dict, points: list[Point]) -> None:
    """Print points, where peers stopped, and the exponents."""
    for axis in dict.fromkeys(point.axis for point in points):
        here = [point for point in points if point.axis == axis]
        peers, lines = list(dict.fromkeys(point.peer for point in here)), {}
        for point in here:
            lines.setdefault((point.tokens, point.latents), {})[point.peer] = _cell(point)
        rows = [
            (f"{tokens:,}", f"{latents:,}", *(line.get(peer, "") for peer in peers))
            for (tokens, latents), line in lines.items()
        ]
        title = f"{axis}: {here[0].pass_name}, {here[0].dtype}"
        console.print(output.table(title, ("M", "N", *peers), rows, left=(), show_lines=True))
    where = {point: f"{point.peer} at M = {point.tokens:,}, N = {point.latents:,}" for point in points}
    output.plain(console, *(f"{text}: {p.status}: {p.detail}" for p, text in where.items() if p.status != MEASURED))
    for axis, found in exponents(points).items():
        powers = ", ".join(f"{name} {'-' if power is None else f'{power:.2f}'}" for name, power in found.items())
        output.plain(
            console, f"ours grows with {axis} to the power of: {powers} (the last two decades; without the input)"
        )
    for point in filter(is_different, points):
        output.plain(console, f"other results than the first peer's: {where[point]}: {point.difference:.1e}")
    output.plain(console, output.listed(facts))


def _cell(point: Point) -> str:
    if point.median is None:
        return point.status
    return f"{output.milliseconds(point.median)}\n{output.mebibytes(point.peak_memory_bytes)}"


def is_different(point: Point) -> bool:
    """Whether its results are others than the first peer's, or no numbers."""
    return point.difference is not None and not point.difference <= SAME[point.dtype]


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Time and peak memory of one cross-attention beside the peers' as tokens or latents grow: CSV and pictures.",
    )
    add = top.add_argument
    add("--quick", action="store_true", help=f"only the {QUICK} smallest sizes of an axis")
    add("--axis", choices=("tokens", "latents", "both"), default="both", help="what grows (default: %(default)s)")
    add("--pass", dest="pass_name", choices=PASSES, default="forward", help="step: and backward (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="bfloat16: autocast (default: %(default)s)")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="(default: all)")
    add("--threads", type=positive, default=DEFAULT_THREADS, help="(default: %(default)s)")
    add("--limit-seconds", type=float, default=LIMIT_SECONDS, metavar="S", help="for a call (default: %(default)s)")
    add("--limit-memory", type=positive, metavar="BYTES", help="for a peer (default: 90 %% of what is available)")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="where files go (default: benchmarks/results)")
    add("--redraw", type=Path, metavar="CSV", help="draw this file's points again beside it; nothing is measured")
    add("--json", type=Path, metavar="PATH", help="also points and exponents; -: standard output, instead of the table")
    return top


def csv_of(args: argparse.Namespace) -> Path:
    """The file that is written, or drawn again; what is not the usual run says so in its name."""
    if args.redraw:
        return args.redraw
    parts = ["scaling", slug(cpu_name()), datetime.date.today().isoformat()]
    parts += [args.pass_name] * (args.pass_name != "forward") + [args.dtype] * (args.dtype != "float32")
    parts += [args.axis] * (args.axis != "both") + ["quick"] * args.quick
    return args.out / f"{'-'.join(parts)}.csv"


def reasons(args: argparse.Namespace) -> list[str]:
    """Why this cannot run."""
    found = []
    if importlib.util.find_spec("matplotlib") is None:
        found.append("the pictures need matplotlib: pip install matplotlib")
    if args.redraw is None and not Path("/proc/self/statm").exists():
        found.append("this system has no /proc, by which memory is limited and measured: run it on Linux")
    for peer in args.peers if args.redraw is None else ():
        found += [f"{why}; or leave {peer} out of --peers" for why in MODELS[peer].reasons(None)]
    if not args.limit_seconds > 0:
        found.append(f"--limit-seconds: expected more than 0, got {args.limit_seconds:g}")
    return found


def measured(args: argparse.Namespace, facts: dict, points: list[Point], stored: Path) -> bool:
    """Measure into ``points``, which ``stored`` holds after each; returns whether it came to its end."""
    try:
        with progress() as say:
            for axis in ("tokens", "latents") if args.axis == "both" else (args.axis,):
                for point in sweep(axis, args, say):
                    points.append(point)
                    write(stored, facts, points)
    except KeyboardInterrupt:
        print(f"scaling: interrupted; {len(points)} points are in {stored}", file=sys.stderr)
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 when a peer failed or results differ, or 2 when it could not run to its end."""
    args = parser().parse_args(argv)
    stored, points, complete = csv_of(args), [], True
    try:
        if why := reasons(args):
            raise ValueError("; ".join(why))
        if args.redraw:
            facts, points = read(stored)
            if not points:
                raise ValueError(f"{stored}: expected points, got none")
        else:
            args.out.mkdir(parents=True, exist_ok=True)
            facts = conditions(args.threads) | {"peak_memory_method": memory_method()}
    except (OSError, ValueError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    if not args.redraw:
        complete = measured(args, facts, points, stored)
    if not points:
        return 2
    files = [str(path) for path in (stored, *draw(facts, points, stored.with_suffix("")))]
    result = {"conditions": facts, "exponents": exponents(points), "points": list(map(asdict, points)), "files": files}

    def printed() -> None:
        console = wide_console()
        show(console, facts, points)
        output.plain(console, *files)

    output.deliver(result, args.json, printed)
    bad = any(point.status == "failed" or is_different(point) for point in points)
    return int(bad) if complete else 2


if __name__ == "__main__":
    sys.exit(main())
