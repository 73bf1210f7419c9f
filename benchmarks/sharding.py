"""``python -m benchmarks.sharding``: what sharding tokens costs here, and a model of what it would on many devices.

Measured: a training step of one process for inputs of several sizes (a constant and a rate), all-reduces of two and four
processes of this machine (a latency and a bandwidth), and sharded training steps of two processes. From these four numbers
a model says what 1 to 10,000 devices like this machine's core would take, for an input that stays and for one that grows
with them. The model is arithmetic, not a measurement.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.progress import track

import perceiver_fast as pf
from benchmarks.environment import conditions
from benchmarks.output import save, table

MODEL: dict[str, Any] = dict(
    num_freq_bands=6, max_freq=64.0, depth=1, num_latents=128, latent_dim=256, latent_heads=8, num_classes=100
)
WIDTH = 512  # pixels of a row
ROWS = (128, 512, 1024)  # of one process' image
SMALL, LARGE = 1024, 2**23  # numbers of the two all-reduces
DEVICES = (1, 2, 4, 16, 64, 256, 1024, 10_000)


@dataclass(frozen=True)
class Measured:
    """What the model is made of.

    Attributes:
        constant, token: seconds of a training step, and of every token of it.
        latency: seconds of one exchange of two processes, half of their all-reduce of few bytes.
        bandwidth: bytes a second of an all-reduce of two processes.
        messages: bytes of every all-reduce of a step.
    """

    constant: float
    token: float
    latency: float
    bandwidth: float
    messages: tuple[int, ...]

    def all_reduce(self, devices: int, size: int) -> float:
        """Seconds: two sweeps over a tree of exchanges, and every byte sent and received about twice."""
        if devices == 1:
            return 0.0
        return 2 * math.ceil(math.log2(devices)) * self.latency + 2 * size * (devices - 1) / devices / self.bandwidth

    def step(self, devices: int, tokens: float) -> float:
        """Seconds of a training step on so many tokens in all."""
        sent = sum(self.all_reduce(devices, size) for size in self.messages)
        return self.constant + self.token * tokens / devices + sent


def median_of(call: Callable[[], object], times: int) -> float:
    """Seconds, after one call that is not counted."""
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def step_of(model: torch.nn.Module, rows: int) -> Callable[[], None]:
    """A training step on an image of so many rows."""
    image = torch.randn(1, rows, WIDTH, 3)

    def step() -> None:
        model.zero_grad()
        model(image).sum().backward()

    return step


def process(rank: int, ranks: int, store: str, times: int, results: Any) -> None:
    """One of several: seconds of the all-reduces and of a sharded step, and bytes of the step's messages."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    seconds = {}
    for name, numbers in (("small", SMALL), ("large", LARGE)):
        tensor = torch.ones(numbers)
        seconds[name] = median_of(
            lambda tensor=tensor: dist.all_reduce(tensor), 20 * times if name == "small" else times
        )
    model = pf.distributed.shard(pf.Perceiver(**MODEL))
    step = step_of(model, ROWS[-1] // ranks)
    sizes: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **keywords)

    dist.all_reduce = counted
    step()
    dist.all_reduce = reduce
    seconds["step"] = median_of(step, times)
    if rank == 0:
        results.put((seconds, sizes))
    dist.barrier()
    dist.destroy_process_group()


def processes(ranks: int, times: int) -> tuple[dict[str, float], list[int]]:
    """What the first of several processes measures."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        started = [
            context.Process(target=process, args=(rank, ranks, store, times, results), daemon=True)
            for rank in range(ranks)
        ]
        for each in started:
            each.start()
        found = results.get(timeout=600)
        for each in started:
            each.join(30)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=7, help="of every measurement, whose median is taken (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured and modelled")
    args = parser.parse_args(argv)
    before, console = conditions(1), Console()
    torch.set_num_threads(1)
    model = pf.Perceiver(**MODEL)
    alone = {
        rows: median_of(step_of(model, rows), args.times)
        for rows in track(ROWS, "one process", console=Console(stderr=True))
    }
    groups = {ranks: processes(ranks, args.times) for ranks in track((2, 4), "several", console=Console(stderr=True))}
    token = (alone[ROWS[-1]] - alone[ROWS[0]]) / ((ROWS[-1] - ROWS[0]) * WIDTH)
    two, sizes = groups[2]
    found = Measured(
        constant=max(0.0, alone[ROWS[0]] - token * ROWS[0] * WIDTH),
        token=token,
        latency=two["small"] / 2,
        bandwidth=8 * LARGE / 2 / two["large"],
        messages=tuple(sizes),
    )
    rows = [
        [f"one process, {r} x {WIDTH}", f"{1e3 * s:.1f}", f"{1e3 * found.step(1, r * WIDTH):.1f}"]
        for r, s in alone.items()
    ]
    for ranks, (seconds, _) in groups.items():
        rows.append([
            f"{ranks} processes, {ROWS[-1]} x {WIDTH}", f"{1e3 * seconds['step']:.1f}",
            f"{1e3 * found.step(ranks, ROWS[-1] * WIDTH):.1f}",
        ])  # fmt: skip
        rows.append(
            [
                f"{ranks} processes, all-reduce of {4 * SMALL:,} bytes",
                f"{1e3 * seconds['small']:.3f}",
                f"{1e3 * found.all_reduce(ranks, 4 * SMALL):.3f}",
            ]
        )
    console.print(table("measured here, ms (processes of one thread)", ["", "measured", "model"], rows))
    print(
        f"model: {1e3 * found.constant:.1f} ms + {1e9 * found.token:.2f} ns a token; exchanges of {1e6 * found.latency:.0f} us "
        f"and {found.bandwidth / 1e9:.2f} GB/s; {len(sizes)} all-reduces a step, {sum(sizes):,} bytes, whatever the input"
    )
    modelled = []
    for devices in DEVICES:
        strong, weak = found.step(devices, 65_536**2), found.step(devices, devices * 4096**2)
        modelled.append({
            "devices": devices, "strong_s": strong, "strong_efficiency": found.step(1, 65_536**2) / strong / devices,
            "weak_s": weak, "weak_efficiency": found.step(1, 4096**2) / weak,
        })  # fmt: skip
    lines = [
        [
            f"{m['devices']:,}",
            f"{m['strong_s']:.3f}",
            f"{100 * m['strong_efficiency']:.0f}%",
            f"{m['weak_s']:.3f}",
            f"{100 * m['weak_efficiency']:.1f}%",
        ]
        for m in modelled
    ]
    headings = ["devices", "65,536 x 65,536: s", "of the ideal", "4,096 x 4,096 each: s", "of the ideal"]
    console.print(table("a model, not a measurement: one training step", headings, lines))
    if args.json:
        save(args.json, {
            "conditions": before, "model": MODEL, "alone": {f"{r} x {WIDTH}": s for r, s in alone.items()},
            "processes": {str(ranks): seconds for ranks, (seconds, _) in groups.items()}, "fit": vars(found), "modelled": modelled,
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
