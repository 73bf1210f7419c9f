"""What the sweeps of grid attention leave, partial sums by split of the rows and block of columns, made one: forward and
backward.

Sums by row lie with the queries side by side, those by column with the columns. Tiles of both are read as they lie, and
written along the rows of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels.base2 import LN_2
from perceiver_fast.kernels.grid import Grid

MERGED = dict(BN=32, BLOCK=32)  # queries, and rows or columns, of a program that merges: 128 bytes a line either way


@triton.jit
def merge_place(program, N, rows, columns, BN: tl.constexpr, BLOCK: tl.constexpr):
    """A merging program's queries n ``[BN]``, batch element, and which BLOCK rows it merges, or which BLOCK columns.

    Returns:
        n: ``[BN]``.
        b: int64.
        chunk: the BLOCK rows; at least ``row_chunks`` where it merges columns.
        row_chunks: how many there are.
    """
    query_blocks, row_chunks = tl.cdiv(N, BN), tl.cdiv(rows, BLOCK)
    chunks = row_chunks + tl.cdiv(columns, BLOCK)
    n = (program % query_blocks) * BN + tl.arange(0, BN)
    return n, (program // (query_blocks * chunks)).to(tl.int64), program // query_blocks % chunks, row_chunks


@triton.jit
def grid_attention_merge_kernel(
    column_parts, row_parts, sum_parts, o, lse, kept,
    B, N, rows, columns, padded, splits, per_split, column_blocks, keep_scale,
    F: tl.constexpr, BJ: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of queries, each in units of 2^shift, made one and divided by the total.

        top = max shift,    total = sum 2^(shift - top) total_part,    lse = ln(2) (top + log2(total))
        o = ln(2) keep_scale / total sum 2^(shift - top) part

    Grid: one program for BN queries, BLOCK rows or columns, and a batch element, see :func:`merge_place`. Every part
    counts 2^(shift - largest shift); one that met no token has a shift of -inf and counts nothing, as do parts beyond the
    last.

        column_parts, row_parts, sum_parts                in   as grid_attention_forward_kernel leaves them
        o     [B, N, F + rows + columns]                  out  fp32, dense
        lse   [B, N]                                      out  fp64, natural logarithm
        kept  [B, N]                                      out  fp32, or None without dropout

        B, N, rows, columns, padded, splits, per_split    as there
        column_blocks                                     blocks of BJ columns
        keep_scale                                        of dropout: 1 / (1 - p)

        PARTS      power of two, at least splits * column_blocks
        BN, BLOCK  queries of a program, and its rows or columns
    """
    n, b, chunk, row_chunks = merge_place(tl.program_id(0), N, rows, columns, BN, BLOCK)
    live = n < N
    line = (b * 0 + B) * N * (F + 3)  # from part to part; int64, though B or N may be the constant 1
    sums = sum_parts + b * N * (F + 3) + n  # [BN], of part 0; a part's sums follow each other N apart
    k = tl.arange(0, PARTS)
    part, there = (
        sums[None, :] + k[:, None] * line,
        (k < splits * column_blocks)[:, None] & live[None, :],
    )  # [PARTS, BN]
    shifts = tl.load(part + (F + 2) * N, mask=there, other=float("-inf"))
    top = tl.where(live, tl.max(shifts, 0), 0.0)
    weight = tl.exp2(shifts - top[None, :])
    total = tl.where(live, tl.sum(weight * tl.load(part + F * N, mask=there, other=0.0), 0), 1.0)
    factor = LN_2 * keep_scale / total
    row = b * N + n
    out = o + row * (F + rows + columns)
    if chunk == 0:
        for f in tl.static_range(F):
            acc = tl.sum(weight * tl.load(part + f * N, mask=there, other=0.0), 0)
            tl.store(out + f, acc * factor, mask=live)
        tl.store(lse + row, (top.to(tl.float64) + tl.log2(total.to(tl.float64))) * LN_2, mask=live)
        if kept is not None:
            acc = tl.sum(weight * tl.load(part + (F + 1) * N, mask=there, other=0.0), 0)
            tl.store(kept + row, acc * keep_scale / total, mask=live)
    acc = tl.zeros([BN, BLOCK], tl.float32)
    shift_at = (sums + (F + 2) * N)[:, None]
    if chunk < row_chunks:
        i = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = live[:, None] & (i < rows)[None, :]
        for block in tl.range(0, column_blocks, loop_unroll_factor=2):
            index = (i // per_split) * column_blocks + block
            shift = tl.load(shift_at + index[None, :] * line, mask=inside, other=0.0)
            value = tl.load(row_parts + ((block * B + b) * rows + i[None, :]) * N + n[:, None], mask=inside, other=0.0)
            acc += tl.exp2(shift - top[:, None]) * value
        tl.store(out[:, None] + F + i[None, :], acc * factor[:, None], mask=inside)
    else:
        j = (chunk - row_chunks) * BLOCK + tl.arange(0, BLOCK)
        inside = live[:, None] & (j < columns)[None, :]
        for split in tl.range(0, splits, loop_unroll_factor=2):
            index = split * column_blocks + j // BJ
            shift = tl.load(shift_at + index[None, :] * line, mask=inside, other=0.0)
            at = (split * (B * N) + row)[:, None] * padded + j[None, :]
            acc += tl.exp2(shift - top[:, None]) * tl.load(column_parts + at, mask=inside, other=0.0)
        tl.store(out[:, None] + F + rows + j[None, :], acc * factor[:, None], mask=inside)


@triton.jit
def grid_attention_backward_merge_kernel(
    column_parts, row_parts, sum_parts, d_lse, kept, o, stats, dq, correction,
    B, N, rows, columns, padded, splits, column_blocks,
    F: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries' partial gradients summed, in order, and what rounding of delta left in them taken out.

        residual = sum dS - d_lse,    factor delta += factor residual
        correction = residual, or with dropout residual / kept,    dq = ln(2) sum of parts - correction o

    Grid: one program for BN queries, BLOCK rows or columns, and a batch element, see :func:`merge_place`.

        column_parts, row_parts, sum_parts                in      as grid_attention_backward_kernel leaves them
        d_lse       [B, N]                                in      fp64, or None
        kept        [B, N]                                in      fp32, or None without dropout
        o           [B, N, F + rows + columns]            in      fp32, dense; None where it is not folded
        stats       [4, B N]                              in out  fp32: delta is corrected
        dq          [B, N, F + rows + columns]            out     fp32, dense, folded; without o nothing is taken out of it
        correction  [B, N, 1]                             out     fp32

        B, N, rows, columns, padded, splits               as in grid_attention_forward_kernel
        column_blocks                                     blocks of columns of grid_attention_backward_kernel

        PARTS      power of two, at least splits * column_blocks; parts beyond the last read as zeros
        BN, BLOCK  queries of a program, and its rows or columns

    In dq every dS is wrong by P times the residual, so that dq is wrong by the residual times sum_m P r [x ; ..], which
    is o. With dropout o sums only weights that were kept: that sum is about o / kept then, and exactly so where one
    token has all the weight. A query of which nothing was kept is left as it is.
    """
    n, b, chunk, row_chunks = merge_place(tl.program_id(0), N, rows, columns, BN, BLOCK)
    live = n < N
    row = b * N + n
    k = tl.arange(0, PARTS)
    there = (k < splits * column_blocks)[:, None] & live[None, :]
    part = sum_parts + (k[:, None] * B + b) * N * (F + 1) + n[None, :]  # [PARTS, BN]
    residual = tl.sum(tl.load(part + F * N, mask=there, other=0.0), 0)
    if d_lse is not None:
        residual -= tl.load(d_lse + row, mask=live, other=0.0).to(tl.float32)
    if chunk == 0:
        line = b * 0 + B * N  # from one of the stats to the next, int64
        delta = stats + 2 * line + row
        factor = tl.load(stats + line + row, mask=live, other=0.0)
        tl.store(delta, tl.load(delta, mask=live, other=0.0) + residual * factor, mask=live)  # stats hold factor delta
    if kept is not None:
        share = tl.load(kept + row, mask=live, other=0.0)
        residual = tl.where(share > 0, residual / share, 0.0)
    at = row * (F + rows + columns)  # of a query, in dq and o
    if chunk == 0:
        tl.store(correction + row, residual, mask=live)
        for f in tl.static_range(F):
            value = tl.sum(tl.load(part + f * N, mask=there, other=0.0), 0) * LN_2
            if o is not None:
                value -= residual * tl.load(o + at + f, mask=live, other=0.0)
            tl.store(dq + at + f, value, mask=live)
    acc = tl.zeros([BN, BLOCK], tl.float32)
    if chunk < row_chunks:
        i = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = live[:, None] & (i < rows)[None, :]
        for block in tl.range(0, column_blocks, loop_unroll_factor=2):
            index = ((block * B + b) * rows + i[None, :]) * N + n[:, None]
            acc += tl.load(row_parts + index, mask=inside, other=0.0)
        place = at[:, None] + F + i[None, :]
    else:
        j = (chunk - row_chunks) * BLOCK + tl.arange(0, BLOCK)
        inside = live[:, None] & (j < columns)[None, :]
        for split in tl.range(0, splits, loop_unroll_factor=2):
            index = (split * (B * N) + row)[:, None] * padded + j[None, :]
            acc += tl.load(column_parts + index, mask=inside, other=0.0)
        place = at[:, None] + F + rows + j[None, :]
    acc *= LN_2
    if o is not None:
        acc -= residual[:, None] * tl.load(o + place, mask=inside, other=0.0)
    tl.store(dq + place, acc, mask=inside)


def merge_programs(grid: Grid) -> int:
    """Programs of a kernel that merges, see :func:`merge_place`."""
    chunks = triton.cdiv(grid.rows, MERGED["BLOCK"]) + triton.cdiv(grid.columns, MERGED["BLOCK"])
    return grid.batch * triton.cdiv(grid.queries, MERGED["BN"]) * chunks
