"""``python -m benchmarks.cliffs``: the same call where threads do not have a core each, beside its peers.

Every condition runs in a process of its own: one core alone, which the others are compared with; both threads on their own
cores; a process that may use fewer cores than torch has threads, from the start or from between two calls on; more threads
than cores; ordinary busy processes beside; two Python threads that call at once; the workers of a DataLoader beside. Each
time is the median of the calls, all peers in turns; of two Python threads it is that of one call of each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.choice import busy
from benchmarks.environment import conditions
from benchmarks.output import deliver, milliseconds, table
from benchmarks.process import Ended, Process
from benchmarks.sides import OURS, Case
from benchmarks.suite.levels import LEVELS
from perceiver_fast.insight.geometries import GEOMETRIES

ALONE = "one core alone"
PEERS = ("eager", "sdpa", OURS)
PASSES = ("forward", "step")
PIXELS = 512  # of the images that a DataLoader's workers make


def pin(cores: int) -> None:
    """Let all threads of this process run on its first ``cores`` processors alone."""
    kept = sorted(os.sched_getaffinity(0))[:cores]
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), kept)


class Images(torch.utils.data.Dataset):
    """Images that take a worker some work to make."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> torch.Tensor:
        image = torch.rand(3, PIXELS, PIXELS)
        return torch.nn.functional.avg_pool2d(image.sort(-1).values, 2)


@contextlib.contextmanager
def loading(workers: int) -> Iterator[None]:
    """A DataLoader whose workers are always ahead, since its batches are taken as they come."""
    loader = torch.utils.data.DataLoader(Images(), batch_size=4, num_workers=workers)
    ended = threading.Event()

    def take() -> None:
        for _ in loader:
            if ended.is_set():
                return

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def at_once(call: Callable[[], object], threads: int) -> None:
    """``call`` in so many Python threads; what one of them raises is raised here."""
    with ThreadPoolExecutor(threads) as pool:
        for each in [pool.submit(call) for _ in range(threads)]:
            each.result()


# By name: torch's threads and the cores from the start, the cores after the first calls, what runs beside, and how many Python
# threads call. None: as many as there are.
CONDITIONS: dict[str, tuple[int | None, int | None, int | None, Callable[[], Any], int]] = {
    ALONE: (1, 1, None, contextlib.nullcontext, 1),
    "a core each": (None, None, None, contextlib.nullcontext, 1),
    "all on one core": (None, 1, None, contextlib.nullcontext, 1),
    "on one core later": (None, None, 1, contextlib.nullcontext, 1),
    "two threads a core": (-2, None, None, contextlib.nullcontext, 1),
    "a busy process": (None, None, None, lambda: busy(1), 1),
    "two busy processes": (None, None, None, lambda: busy(2), 1),
    "two Python threads": (None, None, None, contextlib.nullcontext, 2),
    "DataLoader": (None, None, None, lambda: loading(2), 1),
}


def measure(pipe: Any, name: str, geometry: str, rounds: int, most_seconds: float) -> None:
    """Sends the seconds of every peer and pass under one condition: of ``rounds`` calls, or those begun in ``most_seconds``."""
    threads, cores, cores_later, beside, callers = CONDITIONS[name]
    if threads is not None:
        torch.set_num_threads(threads if threads > 0 else -threads * torch.get_num_threads())
    if cores is not None:
        pin(cores)
    calls = {}
    for step in PASSES:
        for peer in PEERS:
            case = Case("model", GEOMETRIES[geometry], step, peer)
            call = case.call(LEVELS["model"].peers[peer].build(case))
            calls[step, peer] = call
            call()
            call()
    if cores_later is not None:
        pin(cores_later)
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    with beside():
        end = time.monotonic() + most_seconds
        for done in range(rounds):
            if done > 0 and time.monotonic() > end:
                break
            for key, call in calls.items():
                for timed in (False, True):  # the first call finds the caches as another peer left them
                    start = time.perf_counter()
                    at_once(call, callers) if callers > 1 else call()
                    if timed:
                        found[key].append(time.perf_counter() - start)
    pipe.send([[step, peer, statistics.median(seconds)] for (step, peer), seconds in found.items()])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cliffs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", default="cross-only", choices=list(GEOMETRIES), help="(default: cross-only)")
    parser.add_argument(
        "--only", action="append", choices=list(CONDITIONS)[1:], help=f"beside '{ALONE}'; repeat for several"
    )
    parser.add_argument("--rounds", type=int, default=7, help="calls of each, whose median is taken (default: 7)")
    parser.add_argument(
        "--seconds", type=float, default=20, help="after which no further round of a condition begins (default: 20)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help='write the numbers; "-" prints them')
    args = parser.parse_args(argv)
    if not hasattr(os, "sched_setaffinity"):
        parser.error("processes are pinned as Linux does it; this system has no sched_setaffinity")
    before, console = conditions(torch.get_num_threads()), Console(stderr=str(args.json) == "-")
    names = [ALONE, *(args.only or list(CONDITIONS)[1:])]
    rows = []
    for name in track(names, "conditions", console=Console(stderr=True)):
        with Process(measure, name, args.geometry, args.rounds, args.seconds) as process:
            try:
                received: Any = process.receive()
            except Ended as error:
                console.print(f"{name}: {error}")
                if name == ALONE:  # what the others are compared with
                    return 1
                continue
        rows += [{"condition": name, "pass": step, "peer": peer, "seconds": s} for step, peer, s in received]

    def show() -> None:
        for step in PASSES:
            seconds = {(row["condition"], row["peer"]): row["seconds"] for row in rows if row["pass"] == step}
            lines = []
            for name in dict.fromkeys(row["condition"] for row in rows):
                ours, alone = seconds[name, OURS], seconds[ALONE, OURS]
                best = min(seconds[name, peer] for peer in PEERS if peer != OURS)
                lines.append([
                    name, *(milliseconds(seconds[name, peer]) for peer in PEERS), f"{best / ours:.1f}x", f"{ours / alone:.2f}",
                ])  # fmt: skip
            headings = ["threads", "eager", "SDPA", "perceiver-fast", "over best", "of alone"]
            console.print(table(f"{args.geometry}, {step}", headings, lines))

    found = {
        "conditions": before,
        "geometry": args.geometry,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "rows": rows,
    }
    deliver(found, args.json, show)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
