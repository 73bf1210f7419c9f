"""The two kernels of inverted grid attention, whose formulas grid_inverted.py has: each makes several passes.

One owns tokens and walks over the queries, the other owns queries and walks down the rows. Logits are computed in the same
order in both, so that weights that one of them normalises are those that the other sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels.base2 import LN_2
from perceiver_fast.kernels.cross_attention import LOWEST, power_of_two
from perceiver_fast.kernels.dropout import dropout_keep, hash_rows
from perceiver_fast.kernels.grid_sweep_fma import add_features, collect, fold, load_features, totals, zero_sums


@triton.jit
def load_queries(query, live, columns_at, j, columns, C: tl.constexpr, K: tl.constexpr, FEW: tl.constexpr):
    """What queries hold of the channels, and of columns ``[BN, BJ]``; zero where there are none.

    ``query [BN]`` points to a query's first channel, ``columns_at`` places before its first column. FEW: channels are C
    vectors ``[BN]``, to be multiplied one by one; else ``[BN, K]``, for products.
    """
    inside = live[:, None] & (j < columns)[None, :]
    table = tl.load(query[:, None] + columns_at + j[None, :], mask=inside, other=0.0)
    if FEW:
        return load_features(query, live, C), table
    else:
        k = tl.arange(0, K)
        return tl.load(query[:, None] + k[None, :], mask=live[:, None] & (k < C)[None, :], other=0.0), table


@triton.jit
def load_tokens(planes, padded, C: tl.constexpr, K: tl.constexpr, FEW: tl.constexpr):
    """Channels, scales ``[BJ]`` and HOLE or 0 ``[BJ]`` of a row; ``planes [BJ]`` points to its first channel.

    FEW: channels are C vectors ``[BJ]``; else ``[K, BJ]``.
    """
    r, hole = tl.load(planes + C * padded), tl.load(planes + (C + 1) * padded)
    if FEW:
        x = ()
        for c in tl.static_range(C):
            x = x + (tl.load(planes + c * padded),)
        return x, r, hole
    else:
        k = tl.arange(0, K)
        return tl.load(planes[None, :] + k[:, None] * padded, mask=(k < C)[:, None], other=0.0), r, hole


@triton.jit
def add_channels(t, g, x, C: tl.constexpr, FEW: tl.constexpr):
    """``t [BN, BJ]`` + g . x."""
    if FEW:
        return add_features(t, g, x, C)
    else:
        return tl.dot(g, x, t, input_precision="ieee")


@triton.jit
def add_weighted(sums, g, weights, C: tl.constexpr, FEW: tl.constexpr):
    """Sums over queries, of every token, plus ``weights [BN, BJ]`` times g: ``[K, BJ]``, or FEW C times ``[BN, BJ]``."""
    if FEW:
        grown = ()
        for c in tl.static_range(C):
            grown = grown + (sums[c] + weights * g[c][:, None],)
        return grown
    else:
        return tl.dot(tl.trans(g), weights, sums, input_precision="ieee")


@triton.jit
def gradients(
    u, r, a, keep, weight, delta, delta_low, d_kept, eta, eta_low, at,
    keep_scale, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dS ``[BN, BJ]``: what every query and token subtract is taken from the gradients of the weights.

    ``weight``, ``delta``, ``delta_low`` and ``d_kept`` are ``[BN]``; eta and eta_low point to arrays of tokens, or are
    None, and ``at [BJ]`` are places in them.
    """
    dp = (u * (r * LN_2)[None, :] + d_kept[:, None]) * keep_scale
    if DROPOUT:
        dp = tl.where(keep, dp, 0.0)
    y = weight[:, None] * (dp - delta[:, None]) - delta_low[:, None]
    if eta is not None:
        y -= tl.load(eta + at)[None, :]
    if eta_low is not None:
        y -= tl.load(eta_low + at)[None, :]
    return a * y


