"""``python -m benchmarks.choice``: is the library that a process chooses for large products the fastest, on busy machines too?

Fresh processes make the choice, beside none, one and two that do nothing but take processors away. What each chose is
held against what a long measurement found, in turns, before and after: the loss is what the chosen library takes longer
than the best. The exit code is 1 where any loss is above 10 %, and 2 where this machine was too busy to say what is best.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import track

import perceiver_fast as pf
from benchmarks.environment import ROOT, conditions
from benchmarks.options import options
from benchmarks.output import plain, save, table
from perceiver_fast.insight.geometries import GEOMETRIES
from perceiver_fast.ops.linear_choice import why_torch
from perceiver_fast.ops.linear_libraries import KINDS, LIBRARIES
from perceiver_fast.ops.linear_prior import vendor, versions
from perceiver_fast.ops.linear_probe import PROBLEMS, REST, Operands, timed
from perceiver_fast.ops.linear_verdict import LEAST, Problem, Run

ALLOWED = 0.1
NAMES = ("torch", "onednn")
COMPUTE = "import os; mine = os.getppid()\nwhile os.getppid() == mine: sum(range(10**6))"
CHOOSE = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
from perceiver_fast.ops import linear_choice
from perceiver_fast.ops.linear_libraries import KINDS
from perceiver_fast.ops.linear_verdict import Prior
if sys.argv[2]:
    linear_choice.prior_of = lambda *args: Prior(sys.argv[2], 0.05, "the favourite that was asked for")
found = {}
for kind in KINDS:
    start = time.perf_counter()
    verdict = linear_choice.verdict(kind)
    seconds = time.perf_counter() - start
    found[kind] = dict(chosen=verdict.chosen, sure=verdict.sure, text=str(verdict), seconds=seconds)
print(json.dumps(found))
"""


