"""Passes over the rows of a matrix: how they are cut into tiles, and how sums over all rows are computed.

Sums of columns are added up without atomics, so that they are the same bits every time: each of a fixed number of
programs walks over its share of the rows and leaves what it summed, and a second kernel adds that up in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.gpu import multiprocessors
from perceiver_fast.kernels.configs import Config
from perceiver_fast.kernels.launch import Launch

NARROWEST = 16  # columns of a tile, at least
TALLEST = 16  # rows of a tile, at most: addresses and statistics of every row take registers
COLUMNS = 32  # that a program adds up at the end: 128 bytes of float32, as much as memory reads at once
MERGED = 64  # parts that it reads at a time, so that its walk is short


@dataclass(frozen=True)
class Tiles:
    """How a matrix is cut: into tiles of ``rows x columns``, ``blocks`` of them to a row and ``count`` to a column."""

    rows: int
    columns: int
    blocks: int
    count: int

    def shares(self, config: Config, device: torch.device) -> int:
        """How many programs share the rows of a block of columns: all blocks together, as many as run at once.

        Registers are what limits that.
        """
        return max(1, min(self.count, config.resident * multiprocessors(device) // self.blocks))


def tiles(rows: int, width: int, config: Config) -> Tiles:
    """Cut ``[rows, width]`` into tiles of the configuration's columns or less, and of as many elements or less."""
    columns = min(config.tokens, max(NARROWEST, triton.next_power_of_2(width)))
    height = min(config.queries * config.tokens // columns, TALLEST)
    return Tiles(height, columns, triton.cdiv(width, columns), triton.cdiv(rows, height))


@triton.jit
def column_sums_kernel(
    parts, first, second, third, width, parts_count, blocks,
    KINDS: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Sums over the first axis of ``parts``, in order; one output a kind.

    Grid: ``KINDS * blocks`` programs; one has BLOCK columns of one kind. What lies beyond reads as zero.

        parts                 [parts_count, KINDS, width]  in   fp32
        first, second, third  [width]                      out  fp32, fp16 or bf16; None from the KINDS-th on

        width, parts_count, blocks  columns, parts, and blocks of BLOCK columns
        KINDS                       1, 2 or 3
        MERGED                      parts read at a time
    """
    pid = tl.program_id(0)
    kind = pid // blocks
    column = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([MERGED, BLOCK], tl.float32)
    for i in tl.range(0, parts_count, MERGED):
        part = (i + tl.arange(0, MERGED))[:, None]
        at = (part.to(tl.int64) * KINDS + kind) * width + column[None, :]
        total += tl.load(parts + at, mask=(part < parts_count) & inside[None, :], other=0.0)
    sums = tl.sum(total, 0)
    tl.store(first + column, sums.to(first.dtype.element_ty), mask=inside & (kind == 0))
    if KINDS > 1:
        tl.store(second + column, sums.to(second.dtype.element_ty), mask=inside & (kind == 1))
    if KINDS > 2:
        tl.store(third + column, sums.to(third.dtype.element_ty), mask=inside & (kind == 2))


def column_sums(parts: Tensor, outputs: list[Tensor]) -> Launch:
    """The launch that adds up ``parts [programs, len(outputs), width]`` into one to three outputs ``[width]``."""
    count, kinds, width = parts.shape
    first, second, third = outputs + [None] * (3 - kinds)
    arguments = dict(parts=parts, first=first, second=second, third=third, width=width, parts_count=count)
    blocks = triton.cdiv(width, COLUMNS)
    arguments |= dict(blocks=blocks, KINDS=kinds, BLOCK=COLUMNS, MERGED=MERGED)
    return Launch(column_sums_kernel, kinds * blocks, arguments)
