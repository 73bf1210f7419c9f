"""One program's walk down its rows without tensor cores: float32 throughout, for few features.

A thread holds four neighbouring columns of several queries; what is summed over columns is first summed there, so that a
row costs one shuffled reduction, for its own sum, and channels none until the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels.dropout import dropout_keep


@triton.jit
def fold(x, N: tl.constexpr, J: tl.constexpr):
    """Sums of four neighbours, which one thread holds: [N, J] to [N, J / 4] without a shuffle."""
    return tl.sum(tl.reshape(x, [N, J // 4, 4]), 2)


@triton.jit
def load_features(pointers, mask, F: tl.constexpr):
    """F vectors of a query block, one a channel."""
    g = ()
    for f in tl.static_range(F):
        g = g + (tl.load(pointers + f, mask=mask, other=0.0),)
    return g


@triton.jit
def add_features(t, g, x, F: tl.constexpr):
    """t + g . x for every query and column."""
    for f in tl.static_range(F):
        t += g[f][:, None] * x[f][None, :]
    return t


@triton.jit
def load_row(planes, padded, F: tl.constexpr):
    """A row's channels and scale; ``planes`` points at its first channel for every column."""
    x = ()
    for f in tl.static_range(F):
        x = x + (tl.load(planes + f * padded),)
    return x, tl.load(planes + F * padded)


@triton.jit
def row_table(pointers, i, live, planes, padded, F: tl.constexpr, HOLES: tl.constexpr):
    """Every query's entry for row i, less what closes the row's holes: [N, 1] or [N, J]."""
    a = tl.load(pointers + i, mask=live, other=0.0)[:, None]
    if HOLES:
        a = a + tl.load(planes + (F + 1) * padded)[None, :]
    return a


@triton.jit
def maximum_fma(
    table, query_rows, live, g, planes, padded, first, last,
    F: tl.constexpr, BN: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
    """The largest logit of every query in these rows."""
    m = tl.full([BN], float("-inf"), tl.float32)
    line = padded.to(tl.int64) * (F + 2)
    for i in range(first, last):
        here = planes + i * line
        x, r = load_row(here, padded, F)
        t = table + row_table(query_rows, i, live, here, padded, F, HOLES)
        m = tl.maximum(m, tl.max(add_features(t, g, x, F) * r[None, :], 1))
    return m


@triton.jit
def sweep_fma(
    table, query_rows, live, g, planes, padded, first, last, shift, rows_out, N, row_hash, token_hashes, threshold,
    F: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
    """Sums over these rows: [BN, BJ] by column, F vectors by channel, of all weights, of those that dropout kept."""
    column_sums = tl.zeros([BN, BJ], tl.float32)
    total = tl.zeros([BN, BJ // 4], tl.float32)
    kept = tl.zeros([BN, BJ // 4], tl.float32)
    y = ()
    for f in tl.static_range(F):
        y = y + (tl.zeros([BN, BJ // 4], tl.float32),)
    line = padded.to(tl.int64) * (F + 2)
    for i in range(first, last):
        here = planes + i * line
        x, r = load_row(here, padded, F)
        t = table + row_table(query_rows, i, live, here, padded, F, HOLES)
        p = tl.exp2(add_features(t, g, x, F) * r[None, :] - shift[:, None])
        total += fold(p, BN, BJ)
        if DROPOUT:
            p = tl.where(dropout_keep(row_hash[:, None], tl.load(token_hashes + i * padded)[None, :], threshold), p, 0.0)
            kept += fold(p, BN, BJ)
        pr = p * r[None, :]
        column_sums += pr
        tl.store(rows_out + i * N, tl.sum(fold(pr, BN, BJ), 1), mask=live)
        collected = ()
        for f in tl.static_range(F):
            collected = collected + (y[f] + fold(pr * x[f][None, :], BN, BJ),)
        y = collected
    sums = ()
    for f in tl.static_range(F):
        sums = sums + (tl.sum(y[f], 1),)
    return column_sums, sums, tl.sum(total, 1), tl.sum(kept, 1)


@triton.jit
def sweep_backward_fma(
    table, d_table, query_rows, d_query_rows, live, g, d_g, planes, padded, first, last, shift, factor, delta, d_kept,
    rows_out, N, row_hash, token_hashes, threshold,
    F: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
    """Sums of dS over these rows: [BN, BJ] by column, F vectors by channel, and of dS alone."""
    column_sums = tl.zeros([BN, BJ], tl.float32)
    residual = tl.zeros([BN, BJ // 4], tl.float32)
    y = ()
    for f in tl.static_range(F):
        y = y + (tl.zeros([BN, BJ // 4], tl.float32),)
    line = padded.to(tl.int64) * (F + 2)
    for i in range(first, last):
        here = planes + i * line
        x, r = load_row(here, padded, F)
        t = table + row_table(query_rows, i, live, here, padded, F, HOLES)
        p = tl.exp2(add_features(t, g, x, F) * r[None, :] - shift[:, None])
        d_a = tl.load(d_query_rows + i, mask=live, other=0.0) * factor
        d_t = add_features(d_table + d_a[:, None], d_g, x, F)
        if DROPOUT:
            keep = dropout_keep(row_hash[:, None], tl.load(token_hashes + i * padded)[None, :], threshold)
            ds = p * (tl.where(keep, d_t * r[None, :] + d_kept[:, None], 0.0) - delta[:, None])
        else:
            ds = p * (d_t * r[None, :] - delta[:, None])
        residual += fold(ds, BN, BJ)
        dsr = ds * r[None, :]
        column_sums += dsr
        tl.store(rows_out + i * N, tl.sum(fold(dsr, BN, BJ), 1), mask=live)
        collected = ()
        for f in tl.static_range(F):
            collected = collected + (y[f] + fold(dsr * x[f][None, :], BN, BJ),)
        y = collected
    sums = ()
    for f in tl.static_range(F):
        sums = sums + (tl.sum(y[f], 1),)
    return column_sums, sums, tl.sum(residual, 1)
