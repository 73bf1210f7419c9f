"""What a level consists of: peers that solve one problem, what is true of it, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.sides import Case, Peer, Side
from benchmarks.suite.throughput import Work

DTYPES = ("float32", "bfloat16")  # bfloat16: autocast, of float32 weights


@dataclass(frozen=True)
class Level:
    """Whole models, one cross-attention layer, or an op.

    Args:
        peers: by the names that results have.
        truth: the side of a case in float64 that the others are checked against; the case's peer is none of its business.
        work: of one call of a case.
        needs: what a case takes of memory, in bytes by what takes it. Default: too little to be looked at.
        passes: what is measured.
        dtypes: likewise; a level of float32 alone has no dtype in its benchmarks' names.
    """

    peers: dict[str, Peer]
    truth: Callable[[Case], Side]
    work: Callable[[Case], Work]
    needs: Callable[[Case], dict[str, int]] = lambda case: {}
    passes: tuple[str, ...] = ("forward", "step")
    dtypes: tuple[str, ...] = DTYPES[:1]
