"""What is profiled: a geometry's model, warm, with its ranges on, for a few iterations between marks.

``python -m perceiver_fast.commands.profile_workload`` is the process that nsys, ncu and perf look at. The region of
interest begins after the warm-up: cudaProfilerStart and Stop, a range called ``profiled``, and perf's control fifo.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from perceiver_fast.commands.options import positive
from perceiver_fast.insight.geometries import GEOMETRIES
from perceiver_fast.ranges import open_range, ranges

PROFILED, FORWARD, BACKWARD = "profiled", "forward", "backward"  # the ranges that are no layer's and no op's
WARM_UP = 3  # calls: Triton compiles, libraries are measured, weights are packed at the second
DTYPES = ("float32", "float64", "bfloat16", "float16")
PEERS = ("fast", "perceiver-pytorch")
MODULE = "perceiver_fast.commands.profile_workload"


class CannotRun(Exception):
    """Something the workload needs is not there; the message says what."""


@dataclass(frozen=True)
class Workload:
    """Which model runs, on what, and how often.

    Args:
        geometry: a key of GEOMETRIES.
        pass_name: ``forward`` (inference) or ``step`` (forward and backward).
        dtype: float32 and float64 are the model's; bfloat16 and float16 are autocast's.
        batch: inputs at once.
        threads: of the CPU. Default: None, torch's choice.
        device: ``cpu`` or ``cuda``.
        peer: whose model, of PEERS.
        iterations: calls in the profiled region.
        tiny: the same structure with few of everything.
    """

    geometry: str = "readme"
    pass_name: str = "forward"
    dtype: str = "float32"
    batch: int = 1
    threads: int | None = None
    device: str = "cpu"
    peer: str = "fast"
    iterations: int = 3
    tiny: bool = False

    @property
    def name(self) -> str:
        """What files about it are called."""
        parts = [self.geometry, self.pass_name, self.dtype, f"b{self.batch}", self.device]
        return "-".join(parts + [self.peer] * (self.peer != "fast") + ["tiny"] * self.tiny)

    def command(self) -> list[str]:
        """The command line of a process that runs it."""
        command = [sys.executable, "-m", MODULE, "--geometry", self.geometry, "--pass", self.pass_name]
        command += ["--dtype", self.dtype, "--batch", str(self.batch), "--device", self.device, "--peer", self.peer]
        command += ["--iterations", str(self.iterations)]
        command += [] if self.threads is None else ["--threads", str(self.threads)]
        return command + ["--tiny"] * self.tiny


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what runs."""
    add = parser.add_argument
    add("--geometry", choices=list(GEOMETRIES), default="readme", help="the model and its input (default: %(default)s)")
    add(
        "--pass", dest="pass_name", choices=("forward", "step"), default="forward",
        help="inference, or forward and backward (default: %(default)s)",
    )  # fmt: skip
    add("--dtype", choices=DTYPES, default="float32", help="half precision is autocast's (default: %(default)s)")
    add("--batch", type=positive, default=1, metavar="N", help="inputs at once (default: %(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--peer", choices=PEERS, default="fast", help="whose model: ours, or the one compared with")
    add("--iterations", type=positive, metavar="N", help="profiled calls, after the warm-up")
    add("--tiny", action="store_true", help="the geometry's structure with few of everything, to try the command out")


def workload_from(args: argparse.Namespace, iterations: int, device: str) -> Workload:
    """The workload that options of :func:`add_arguments` describe, with these defaults."""
    return Workload(
        args.geometry, args.pass_name, args.dtype, args.batch, args.threads, args.device or device, args.peer,
        args.iterations or iterations, args.tiny,
    )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A workload's model, and one call of it."""

    model: nn.Module
    call: Callable[[], None]
    synchronize: Callable[[], object]


def prepare(workload: Workload) -> Prepared:
    """Build the model and its input; nothing has run yet.

    Raises:
        CannotRun: there is no GPU, or the peer is not installed.
    """
    if workload.device == "cuda" and not torch.cuda.is_available():
        raise CannotRun(
            f"expected a CUDA GPU for --device cuda, got none (torch {torch.__version__}); use --device cpu"
        )
    if workload.threads is not None:
        torch.set_num_threads(workload.threads)
    torch.manual_seed(0)
    geometry = GEOMETRIES[workload.geometry]
    geometry = geometry.tiny() if workload.tiny else geometry
    if workload.peer == "fast":
        model = geometry.build()
    else:
        from perceiver_fast.commands.profile_peer import build

        model = build(geometry)
    dtype, data = getattr(torch, workload.dtype), geometry.input(workload.batch)
    full = dtype in (torch.float32, torch.float64)
    model, data = (value.to(workload.device, dtype if full else torch.float32) for value in (model, data))
    step = workload.pass_name == "step"
    model.train(step)

    def call() -> None:
        with nullcontext() if step else torch.inference_mode():
            with open_range(FORWARD), torch.autocast(workload.device, dtype, enabled=not full):
                out = model(data)
        if step:
            model.zero_grad()
            loss = out.float().square().mean()
            with open_range(BACKWARD):
                loss.backward()

    return Prepared(model, call, torch.cuda.synchronize if workload.device == "cuda" else lambda: None)


def warm_up(prepared: Prepared) -> None:
    """Run calls whose time is not of interest."""
    for _ in range(WARM_UP):
        prepared.call()
    prepared.synchronize()


def iterate(prepared: Prepared, iterations: int) -> None:
    """The profiled calls, in their range."""
    with open_range(PROFILED):
        for _ in range(iterations):
            prepared.call()
        prepared.synchronize()


@contextmanager
def _region(cuda: bool, perf_control: str | None) -> Iterator[None]:
    """Tell the profilers that the region of interest begins and ends."""
    if cuda:
        torch.cuda.profiler.start()
    _tell_perf(perf_control, "enable")
    yield
    _tell_perf(perf_control, "disable")
    if cuda:
        torch.cuda.profiler.stop()


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
    workload = workload_from(args, iterations=3, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        prepared = prepare(workload)
    except CannotRun as reason:
        print(f"profile_workload: {reason}", file=sys.stderr)
        return 2
    with ranges(prepared.model):
        warm_up(prepared)
        with _region(workload.device == "cuda", args.perf_control):
            iterate(prepared, workload.iterations)
    print(f"{workload.name}: {workload.iterations} iterations", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
