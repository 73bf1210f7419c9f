"""Counted work: what ops declare, what the planner compares and what explain prints, in the same three numbers.

multiply_adds  of matrix products, convolutions and attention; what is elementwise counts by its bytes
exponentials   and sines, cosines, sigmoids, normal distributions: each takes about as long as the others
bytes          an operator reads its inputs once and writes its outputs once; views, which do neither, are free
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

Shape = Sequence[int]

PAIR = 12  # multiply-adds in whose time a query-token pair's exponential and sums are done: 11 to 14 instructions
BYTE = 4  # multiply-adds in whose time a byte passes through memory: 4 to 10 on two to sixteen cores


class Roofs(Protocol):
    """What a CPU does at most, a second; :class:`perceiver_fast.insight.roofs.Roofs` are measured ones."""

    @property
    def multiply_adds(self) -> float: ...

    @property
    def exponentials(self) -> float: ...

    @property
    def copied_bytes(self) -> float: ...


@dataclass(frozen=True)
class Work:
    """Counted work.

    Example:
        >>> from perceiver_fast.ops.work import Work
        >>> print(Work(multiply_adds=2_000_000, bytes=1024) + Work(exponentials=500))
        2.00 M multiply-adds, 500 exponentials, 1.00 KiB
    """

    multiply_adds: int = 0
    exponentials: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.multiply_adds + other.multiply_adds, self.exponentials + other.exponentials, self.bytes + other.bytes
        )

    @property
    def arithmetic(self) -> int:
        """All arithmetic in multiply-adds."""
        return self.multiply_adds + PAIR * self.exponentials

    @property
    def cost(self) -> float:
        """All in multiply-adds: what the ways of a cross-attention are compared by."""
        return self.arithmetic + BYTE * self.bytes

    def seconds(self, roofs: Roofs) -> float:
        """Time of one operator that does all this at the CPU's roofs.

        Exponentials are polynomials, and wait for the same units as multiply-adds; memory is read meanwhile.
        """
        arithmetic = self.multiply_adds / roofs.multiply_adds + self.exponentials / roofs.exponentials
        return max(arithmetic, self.bytes / roofs.copied_bytes)

    def __str__(self) -> str:
        operations = f"{decimal(self.multiply_adds)} multiply-adds, {decimal(self.exponentials)} exponentials"
        return f"{operations}, {binary(self.bytes)}"


def attention_work(q: Shape, k: Shape, v: Shape, inverted: bool = False) -> Work:
    """Of attention of q ``[.., N, d]`` to k ``[.., M, d]`` and v ``[.., M, dv]``; inverted, logits are computed twice."""
    pairs, passes = prod(q[:-1]) * k[-2], 1 + inverted
    return Work(pairs * (passes * q[-1] + v[-1]), passes * pairs)


def no_work(*arguments: object) -> Work:
    """Of operators that are elementwise: they count by their bytes."""
    return Work()


def decimal(number: float) -> str:
    """For people: ``1.23 G``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{_three_digits(number / size)} {unit}"
    return f"{number:.0f}"


def binary(number: float) -> str:
    """Bytes for people: ``1.23 MiB``."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{_three_digits(number / size)} {unit}"
    return f"{number:.0f} B"


def _three_digits(number: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{number:.{max(0, 2 - (number >= 10) - (number >= 100))}f}"
