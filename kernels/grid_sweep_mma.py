"""One program's walk down its rows with tensor cores: logits from keys, and one product with values for all sums.

The products accumulate on the logits' other terms, and on the sums so far. "ieee" runs them in float32 without tensor
cores: 3xTF32 would come close, but tensor cores truncate what they accumulate, which shows in long sums.

Arguments of the functions are those of grid_sweep_fma, but for these:

    g, d_g   [BN, K]  what q and d_o hold of the channels, packed as keys want it: :func:`load_packed`
    scale    [BJ]     pointers to row 0's scales; the terms that close holes lie ``padded`` behind them
    keys              pointer to row 0's first key; keys are [rows, padded, K]
    values            pointer to row 0's first value; values are [rows, padded, V]
    j        [BJ]     the program's columns; up to ``padded`` all can be read
    HOLES             there may be holes, and keys have no room for the terms that close them
    PRECISION         of products: "bf16", "tf32" or "ieee", see grid.Grid
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels import grid
from perceiver_fast.kernels.dropout import dropout_keep
from perceiver_fast.kernels.grid_attention_tokens import HOLE

FEW = tl.constexpr(grid.FEW)  # kernels read no other kind of global


@triton.jit
def load_packed(pointers, factor, mask, F: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, CLOSE: tl.constexpr):
    """``[BN, K]``: what a block of queries holds of the channels, times ``factor``, packed as the keys are.

    A key holds every channel several times (grid_attention_tokens.key_pieces). bf16 has too few bits for a query's
    float32, so that it is cut into 2 or 3 pieces of bf16, and every piece meets the channel. With "ieee" it is float32
    as it is. ``CLOSE``, for q but not for gradients: a key's last column, where keys have room for it, is 1 for a hole,
    and HOLE here, which leaves it no weight.

    Args:
        pointers: ``[BN]``, to the first channel.
        factor: ``[BN]``, float32.
        mask: ``[BN]``, False for queries that are none: zeros.
    """
    k = tl.arange(0, K)
    split: tl.constexpr = 3 if F <= FEW else 2
    pieces: tl.constexpr = 1 if PRECISION == "ieee" else split if PRECISION == "bf16" else 2 * split - 1
    g = tl.load(pointers[:, None] + (k % F)[None, :], mask=mask[:, None] & (k < pieces * F)[None, :], other=0.0)
    g *= factor[:, None]
    if PRECISION != "ieee":
        first = g.to(tl.bfloat16)
        rest = g - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        piece = (k // F % split)[None, :]
        g = tl.where(piece == 0, first, tl.where(piece == 1, second, third))
    if CLOSE and K > pieces * F:
        g = tl.where((k == K - 1)[None, :], HOLE, g.to(tl.float32)).to(g.dtype)
    return g


@triton.jit
def product(p, v, acc, PRECISION: tl.constexpr):
    """``acc [BN, V]`` + p v, of v ``[BJ, V]`` and p ``[BN, BJ]``, rounded to bf16, cut off to TF32, or as it is."""
    if PRECISION == "bf16":
        return tl.dot(p.to(tl.bfloat16), v, acc)
    else:
        return tl.dot(p, v, acc, input_precision=PRECISION)


@triton.jit
def add_keys(t, g, keys, PRECISION: tl.constexpr):
    """``t [BN, BJ]`` + g keys^T, of ``[BN, K]`` and ``[BJ, K]``; but for "ieee" both are bf16."""
    if PRECISION == "ieee":
        return tl.dot(g, tl.trans(keys), t, input_precision="ieee")
    else:
        return tl.dot(g, tl.trans(keys), t)


@triton.jit
def row_terms(table, pointers, i, live, scale, padded, HOLES: tl.constexpr):
    """``[BN, BJ]``: the logits' terms but for keys, before scaling: tables, and what closes holes that keys do not."""
    t = table + tl.load(pointers + i, mask=live, other=0.0)[:, None]
    if HOLES:
        t += tl.load(scale + padded)[None, :]
    return t


@triton.jit
def store_rows(acc, rows_out, step, rows, last, apart, live):
    """Writes the sums of a group of rows, which stand apart in columns of ``acc [BN, V]``, and gives acc without them.

    ``rows [V]`` says which row a column is of, ``apart [V]`` which columns are of rows at all.
    """
    stored = live[:, None] & (apart & (rows < last))[None, :]
    tl.store(rows_out[:, None] + (rows * step)[None, :], acc, mask=stored)
    return tl.where(apart[None, :], 0.0, acc)


@triton.jit
def load_row(scale, keys, values, at, j, k, c, K: tl.constexpr, V: tl.constexpr):
    """Scales ``[BJ]``, keys ``[BJ, K]`` and values ``[BJ, V]`` of the row that begins at token ``at``.

    ``k [K]`` and ``c [V]`` count columns of keys and of values.
    """
    r = tl.load(scale + 2 * at)
    key = tl.load(keys + at * K + (j[:, None] * K + k[None, :]))
    value = tl.load(values + at * V + (j[:, None] * V + c[None, :]))
    return r, key, value


