"""``python -m benchmarks.floor``: a model's forward beside a bare loop over its matrix products.

What is left of a Perceiver when attention to the input is nearly free are the products of its latents. Their shapes are
read off the model itself, and a loop that does nothing but these products is the floor that the model is measured
against, in turns in one run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.environment import conditions
from benchmarks.options import options
from benchmarks.output import save, table
from benchmarks.statistic import seconds_of
from benchmarks.suite.models import fast
from perceiver_fast.insight.geometries import GEOMETRIES
from perceiver_fast.ops.linear_libraries import LIBRARIES, reasons

ROUNDS = 5
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class _Shapes(TorchDispatchMode):
    """Notes rows, channels and output channels of every matrix product."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            a, b = args[-2:]
            self.found.append((a.shape[0], a.shape[1], b.shape[1]))
        return function(*args, **(kwargs or {}))


def latent_products(model: torch.nn.Module, data: torch.Tensor) -> list[tuple[int, int, int]]:
    """Rows, channels and output channels of every product of the latents in one forward, in their order."""
    latents = model.latents.shape[0]
    with torch.no_grad(), _Shapes() as shapes:
        model(data)
    return [shape for shape in shapes.found if shape[0] == latents * data.shape[0]]


def loop(shapes: list[tuple[int, int, int]], library: str) -> Callable[[], None]:
    """A call that computes products of these shapes, each with weights of its own."""
    forward, products = LIBRARIES[library].forward, []
    for rows, channels, out_channels in shapes:
        weight = torch.randn(out_channels, channels)
        products.append((torch.randn(rows, channels), weight))

    def call() -> None:
        with torch.no_grad():
            for x, weight in products:
                forward(x, weight)

    return call


def times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every call, timed in turns after two calls of each."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in track(range(rounds + 2), "timing", console=Console(stderr=True)):
        for name, call in calls.items():
            seconds = seconds_of(call)
            if turn >= 2:
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = options("floor", __doc__.split("\n")[0], ROUNDS)
    families = [name for name, geometry in GEOMETRIES.items() if geometry.family == "perceiver"]
    top.add_argument("--geometry", default="readme", choices=families, help="(default: %(default)s)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    result = {"conditions": conditions(args.threads), "geometry": args.geometry}
    geometry = GEOMETRIES[args.geometry]
    model, data = fast(geometry).eval(), geometry.input()
    shapes = latent_products(model, data)
    operations = 2e-9 * sum(rows * channels * out for rows, channels, out in shapes)

    def forward() -> None:
        with torch.no_grad():
            model(data)

    calls = {f"loop: {name}": loop(shapes, name) for name in LIBRARIES if not reasons(name)}
    found = times({"forward": forward, **calls}, args.rounds)
    rows = [
        (name, f"{1e3 * seconds:.1f}", f"{operations / seconds:.0f}", f"{seconds / found['forward']:.0%}")
        for name, seconds in found.items()
    ]
    title = f"{args.geometry}: {len(shapes)} products of the latents, {operations:.1f} GFLOP"
    Console().print(table(title, ("", "ms", "GFLOP/s", "loop / forward"), rows))
    if args.json:
        save(args.json, result | {"gflop": operations, "seconds": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
