"""Every op's small call on its Triton kernels, forward and backward, against float64: the first thing to know on a GPU.

    python -m benchmarks.gpu.trials [--op NAME ..] [--jobs N]

Prints a line of JSON an op, as soon as it is known; exit code 1 where a kernel does not hold. What is tried is what a first
call tries (perceiver_fast/ops/proof.py). Under compute-sanitizer it is the small calls that this wants.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed


def tried() -> list[str]:
    """The ops that have Triton kernels and a call to try them by."""
    from perceiver_fast.ops.declaration import OPS

    return [name for name, op in OPS.items() if op.trial and any(b.name == "triton" for b in op.backends)]


def trial(name: str) -> dict:
    """What became of one op; "" is no error."""
    import torch

    from perceiver_fast.gpu import INTERPRETED
    from perceiver_fast.ops.declaration import OPS
    from perceiver_fast.ops.trial import held

    start = time.monotonic()
    call = OPS[name].trial
    assert call is not None
    found = held(call, "triton", torch.device("cpu" if INTERPRETED else "cuda"))
    return {"op": name, "error": found.error, "seconds": round(time.monotonic() - start, 1)}


def trials(names: Sequence[str], jobs: int) -> Iterator[dict]:
    """Of every op, in the order in which they end; with one job in this process."""
    if jobs == 1:
        yield from map(trial, names)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(trial, name) for name in names]):
            yield done.result()


def main() -> int:
    """Runs them; returns the exit code."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu.trials", description=__doc__.splitlines()[0])
    top.add_argument("--op", action="append", metavar="NAME", help="only this one; may be repeated")
    top.add_argument("--jobs", type=int, default=1, help="processes, which compile side by side (default: %(default)s)")
    args = top.parse_args()
    held = True
    for found in trials(args.op or tried(), args.jobs):
        print(json.dumps(found), flush=True)
        held = held and not found["error"]
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
