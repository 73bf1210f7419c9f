"""Two trees measured in turns: a process for each, the same weights and input, results compared, times paired."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.sides import errors, excess
from benchmarks.statistic import judge, median_interval, statistic
from perceiver_fast.insight.console import Report
from perceiver_fast.insight.geometries import Geometry

WORKER = Path(__file__).with_name("worker.py")
TURN_SECONDS, MOST_CALLS = 0.25, 30  # short calls are repeated within a turn
DIFFERENT = {"float32": (1e-4, 1e-3), "bfloat16": (5e-2, 2e-1)}  # outputs, gradients: more is no rounding
STOP_SECONDS = 10.0


class WorkerError(Exception):
    """One side could not do what it was asked for; the message says which, and why."""


class Worker:
    """The process of one side, which ends with a ``with`` block.

    Args:
        name: base or new.
        tree: the checkout whose package it imports.
        folder: an empty one, for the worker's code and what it prints.
        threads: that it computes with.
    """

    def __init__(self, name: str, tree: Path, folder: Path, threads: int):
        folder.mkdir()
        script = shutil.copy(WORKER, folder)
        paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
        self.name, self.errors = name, folder / "errors.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, script, str(tree), str(threads)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder, env=environment,
            )  # fmt: skip

    def ask(self, command: str, argument: object = None) -> object:
        """Have a command done; returns its answer.

        Raises:
            WorkerError: it failed, or the process ended.
        """
        try:
            print(json.dumps({command: argument}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = (self.errors.read_text().strip().splitlines() or ["it printed nothing"])[-1]
            raise WorkerError(f"{self.name}: its process ended with exit code {self.process.wait()}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer[command]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(STOP_SECONDS)
        self.process.stdout.close()
        with suppress(BrokenPipeError):  # what a dead process did not read
            self.process.stdin.close()


def differences(folder: Path) -> dict[str, float | None]:
    """How far the results that both sides saved in ``folder`` are apart."""
    base, new = (torch.load(folder / f"{side}.pt", weights_only=True) for side in ("base", "new"))
    if base.keys() != new.keys():
        raise WorkerError(
            f"new: expected gradients of the base's parameters, differs in {sorted(base.keys() ^ new.keys())}"
        )
    found = errors([new.pop("output"), *new.values()], [base.pop("output"), *base.values()])
    return {"output_difference": found["relative_error"], "gradient_difference": found["gradient_error"]}


def measure(
    sides: list[Worker], geometry: Geometry, case: dict, rounds: int, threshold: float, folder: Path, say: Report
) -> dict:
    """The row of one geometry.

    Args:
        sides: base and new.
        case: ``pass``, ``dtype`` and ``batch``.
        rounds: turns of each side, at least LEAST_ROUNDS.
        threshold: see :func:`benchmarks.statistic.judge`.
        folder: for weights, input and results.
        say: called with lines of progress.
    """
    torch.manual_seed(0)
    torch.save(geometry.build().state_dict(), folder / "weights.pt")
    torch.save(geometry.input(case["batch"]), folder / "input.pt")
    task = {"family": geometry.family, "arguments": geometry.arguments, "pass": case["pass"], "dtype": case["dtype"]}
    task |= {name: str(folder / f"{name}.pt") for name in ("weights", "input")}
    what = f"{geometry.name} {case['pass']} {case['dtype']}"
    slowest = 0.0
    for side in sides:
        say(what, f"loading {side.name}")
        slowest = max(slowest, side.ask("load", task | {"results": str(folder / f"{side.name}.pt")}))
    apart = differences(folder)
    calls = max(1, min(MOST_CALLS, int(TURN_SECONDS / slowest)))
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds):
        say(what, f"round {turn + 1} of {rounds}, {calls} calls a turn")
        for side in sides:
            seconds[side.name].append(statistics.median(side.ask("time", calls)))
    ratios = [new / base for base, new in zip(seconds["base"], seconds["new"], strict=True)]
    ratio, (low, high) = statistics.median(ratios), median_interval(ratios)
    return {
        "geometry": geometry.name, **case, **apart, "rounds": rounds, "calls_a_round": calls,
        "ratio": ratio, "ratio_low": low, "ratio_high": high,
        **{side: statistic(values) for side, values in seconds.items()},
        "verdict": judge(ratio, low, high, threshold), "same_results": not excess(apart, DIFFERENT[case["dtype"]]),
    }  # fmt: skip