@triton.jit(do_not_specialize=["threshold"])
def grid_inverted_tokens_kernel(
    q, d_o, stats, planes, token_shift, token_weight, eta, eta_low, seed, token_hashes,
    token_lse, eta_out, dfeat, dscale,
    B, N, rows, columns, padded, heads, q_batch, q_row, threshold, keep_scale,
    C: tl.constexpr, K: tl.constexpr, FEW: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """What is not None of token_lse, eta_out, and dfeat with dscale, of BJ tokens of a row, over all queries.

        token_lse = ln sum_n 2^(r t),    eta_out = sum_n dS
        dfeat = ln(2) r sum_n (dS g + keep P d_g),    dscale = sum_n (dS t + keep P u)

    Grid: ``B * rows * padded / BJ`` programs, columns first.

        q             [B, N, C + rows + columns]          in   fp32; strides q_batch (may be 0), q_row, the last dense
        d_o           [B, N, C + rows + columns]          in   fp32, dense, folded; or None, as stats, for token_lse
        stats         [4, B, N]                           in   fp32: 1 / max(T, EPS), delta, delta_low, d_kept
        planes        [B / heads, rows, C + 2, padded]    in   fp32, of grid_attention_tokens for "fma"
        token_shift, token_weight, eta, eta_low  [B, rows, padded]  in   fp32, or None; zero in holes
        seed          [1]                                 in   int64, or None without dropout
        token_hashes  [rows, padded]                      in   int32, or None without dropout
        token_lse     [B, rows, columns]                  out  fp64
        eta_out       [B, rows, padded]                   out  fp32; zero in holes
        dfeat         [B, rows, columns, C]               out  fp32
        dscale        [B, rows, columns]                  out  fp32

        B, N, rows, columns, padded, heads   sizes; B counts heads
        threshold, keep_scale                of dropout: p 2^32, and 1 / (1 - p)
        C, K, FEW                            channels, as a power of two for products, and whether they are so few that none is made
        BN, BJ, DROPOUT                      queries and columns at a time; some weights are dropped
    """
    program = tl.program_id(0)
    across = padded // BJ
    j = program % across * BJ + tl.arange(0, BJ)
    line = (program // across).to(tl.int64)  # b rows + i
    b, i = line // rows, line % rows
    x, r, hole = load_tokens(planes + (b // heads * rows + i) * (C + 2) * padded + j, padded, C, K, FEW)
    at = line * padded + j
    peak = tl.full([BJ], LOWEST, tl.float32)
    total = tl.zeros([BJ], tl.float32)
    d_r = tl.zeros([BN, BJ], tl.float32)
    if FEW:
        d_x = ()
        for _ in tl.static_range(C):
            d_x = d_x + (tl.zeros([BN, BJ], tl.float32),)
    else:
        d_x = tl.zeros([K, BJ], tl.float32)
    if token_lse is None:
        own_shift, own_weight = tl.load(token_shift + at), tl.load(token_weight + at)
    if DROPOUT:
        token_hash = tl.load(token_hashes + i * padded + j)
        number = tl.load(seed)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        live = n < N
        query = q + b * q_batch + n.to(tl.int64) * q_row
        g, table = load_queries(query, live, C + rows, j, columns, C, K, FEW)
        t = table + tl.load(query + C + i, mask=live, other=0.0)[:, None] + hole[None, :]
        t = add_channels(t, g, x, C, FEW)  # [BN, BJ]
        if token_lse is not None:
            s = tl.where(live[:, None], t * r[None, :], float("-inf"))
            higher = tl.maximum(peak, tl.ceil(tl.max(s, 0)))
            total = total * power_of_two(peak - higher) + tl.sum(tl.exp2(s - higher[None, :]), 0)
            peak = higher
        else:
            row = b * N + n
            a = tl.where(live[:, None], tl.exp2(t * r[None, :] - own_shift[None, :]), 0.0) * own_weight[None, :]
            d_query = d_o + row * (C + rows + columns)
            d_g, u = load_queries(d_query, live, C + rows, j, columns, C, K, FEW)
            u = add_channels(u + tl.load(d_query + C + i, mask=live, other=0.0)[:, None], d_g, x, C, FEW)
            keep = live[:, None]
            if DROPOUT:
                keep = dropout_keep(hash_rows(number, row)[:, None], token_hash[None, :], threshold)
            weight = tl.load(stats + row, mask=live, other=0.0)
            ds = gradients(
                u, r, a, keep, weight, tl.load(stats + B * N + row, mask=live, other=0.0),
                tl.load(stats + 2 * B * N + row, mask=live, other=0.0),
                tl.load(stats + 3 * B * N + row, mask=live, other=0.0), eta, eta_low, at, keep_scale, DROPOUT,
            )  # fmt: skip
            if eta_out is not None:
                d_r += ds
            else:
                p = a * (weight * keep_scale)[:, None]
                if DROPOUT:
                    p = tl.where(keep, p, 0.0)
                d_r += ds * t + p * u
                d_x = add_weighted(add_weighted(d_x, g, ds, C, FEW), d_g, p, C, FEW)
    inside = j < columns
    if token_lse is not None:
        natural = (peak.to(tl.float64) + tl.math.log2(total).to(tl.float64)) * LN_2
        tl.store(token_lse + line * columns + j, natural, mask=inside)
    elif eta_out is not None:
        tl.store(eta_out + at, tl.where(hole == 0.0, tl.sum(d_r, 0), 0.0))
    else:
        seen = (hole == 0.0) & inside
        tl.store(dscale + line * columns + j, tl.where(seen, tl.sum(d_r, 0), 0.0), mask=inside)
        out = dfeat + (line * columns + j) * C
        if FEW:
            for c in tl.static_range(C):
                tl.store(out + c, tl.where(seen, tl.sum(d_x[c], 0) * (r * LN_2), 0.0), mask=inside)
        else:
            k = tl.arange(0, K)
            d_x = tl.where(seen[None, :], d_x * (r * LN_2)[None, :], 0.0)
            tl.store(out[None, :] + k[:, None], d_x, mask=(k < C)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["threshold"])
def grid_inverted_queries_kernel(
    q, d_o, stats, planes, token_shift, token_weight, eta, eta_low, seed, token_hashes,
    column_parts, row_parts, channel_parts, sum_parts,
    B, N, rows, columns, padded, heads, q_batch, q_row, splits, per_split, threshold, keep_scale,
    C: tl.constexpr, K: tl.constexpr, FEW: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Sums over a split of the rows and a block of columns, for BN queries.

        y = A that dropout keeps, or with d_o dS;    sums of r y by column and by row, of r x y, and of A and of y

    Grid: ``B * splits * padded / BJ * ceil(N / BN)`` programs, queries first, then columns and splits.

        q .. token_hashes                                    in   as grid_inverted_tokens_kernel takes them; d_o None: forward
        column_parts   [splits, B, N, padded]                out  fp32; or None, with the next two: sums alone
        row_parts      [padded / BJ, B, rows, N]             out  fp32
        channel_parts  [splits, padded / BJ, B, N, K]        out  fp32
        sum_parts      [2, splits, padded / BJ, B, N]        out  fp32

        B .. DROPOUT        as there
        splits, per_split   how many splits, and rows of one

    Queries beyond the last read as zeros, and are not written.
    """
    blocks, across = tl.cdiv(N, BN), padded // BJ
    program = tl.program_id(0)
    n = program % blocks * BN + tl.arange(0, BN)
    block = program // blocks % across
    split = program // (blocks * across) % splits
    b = (program // (blocks * across * splits)).to(tl.int64)
    j, live, row = block * BJ + tl.arange(0, BJ), n < N, b * N + n
    query = q + b * q_batch + n.to(tl.int64) * q_row
    g, table = load_queries(query, live, C + rows, j, columns, C, K, FEW)
    column_sums = tl.zeros([BN, BJ], tl.float32)
    total = tl.zeros([BN, BJ // 4], tl.float32)
    kept = tl.zeros([BN, BJ // 4], tl.float32)
    if FEW:
        channels = zero_sums(C, BN, BJ)
    else:
        channels = tl.zeros([BN, K], tl.float32)
    if d_o is not None:
        d_query = d_o + row * (C + rows + columns)
        d_g, d_table = load_queries(d_query, live, C + rows, j, columns, C, K, FEW)
        weight = tl.load(stats + row, mask=live, other=0.0)
        delta = tl.load(stats + B * N + row, mask=live, other=0.0)
        delta_low = tl.load(stats + 2 * B * N + row, mask=live, other=0.0)
        d_kept = tl.load(stats + 3 * B * N + row, mask=live, other=0.0)
    if DROPOUT:
        row_hash = hash_rows(tl.load(seed), row)
    first, last = split * per_split, tl.minimum(rows, (split + 1) * per_split)
    for i in range(first, last):
        line = b // heads * rows + i
        at = (b * rows + i) * padded + j
        x, r, hole = load_tokens(planes + line * (C + 2) * padded + j, padded, C, K, FEW)
        t = table + tl.load(query + C + i, mask=live, other=0.0)[:, None] + hole[None, :]
        t = add_channels(t, g, x, C, FEW)
        a = tl.exp2(t * r[None, :] - tl.load(token_shift + at)[None, :]) * tl.load(token_weight + at)[None, :]
        keep = live[:, None]
        if DROPOUT:
            token_hash = tl.load(token_hashes + i * padded + j)
            keep = dropout_keep(row_hash[:, None], token_hash[None, :], threshold)
        if d_o is not None:
            u = add_channels(d_table + tl.load(d_query + C + i, mask=live, other=0.0)[:, None], d_g, x, C, FEW)
            y = gradients(
                u, r, a, keep, weight, delta, delta_low, d_kept, eta, eta_low, at, keep_scale, DROPOUT
            )  # fmt: skip
        else:
            y = a
            if DROPOUT:
                y = tl.where(keep, a, 0.0)
        total += fold(a, BN, BJ)
        kept += fold(y, BN, BJ)
        if column_parts is not None:
            y *= r[None, :]
            column_sums += y
            tl.store(row_parts + ((block * B + b) * rows + i) * N + n, tl.sum(fold(y, BN, BJ), 1), mask=live)
            if FEW:
                channels = collect(channels, y, x, C, BN, BJ)
            else:
                channels = tl.dot(y, tl.trans(x), channels, input_precision="ieee")
    part = (split * across + block) * (b * 0 + B * N) + row
    if column_parts is not None:
        out = column_parts + ((split * B + b) * N + n)[:, None] * padded + j[None, :]
        tl.store(out, column_sums, mask=live[:, None])
        if FEW:
            sums = totals(channels, C)
            for c in tl.static_range(C):
                tl.store(channel_parts + part * K + c, sums[c], mask=live)
        else:
            tl.store(channel_parts + part[:, None] * K + tl.arange(0, K)[None, :], channels, mask=live[:, None])
    tl.store(sum_parts + part, tl.sum(total, 1), mask=live)
    tl.store(sum_parts + (b * 0 + splits) * across * B * N + part, tl.sum(kept, 1), mask=live)