@triton.jit
def maximum_mma(
    table, query_rows, live, g, scale, keys, padded, first, last, j,
    K: tl.constexpr, BN: tl.constexpr, HOLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``[BN]``: the largest logit of every query in these rows, in base 2."""
    m = tl.full([BN], float("-inf"), tl.float32)
    line = padded.to(tl.int64)
    for i in range(first, last):
        here = scale + 2 * i * line
        key = tl.load(keys + i * line * K + (j[:, None] * K + tl.arange(0, K)[None, :]))
        t = add_keys(row_terms(table, query_rows, i, live, here, padded, HOLES), g, key, PRECISION)
        s = t * tl.load(here)[None, :]
        m = tl.maximum(m, tl.max(s, 1))
    return m


@triton.jit
def sweep_mma(
    table, query_rows, live, g, scale, keys, values, padded, first, last, j, shift, rows_out, step, row_hash, token_hashes,
    threshold, F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
    BJ: tl.constexpr, DROPOUT: tl.constexpr, HOLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over these rows of weights p = 2^(s - shift), of those that dropout keeps but for ``total``.

    Returns:
        column_sums: ``[BN, BJ]``, of p r by column.
        acc: ``[BN, V]``, of p r x by channel in its first F columns.
        total: ``[BN]``, of all p.
        kept_total: ``[BN]``, of p that dropout keeps.

    Sums of p r by row are written to ``rows_out``.
    """
    k, c = tl.arange(0, K), tl.arange(0, V)
    apart = (c > F) & (c <= F + GROUP)  # columns of acc: F channels, one for the weights, one for each row of a group
    column_sums = tl.zeros([BN, BJ], tl.float32)
    acc = tl.zeros([BN, V], tl.float32)
    total = tl.zeros([BN], tl.float32)
    line = padded.to(tl.int64)
    for start in range(first, last, GROUP):
        for i in range(start, tl.minimum(start + GROUP, last)):
            at = i * line
            r, key, value = load_row(scale, keys, values, at, j, k, c, K, V)
            t = add_keys(row_terms(table, query_rows, i, live, scale + 2 * at, padded, HOLES), g, key, PRECISION)
            p = tl.exp2(t * r[None, :] - shift[:, None])
            if DROPOUT:
                total += tl.sum(p, 1)
                token_hash = tl.load(token_hashes + i * padded)
                p = tl.where(dropout_keep(row_hash[:, None], token_hash[None, :], threshold), p, 0.0)
            column_sums += p * r[None, :]
            acc = product(p, value, acc, PRECISION)
        acc = store_rows(acc, rows_out, step, start + c - F - 1, last, apart, live)
    kept_total = tl.sum(tl.where((c == F)[None, :], acc, 0.0), 1)
    if not DROPOUT:
        total = kept_total
    return column_sums, acc, total, kept_total


@triton.jit
def sweep_backward_mma(
    table, d_table, query_rows, d_query_rows, live, g, d_g, scale, keys, values, padded, first, last, j, shift, factor,
    delta, d_kept, rows_out, step, row_hash, token_hashes, threshold, F: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr, HOLES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over these rows of dS, the gradient by the logits.

    Returns:
        column_sums: ``[BN, BJ]``, of dS r by column.
        acc: ``[BN, V]``, of dS r x by channel in its first F columns.
        residual: ``[BN]``, of dS alone.

    Sums of dS r by row are written to ``rows_out``.
    """
    k, c = tl.arange(0, K), tl.arange(0, V)
    apart = (c > F) & (c <= F + GROUP)  # columns of acc: F channels, one for the weights, one for each row of a group
    column_sums = tl.zeros([BN, BJ], tl.float32)
    acc = tl.zeros([BN, V], tl.float32)
    line = padded.to(tl.int64)
    for start in range(first, last, GROUP):
        for i in range(start, tl.minimum(start + GROUP, last)):
            d_a = tl.load(d_query_rows + i, mask=live, other=0.0) * factor
            at = i * line
            r, key, value = load_row(scale, keys, values, at, j, k, c, K, V)
            t = add_keys(row_terms(table, query_rows, i, live, scale + 2 * at, padded, HOLES), g, key, PRECISION)
            p = tl.exp2(t * r[None, :] - shift[:, None])
            d_t = add_keys(d_table + d_a[:, None], d_g, key, PRECISION)
            if DROPOUT:
                keep = dropout_keep(row_hash[:, None], tl.load(token_hashes + i * padded)[None, :], threshold)
                ds = p * (tl.where(keep, d_t * r[None, :] + d_kept[:, None], 0.0) - delta[:, None])
            else:
                ds = p * (d_t * r[None, :] - delta[:, None])
            column_sums += ds * r[None, :]
            acc = product(ds, value, acc, PRECISION)
        acc = store_rows(acc, rows_out, step, start + c - F - 1, last, apart, live)
    return column_sums, acc, tl.sum(tl.where((c == F)[None, :], acc, 0.0), 1)
