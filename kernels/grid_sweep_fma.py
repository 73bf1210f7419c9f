"""One program's walk down its rows without tensor cores: float32 throughout, for few features.

A thread holds four neighbouring columns of several queries. What is summed over columns is first summed within the
thread, so that a row costs one reduction across threads, for its own sum, and channels cost none until the end.

Arguments of the functions, for a program's BN queries and BJ columns:

    table, d_table          [BN, BJ]   of q and d_o, what they hold of the columns; d_table times factor
    query_rows,             [BN]       pointers to what q and d_o hold of row 0
    d_query_rows
    live                    [BN]       bool: the query is one; others read as zeros and are not written
    g, d_g                  F x [BN]   what q and d_o hold of the channels; d_g times factor
    planes                  [BJ]       pointers to the first channel of row 0 (grid_attention_tokens)
    padded                             columns in memory
    first, last                        rows to walk over
    shift, factor,          [BN]       of a query: 2^(s - shift) is its weight but for a factor; see grid_attention and
    delta, d_kept                      grid_attention_backward
    rows_out, step          [BN]       pointers to the sums of row 0 in row_parts, and from row to row there, int64
    row_hash                [BN]       dropout's, as are token_hashes [BJ], pointers to row 0's, and threshold
    HOLES                              there may be tokens that are masked or beyond the last column: they read as
                                       channels of 0, a scale of 1, and a term of the logit that leaves no weight
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels.dropout import dropout_keep


@triton.jit
def fold(x, N: tl.constexpr, J: tl.constexpr):
    """``[N, J]`` to ``[N, J / 4]``: sums of four neighbours, which one thread holds, so that nothing is exchanged."""
    return tl.sum(tl.reshape(x, [N, J // 4, 4]), 2)


@triton.jit
def load_features(pointers, mask, F: tl.constexpr):
    """F vectors ``[BN]``, one a channel, of pointers ``[BN]`` to the first; zero where ``mask`` is False."""
    g = ()
    for f in tl.static_range(F):
        g = g + (tl.load(pointers + f, mask=mask, other=0.0),)
    return g


@triton.jit
def add_features(t, g, x, F: tl.constexpr):
    """``t [BN, BJ]`` + g . x, of F vectors ``[BN]`` and F vectors ``[BJ]``."""
    for f in tl.static_range(F):
        t += g[f][:, None] * x[f][None, :]
    return t


@triton.jit
def zero_sums(F: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr):
    """F tensors ``[BN, BJ / 4]`` of zeros: sums by channel, folded."""
    y = ()
    for f in tl.static_range(F):
        y = y + (tl.zeros([BN, BJ // 4], tl.float32),)
    return y


@triton.jit
def collect(y, weights, x, F: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr):
    """Sums by channel ``y`` plus those of ``weights [BN, BJ]`` times F vectors ``x [BJ]``."""
    grown = ()
    for f in tl.static_range(F):
        grown = grown + (y[f] + fold(weights * x[f][None, :], BN, BJ),)
    return grown


@triton.jit
def totals(y, F: tl.constexpr):
    """Sums by channel, folded, to F vectors ``[BN]``."""
    sums = ()
    for f in tl.static_range(F):
        sums = sums + (tl.sum(y[f], 1),)
    return sums


@triton.jit
def row_logits(table, query_rows, i, live, g, here, padded, F: tl.constexpr, HOLES: tl.constexpr):
    """Row i's channels, F vectors ``[BJ]``, its scale ``[BJ]``, and the logits in base 2, ``[BN, BJ]``.

    ``here [BJ]`` points to the row's first channel.
    """
    x = ()
    for f in tl.static_range(F):
        x = x + (tl.load(here + f * padded),)
    r = tl.load(here + F * padded)
    t = tl.load(query_rows + i, mask=live, other=0.0)[:, None]
    if HOLES:
        t = t + tl.load(here + (F + 1) * padded)[None, :]
    return x, r, add_features(table + t, g, x, F) * r[None, :]


@triton.jit
def maximum_fma(
    table, query_rows, live, g, planes, padded, first, last,
    F: tl.constexpr, BN: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
    """``[BN]``: the largest logit of every query in these rows, in base 2."""
    m = tl.full([BN], float("-inf"), tl.float32)
    line = padded.to(tl.int64) * (F + 2)
    for i in range(first, last):
        _, _, s = row_logits(table, query_rows, i, live, g, planes + i * line, padded, F, HOLES)
        m = tl.maximum(m, tl.max(s, 1))
    return m


@triton.jit
def sweep_fma(
    table, query_rows, live, g, planes, padded, first, last, shift, rows_out, step, row_hash, token_hashes, threshold,
    F: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
    """Sums over these rows of weights p = 2^(s - shift), of those that dropout keeps but for ``total``.

    Returns:
        column_sums: ``[BN, BJ]``, of p r by column.
        sums: F vectors ``[BN]``, of p r x by channel.
        total: ``[BN]``, of all p.
        kept_total: ``[BN]``, of p that dropout keeps; zero without dropout.

    Sums of p r by row are written to ``rows_out``.
    """
    column_sums = tl.zeros([BN, BJ], tl.float32)
    total = tl.zeros([BN, BJ // 4], tl.float32)
    kept_total = tl.zeros([BN, BJ // 4], tl.float32)
    y = zero_sums(F, BN, BJ)
    line = padded.to(tl.int64) * (F + 2)
    for i in range(first, last):
        x, r, s = row_logits(table, query_rows, i, live, g, planes + i * line, padded, F, HOLES)
        p = tl.exp2(s - shift[:, None])
        total += fold(p, BN, BJ)
        if DROPOUT:
            token_hash = tl.load(token_hashes + i * padded)
            p = tl.where(dropout_keep(row_hash[:, None], token_hash[None, :], threshold), p, 0.0)
            kept_total += fold(p, BN, BJ)
        pr = p * r[None, :]
        column_sums += pr
        tl.store(rows_out + i * step, tl.sum(fold(pr, BN, BJ), 1), mask=live)
        y = collect(y, pr, x, F, BN, BJ)
    return column_sums, totals(y, F), tl.sum(total, 1), tl.sum(kept_total, 1)


@triton.jit
def sweep_backward_fma(
    table, d_table, query_rows, d_query_rows, live, g, d_g, planes, padded, first, last, shift, factor, delta, d_kept,
    rows_out, step, row_hash, token_hashes, threshold,
    F: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
    """Sums over these rows of dS, the gradient by the logits.

    Returns:
        column_sums: ``[BN, BJ]``, of dS r by column.
        sums: F vectors ``[BN]``, of dS r x by channel.
        residual: ``[BN]``, of dS alone.

    Sums of dS r by row are written to ``rows_out``.
    """
    column_sums = tl.zeros([BN, BJ], tl.float32)
    residual = tl.zeros([BN, BJ // 4], tl.float32)
    y = zero_sums(F, BN, BJ)
    line = padded.to(tl.int64) * (F + 2)
    for i in range(first, last):
        x, r, s = row_logits(table, query_rows, i, live, g, planes + i * line, padded, F, HOLES)
        p = tl.exp2(s - shift[:, None])
        d_a = tl.load(d_query_rows + i, mask=live, other=0.0) * factor  # [BN]
        d_t = add_features(d_table + d_a[:, None], d_g, x, F)  # [BN, BJ]
        if DROPOUT:
            keep = dropout_keep(row_hash[:, None], tl.load(token_hashes + i * padded)[None, :], threshold)
            ds = p * (tl.where(keep, d_t * r[None, :] + d_kept[:, None], 0.0) - delta[:, None])
        else:
            ds = p * (d_t * r[None, :] - delta[:, None])
        residual += fold(ds, BN, BJ)
        dsr = ds * r[None, :]
        column_sums += dsr
        tl.store(rows_out + i * step, tl.sum(fold(dsr, BN, BJ), 1), mask=live)
        y = collect(y, dsr, x, F, BN, BJ)
    return column_sums, totals(y, F), tl.sum(residual, 1)