def in_turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[Run]]:
    """Runs of all calls, in turns for so many seconds after one call of each; a rest follows one that was disturbed."""
    found: dict[str, list[Run]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.monotonic() + seconds
    while time.monotonic() < end or not found[next(iter(calls))]:
        for name, call in calls.items():
            found[name].append(timed(call))
            if not found[name][-1].clean:
                time.sleep(REST)
    return found


def measure(runs: dict[str, dict[str, dict[Problem, list[Run]]]], seconds: float) -> None:
    """Add to ``runs``, by kind, library and problem, so many seconds of measuring in all."""
    with torch.inference_mode():
        for kind in track(KINDS, "measuring the libraries", console=Console(stderr=True)):
            operands = Operands(kind, torch.float32)
            products = {name: LIBRARIES[name].products()[kind] for name in NAMES}
            for problem in PROBLEMS:
                calls = {
                    name: lambda product=product: product(*operands(problem)) for name, product in products.items()
                }
                for name, found in in_turns(calls, seconds / len(KINDS) / len(PROBLEMS)).items():
                    runs[kind][name].setdefault(problem, []).extend(found)


def least_of(runs: list[Run]) -> float:
    """The least time of runs that nothing disturbed, or where there are none of all."""
    return min([run.seconds for run in runs if run.clean] or [run.seconds for run in runs])


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute, until the block ends or this process does."""
    processes = [subprocess.Popen([sys.executable, "-c", COMPUTE]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def choose(threads: int, favourite: str) -> dict[str, dict]:
    """What a fresh process chooses, by kind of product."""
    command = [sys.executable, "-c", CHOOSE, str(threads), favourite]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def forwards(geometry: str, seconds: float) -> dict[str, list[Run]]:
    """Runs of a model's forward on every library, in turns."""
    model, data = GEOMETRIES[geometry].build().eval(), GEOMETRIES[geometry].input()

    def forward(library: str) -> None:
        with torch.inference_mode(), pf.use_linear(library):
            model(data)

    return in_turns({name: lambda name=name: forward(name) for name in (*NAMES, "auto")}, seconds)


def judged(choices: list[dict[str, dict]], least: dict[str, dict[str, float]]) -> dict[str, dict]:
    """By kind of product: how often what was chosen, how often surely, at which cost, and the worst loss."""
    found = {}
    for kind in KINDS:
        mine = [choice[kind] for choice in choices]
        best = min(least[kind].values())
        found[kind] = {
            "chosen": dict(Counter(choice["chosen"] for choice in mine)),
            "sure": sum(choice["sure"] for choice in mine),
            "seconds": statistics.median(choice["seconds"] for choice in mine),
            "most_seconds": max(choice["seconds"] for choice in mine),
            "worst_loss": max(least[kind][choice["chosen"]] for choice in mine) / best - 1,
            "texts": [choice["text"] for choice in mine],
        }
    return found


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = options("choice", __doc__)
    add = top.add_argument
    add("--times", type=int, default=50, help="fresh processes that choose, beside each (default: %(default)s)")
    add("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes (default: 0 1 2)")
    add("--seconds", type=float, default=90, help="of measuring what is best, before and after (default: %(default)s)")
    add("--favourite", choices=NAMES, default="", help="as if this were known to be the best (default: what is known)")
    add("--geometry", default="readme", choices=list(GEOMETRIES), help="whose forward is timed (default: %(default)s)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Measure, choose, measure again, print; returns 1 where a choice cost more than is allowed."""
    args, console = parser().parse_args(argv), Console()
    if why := why_torch():
        print(f"benchmarks.choice: nothing is chosen here: {'; '.join(why)}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    result = {"conditions": conditions(args.threads) | {"vendor": vendor()} | versions(), "favourite": args.favourite}
    runs = {kind: {name: {} for name in NAMES} for kind in KINDS}
    measure(runs, args.seconds)
    choices = {}
    for count in args.busy:
        with busy(count):
            turns = track(range(args.times), f"beside {count} busy", console=Console(stderr=True))
            choices[count] = [choose(args.threads, args.favourite) for _ in turns]
    measure(runs, args.seconds)
    times = {kind: {n: {p: least_of(r) for p, r in found.items()} for n, found in runs[kind].items()} for kind in KINDS}
    least = {kind: {name: sum(found.values()) for name, found in by_name.items()} for kind, by_name in times.items()}
    found = {count: judged(made, least) for count, made in choices.items()}
    models = forwards(args.geometry, args.seconds)

    measured = [
        {
            "kind": kind,
            "library": name,
            "rows": p.rows,
            "inner": p.inner,
            "outer": p.outer,
            "runs": len(runs[kind][name][p]),
        }
        | {
            "clean": sum(run.clean for run in runs[kind][name][p]),
            "seconds": seconds,
            "gflops": 1e-9 * p.operations / seconds,
        }
        for kind in KINDS
        for name in NAMES
        for p, seconds in times[kind][name].items()
    ]
    rows = [
        (row["kind"], row["library"], f"{row['rows']} x {row['inner']} x {row['outer']}", f"{row['gflops']:.0f}")
        + (f"{row['clean']} of {row['runs']}",)
        for row in measured
    ]
    headers = ("", "", "product", "GFLOP/s", "undisturbed runs")
    console.print(table("Measured at leisure", headers, rows, left=(0, 1, 2)))
    rows = [
        (str(count), kind, ", ".join(f"{n} x {name}" for name, n in row["chosen"].items()), str(row["sure"]))
        + (f"{row['worst_loss']:.1%}", f"{row['seconds']:.2f}", f"{row['most_seconds']:.2f}")
        for count, kinds in found.items()
        for kind, row in kinds.items()
    ]
    headers = ("beside", "", "chosen", "surely", "worst loss", "s, median", "s, most")
    console.print(table(f"{args.times} fresh processes beside busy ones", headers, rows, left=(0, 1, 2)))
    for name, found_runs in models.items():
        seconds = [run.seconds for run in found_runs]
        text = f"least {1e3 * min(seconds):.0f} ms, median {1e3 * statistics.median(seconds):.0f} of {len(seconds)}"
        plain(console, f"{args.geometry} forward, {name}: {text}")
    if args.json:
        seconds = {name: [run.seconds for run in found_runs] for name, found_runs in models.items()}
        forward = {"geometry": args.geometry, "seconds": seconds}
        save(args.json, result | {"measured": measured, "choices": found, "forward": forward})
    if unknown := [row for row in measured if row["clean"] < LEAST]:
        plain(console, f"This machine is too busy to say what is best: {len(unknown)} products never ran undisturbed.")
        return 2
    return 1 if any(row["worst_loss"] > ALLOWED for kinds in found.values() for row in kinds.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
