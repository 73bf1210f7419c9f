"""A grid of any number of axes as rows x columns, and how its work is cut into programs.

Columns are the last axis, or several when it is short; all other axes fold into rows. A query has a table of numbers
for every axis. Of a row, which is a place on several axes, it has the sum of their entries there; what it collects in a
row belongs to every one of these entries.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perceiver_fast.gpu import multiprocessors
from perceiver_fast.kernels.configs import MOST, Config, config

NARROW = 32  # axes are joined until there are as many columns
FEW = 4  # up to so many channels, an image's, tiles may be large
FLOAT32 = 8  # up to so many channels float32 is multiplied without products of matrices: an instruction a channel
GROUP = 8  # rows whose sums one accumulator of a product holds apart, in its columns F + 1 ..


@dataclass(frozen=True)
class Grid:
    """Sizes of a call, and the variant of the kernels it takes.

    ``precision`` says how the weights meet the values: ``"fma"`` (float32, no tensor cores), ``"bf16"`` (weights
    rounded to bfloat16), ``"tf32"`` (cut off to TF32, float16's significand with a range that needs no maximum) or
    ``"ieee"`` (float32, many features).
    """

    batch: int
    queries: int
    features: int
    sizes: tuple[int, ...]
    precision: str

    @property
    def split(self) -> int:
        """How many leading axes fold into rows."""
        split = len(self.sizes) - 1
        while split > 1 and math.prod(self.sizes[split:]) < NARROW:
            split -= 1
        return split

    @property
    def rows(self) -> int:
        return math.prod(self.sizes[: self.split])

    @property
    def columns(self) -> int:
        return math.prod(self.sizes[self.split :])

    @property
    def length(self) -> int:
        """Entries of a folded query: features, rows, columns."""
        return self.features + self.rows + self.columns

    @property
    def is_folded(self) -> bool:
        """Whether the grid has rows and columns alone, so that no leading axis has to be folded into them."""
        return len(self.sizes) == 2

    def config(self, kernel: str, architecture: int, dropout: float) -> Config:
        """A kernel's configuration. Dropout's hashes need registers: no bound, and at most 16 weights a thread."""
        wide = "" if self.features <= FEW else ", wide"
        found = config(f"{kernel}[{self.precision}{wide}]", architecture)
        if dropout == 0:
            return found
        halved = found.queries * found.tokens > 16 * 32 * found.warps
        return replace(found, registers=MOST, tokens=found.tokens // 2 if halved else found.tokens)

    def fold(self, x: Tensor) -> Tensor:
        """``[B, N, F + sum(sizes)]`` to ``[B, N, F + rows + columns]``, every table's entry added where it counts."""
        if self.is_folded:
            return x if x.stride(-1) == 1 else x.contiguous()
        feat, *axes = x.split([self.features, *self.sizes], -1)
        return torch.cat([feat, self._outer_sum(axes[: self.split], x), self._outer_sum(axes[self.split :], x)], -1)

    @staticmethod
    def _outer_sum(axes: list[Tensor], like: Tensor) -> Tensor:
        total = like.new_zeros(*like.shape[:2], 1)
        for axis in axes:
            total = (total.unsqueeze(-1) + axis.unsqueeze(2)).flatten(2)
        return total

    def unfold(self, x: Tensor) -> Tensor:
        """The adjoint of :meth:`fold`: what rows and columns hold, summed for every axis."""
        if self.is_folded:
            return x
        feat, rows, columns = x.split([self.features, self.rows, self.columns], -1)
        parts = [feat]
        for part, sizes in ((rows, self.sizes[: self.split]), (columns, self.sizes[self.split :])):
            part = part.unflatten(-1, sizes) if sizes else part
            for axis in range(len(sizes)):
                others = [2 + other for other in range(len(sizes)) if other != axis]
                parts.append(part.sum(others) if others else part)
        return torch.cat(parts, -1)


def precision_of(dtype: torch.dtype, features: int) -> str:
    """The variant for raw channels of ``dtype``."""
    if dtype == torch.float32:
        return "fma" if features <= FLOAT32 else "ieee"
    return "bf16" if dtype == torch.bfloat16 else "tf32"


@dataclass(frozen=True)
class Blocks:
    """How a sweep over a grid is cut: into so many blocks of queries and of columns, and so many splits of the rows."""

    queries: int
    columns: int
    splits: int
    rows_per_split: int

    @property
    def partials(self) -> int:
        """Partial sums that every query ends up with."""
        return self.columns * self.splits


def blocks(grid: Grid, config: Config, device: torch.device) -> Blocks:
    """How a call is cut: every split is of whole groups of rows."""
    queries = math.ceil(grid.queries / config.queries)
    columns = math.ceil(grid.columns / config.tokens)
    groups = math.ceil(grid.rows / GROUP)
    at_once = config.resident * multiprocessors(device)
    per_split = _groups_per_split(grid.batch * queries * columns, groups, at_once)
    return Blocks(queries, columns, math.ceil(groups / per_split), per_split * GROUP)


BEGINNING = 1  # what a program costs before its first row and after its last, in groups of rows


@functools.cache
def _groups_per_split(programs: int, groups: int, at_once: int) -> int:
    """Groups of rows for each of ``programs`` that are split: so many that all are done soonest, ``at_once`` at a time."""

    def time(per_split: int) -> int:
        return math.ceil(programs * math.ceil(groups / per_split) / at_once) * (per_split + BEGINNING)

    return min(range(groups, 0, -1), key=time)
