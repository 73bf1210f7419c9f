"""What is profiled: a geometry's model, warm, with its ranges on, for a few iterations between marks.

``python -m perceiver_fast.commands.profile_workload`` is the process that nsys, ncu and perf look at. The region of
interest begins after the warm-up: cudaProfilerStart and Stop, a range called ``profiled``, and perf's control fifo.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perceiver_fast.commands.workload import MODULE, Workload, add_arguments
from perceiver_fast.insight.console import CannotRun
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry
from perceiver_fast.insight.peer import peer_model
from perceiver_fast.ranges import layer_range, open_range, ranges

PROFILED, FORWARD, BACKWARD = "profiled", "forward", "backward"  # the ranges that are no layer's and no op's
WARM_UP = 3  # calls: Triton compiles, libraries are measured


def workload_from(args: argparse.Namespace, iterations: int = 3, device: str | None = None) -> Workload:
    """The workload that options of :func:`add_arguments` describe, with these defaults; a GPU's where there is one."""
    defaults: dict[str, Any] = {
        "iterations": iterations,
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
    }
    options = {option.name: getattr(args, option.name) for option in fields(Workload)}
    return Workload(**defaults | {name: value for name, value in options.items() if value is not None})


class Prepared:
    """A workload's model and input, and its calls. Nothing has run yet.

    Raises:
        CannotRun: there is no GPU, or the peer is not installed.
    """

    def __init__(self, workload: Workload):
        if workload.device == "cuda" and not torch.cuda.is_available():
            got = f"none (torch {torch.__version__})"
            raise CannotRun(f"expected a CUDA GPU for --device cuda, got {got}; use --device cpu")
        if workload.threads is not None:
            torch.set_num_threads(workload.threads)
        torch.manual_seed(0)
        geometry = GEOMETRIES[workload.geometry]
        geometry = geometry.tiny() if workload.tiny else geometry
        self.workload, self.dtype = workload, getattr(torch, workload.dtype)
        self.autocast = self.dtype in (torch.bfloat16, torch.float16)
        where: dict[str, Any] = {"device": workload.device, "dtype": torch.float32 if self.autocast else self.dtype}
        model = geometry.build() if workload.peer == "fast" else _named_peer(geometry)
        self.model, self.data = model.to(**where), geometry.input(workload.batch).to(**where)
        self.model.train(workload.pass_name == "step")

    def call(self) -> None:
        """One forward, and a backward in a step."""
        step = self.model.training
        with nullcontext() if step else torch.inference_mode():
            with open_range(FORWARD), torch.autocast(self.workload.device, self.dtype, enabled=self.autocast):
                out = self.model(self.data)
        if step:
            self.model.zero_grad()
            loss = out.float().square().mean()
            with open_range(BACKWARD):
                loss.backward()

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one in use."""
        if self.workload.device == "cuda":
            torch.cuda.synchronize()

    def warm_up(self) -> None:
        """Run calls whose time is not of interest."""
        for _ in range(WARM_UP):
            self.call()
        self.synchronize()

    def iterate(self) -> None:
        """The profiled calls, in their range."""
        with open_range(PROFILED):
            for _ in range(self.workload.iterations):
                self.call()
            self.synchronize()


def _named_peer(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch's model with random weights, every module of that package in a range of its name."""
    try:
        model = peer_model(geometry)
    except ImportError as error:
        raise CannotRun(
            f"expected perceiver-pytorch to be installed ({error}); pip install perceiver-pytorch"
        ) from None
    for name, module in model.named_modules():
        if name and type(module).__module__.startswith("perceiver_pytorch"):
            module.forward = partial(layer_range(type(module).forward), module)
    return model


@contextmanager
def _region(cuda: bool, perf_control: str | None) -> Iterator[None]:
    """Tell the profilers that the region of interest begins and ends."""
    with torch.cuda.profiler.profile() if cuda else nullcontext():
        _tell_perf(perf_control, "enable")
        yield
        _tell_perf(perf_control, "disable")


def _tell_perf(control: str | None, command: str) -> None:
    """Send a command of ``perf record --control=fifo:CTL,ACK`` and wait until it is carried out."""
    if control is None:
        return
    commands, answers = (Path(path) for path in control.split(","))
    with commands.open("w") as fifo:
        fifo.write(f"{command}\n")
    with answers.open() as fifo:
        fifo.readline()


def main(argv: list[str] | None = None) -> int:
    """Run a workload between its marks; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--perf-control", metavar="CTL,ACK", help="the fifos of perf record --control=fifo:CTL,ACK")
    args = parser.parse_args(argv)
    try:
        prepared = Prepared(workload := workload_from(args))
    except CannotRun as reason:
        print(f"profile_workload: {reason}", file=sys.stderr)
        return 2
    with ranges(prepared.model):
        prepared.warm_up()
        with _region(workload.device == "cuda", args.perf_control):
            prepared.iterate()
    print(f"{workload.name}: {workload.iterations} iterations", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
