"""One program's walk down its rows with tensor cores: logits from keys, and one product with values for all sums.

The products accumulate on the logits' other terms, and on the sums so far. "ieee" runs them in float32 without tensor
cores: 3xTF32 would come close, but tensor cores truncate what they accumulate, which shows in long sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels import dropout as hashing
from perceiver_fast.kernels.grid_sweep_fma import weights


@triton.jit
def load_packed(pointers, factor, mask, F: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """A query block's channels times ``factor`` as keys want them: three pieces of bf16, or float32."""
    k = tl.arange(0, K)
    pieces: tl.constexpr = 3 if PRECISION == "bf16" else 5 if PRECISION == "tf32" else 1
    g = tl.load(pointers[:, None] + (k % F)[None, :], mask=mask[:, None] & (k < pieces * F)[None, :], other=0.0)
    g *= factor[:, None]
    if PRECISION == "ieee":
        return g
    else:
        first = g.to(tl.bfloat16)
        rest = g - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        piece = (k // F % 3)[None, :]
        return tl.where(piece == 0, first, tl.where(piece == 1, second, third))


@triton.jit
def product(p, v, acc, PRECISION: tl.constexpr):
    """acc + p v, p rounded as ``PRECISION`` says."""
    if PRECISION == "bf16":
        return tl.dot(p.to(tl.bfloat16), v, acc)
    else:
        return tl.dot(p, v, acc, input_precision=PRECISION)


@triton.jit
def add_keys(t, g, keys, PRECISION: tl.constexpr):
    """t + g keys^T; packed keys are bf16 in any case."""
    if PRECISION == "ieee":
        return tl.dot(g, tl.trans(keys), t, input_precision="ieee")
    else:
        return tl.dot(g, tl.trans(keys), t)


@triton.jit
def store_rows(acc, rows_out, N, rows, last, apart, live):
    """Writes a group's sums, one column a row, and empties them."""
    stored = live[:, None] & (apart & (rows < last))[None, :]
    tl.store(rows_out[:, None] + (rows * N)[None, :], acc, mask=stored)
    return tl.where(apart[None, :], 0.0, acc)


@triton.jit
def maximum_mma(
    table, row_table, live, g, scale, keys, values, padded, first, last, j,
    F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.full([BN], float("-inf"), tl.float32)
    line = padded.to(tl.int64)
    for i in range(first, last):
        a = tl.load(row_table + i, mask=live, other=0.0)
        at = i * line + j
        key = tl.load(keys + at[:, None] * K + tl.arange(0, K)[None, :])
        one = tl.load(values + at * V + F).to(tl.float32)
        s = add_keys(table + a[:, None], g, key, PRECISION) * tl.load(scale + at)[None, :]
        m = tl.maximum(m, tl.max(tl.where(one[None, :] > 0, s, float("-inf")), 1))
    return m


@triton.jit
def sweep_mma(
    table, row_table, live, g, scale, keys, values, padded, first, last, shift, rows_out, N, columns, j, row_key, seed,
    threshold, F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
    BJ: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k, c = tl.arange(0, K), tl.arange(0, V)
    apart = (c > F) & (c <= F + GROUP)
    column_sums = tl.zeros([BN, BJ], tl.float32)
    acc = tl.zeros([BN, V], tl.float32)
    total = tl.zeros([BN], tl.float32)
    line, tokens = padded.to(tl.int64), j.to(tl.int64)
    for start in range(first, last, GROUP):
        for i in range(start, tl.minimum(start + GROUP, last)):
            a = tl.load(row_table + i, mask=live, other=0.0)
            at = i * line + j
            r = tl.load(scale + at)
            key = tl.load(keys + at[:, None] * K + k[None, :])
            value = tl.load(values + at[:, None] * V + c[None, :])
            s = add_keys(table + a[:, None], g, key, PRECISION) * r[None, :]
            one = r
            if EXACT or DROPOUT:
                one = tl.load(values + at * V + F).to(tl.float32)
            p = weights(s, shift, one, EXACT)
            if DROPOUT:
                total += tl.sum(p * one[None, :], 1)
                token_key = hashing.token_keys(tl.load(seed), tokens + i * columns)
                p = tl.where(hashing.keep(row_key[:, None], token_key[None, :], threshold), p, 0.0)
            column_sums += p * r[None, :]
            acc = product(p, value, acc, PRECISION)
        acc = store_rows(acc, rows_out, N, start + c - F - 1, last, apart, live)
    kept = tl.sum(tl.where((c == F)[None, :], acc, 0.0), 1)
    if not DROPOUT:
        total = kept
    return column_sums, acc, total, kept


@triton.jit
def sweep_backward_mma(
    table, row_table, d_table, d_row_table, live, g, d_g, scale, keys, values, padded, first, last, shift, factor, delta,
    d_kept, rows_out, N, columns, j, row_key, seed, threshold, F: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    k, c = tl.arange(0, K), tl.arange(0, V)
    apart = (c > F) & (c <= F + GROUP)
    column_sums = tl.zeros([BN, BJ], tl.float32)
    acc = tl.zeros([BN, V], tl.float32)
    line, tokens = padded.to(tl.int64), j.to(tl.int64)
    for start in range(first, last, GROUP):
        for i in range(start, tl.minimum(start + GROUP, last)):
            a = tl.load(row_table + i, mask=live, other=0.0)
            d_a = tl.load(d_row_table + i, mask=live, other=0.0) * factor
            at = i * line + j
            r = tl.load(scale + at)
            key = tl.load(keys + at[:, None] * K + k[None, :])
            value = tl.load(values + at[:, None] * V + c[None, :])
            s = add_keys(table + a[:, None], g, key, PRECISION) * r[None, :]
            one = r
            if EXACT:
                one = tl.load(values + at * V + F).to(tl.float32)
            p = weights(s, shift, one, EXACT)
            d_p = add_keys(d_table + d_a[:, None], d_g, key, PRECISION) * r[None, :]
            if DROPOUT:
                token_key = hashing.token_keys(tl.load(seed), tokens + i * columns)
                keep = hashing.keep(row_key[:, None], token_key[None, :], threshold)
                d_p = tl.where(keep, d_p + d_kept[:, None], 0.0)
            d_p -= delta[:, None]
            ds = p * d_p
            column_sums += ds * r[None, :]
            acc = product(ds, value, acc, PRECISION)
        acc = store_rows(acc, rows_out, N, start + c - F - 1, last, apart, live)
    return column_sums, acc, tl.sum(tl.where((c == F)[None, :], acc, 0.0), 1)
