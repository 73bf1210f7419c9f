"""One program's walk down its rows without tensor cores: float32 throughout, for few features.

A thread holds four neighbouring columns of several queries; what is summed over columns is first summed there, so that a
row costs one shuffle's worth of reduction, for its own sum, and channels none until the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels import dropout as hashing


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
def load_plane_row(base, padded, F: tl.constexpr):
    """A row's channels, scale and one; ``base`` points at its first channel for every column."""
    x = ()
    for f in tl.static_range(F):
        x = x + (tl.load(base + f * padded),)
    return x, tl.load(base + F * padded), tl.load(base + (F + 1) * padded)


@triton.jit
def add_features(t, g, x, F: tl.constexpr):
    """t + g . x for every query and column."""
    for f in tl.static_range(F):
        t += g[f][:, None] * x[f][None, :]
    return t


@triton.jit
def weights(s, shift, one, EXACT: tl.constexpr):
    """exp2 of logits, less the shift if there is one; that could make a token of zeros overflow."""
    if EXACT:
        return tl.where(one[None, :] > 0, tl.exp2(s - shift[:, None]), 0.0)
    else:
        return tl.exp2(s)


@triton.jit
def maximum_fma(table, row_table, live, g, planes, padded, first, last, F: tl.constexpr, BN: tl.constexpr):
    m = tl.full([BN], float("-inf"), tl.float32)
    line = padded.to(tl.int64) * (F + 2)
    for i in range(first, last):
        a = tl.load(row_table + i, mask=live, other=0.0)
        x, r, one = load_plane_row(planes + i * line, padded, F)
        s = add_features(table + a[:, None], g, x, F) * r[None, :]
        m = tl.maximum(m, tl.max(tl.where(one[None, :] > 0, s, float("-inf")), 1))
    return m


@triton.jit
def sweep_fma(
    table, row_table, live, g, planes, padded, first, last, shift, rows_out, N, columns, j, row_key, seed, threshold,
    F: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    column_sums = tl.zeros([BN, BJ], tl.float32)
    total = tl.zeros([BN, BJ // 4], tl.float32)
    kept = tl.zeros([BN, BJ // 4], tl.float32)
    y = ()
    for f in tl.static_range(F):
        y = y + (tl.zeros([BN, BJ // 4], tl.float32),)
    line = padded.to(tl.int64) * (F + 2)
    tokens = j.to(tl.int64)
    for i in range(first, last):
        a = tl.load(row_table + i, mask=live, other=0.0)
        x, r, one = load_plane_row(planes + i * line, padded, F)
        p = weights(add_features(table + a[:, None], g, x, F) * r[None, :], shift, one, EXACT)
        counted = p * one[None, :]
        total += fold(counted, BN, BJ)
        if DROPOUT:
            token_key = hashing.token_keys(tl.load(seed), tokens + i * columns)
            keep = hashing.keep(row_key[:, None], token_key[None, :], threshold)
            p = tl.where(keep, p, 0.0)
            kept += fold(tl.where(keep, counted, 0.0), BN, BJ)
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
    table, row_table, d_table, d_row_table, live, g, d_g, planes, padded, first, last, shift, factor, delta, d_kept,
    rows_out, N, columns, j, row_key, seed, threshold,
    F: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    column_sums = tl.zeros([BN, BJ], tl.float32)
    residual = tl.zeros([BN, BJ // 4], tl.float32)
    y = ()
    for f in tl.static_range(F):
        y = y + (tl.zeros([BN, BJ // 4], tl.float32),)
    line = padded.to(tl.int64) * (F + 2)
    tokens = j.to(tl.int64)
    for i in range(first, last):
        a = tl.load(row_table + i, mask=live, other=0.0)
        d_a = tl.load(d_row_table + i, mask=live, other=0.0) * factor
        x, r, one = load_plane_row(planes + i * line, padded, F)
        p = weights(add_features(table + a[:, None], g, x, F) * r[None, :], shift, one, EXACT)
        d_p = add_features(d_table + d_a[:, None], d_g, x, F) * r[None, :]
        if DROPOUT:
            token_key = hashing.token_keys(tl.load(seed), tokens + i * columns)
            keep = hashing.keep(row_key[:, None], token_key[None, :], threshold)
            d_p = tl.where(keep, d_p + d_kept[:, None], 0.0)
        d_p -= delta[:, None]
        ds = p * d_p
        residual += fold(ds * one[None, :], BN, BJ)
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
