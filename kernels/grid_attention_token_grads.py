"""Grid attention, gradients of the tokens: a program owns a few rows of a block of columns and walks over the queries.

    t = column[n, j] + row[n, i] + g[n] . x,  u = d_column[n, j] + d_row[n, i] + d_g[n] . x
    dx = r sum_n (dS g[n] + P d_g[n]),  dr = sum_n (dS t + P u)

P and dS are those of grid_attention_backward. No two programs write the same token, so the result is the same every
time. A thread keeps its own sums over its queries until the end. Rows are taken several at a time, since what a query
holds of a column is read once for all of them.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from perceiver_fast.kernels.base2 import LN_2, LOG2_E
from perceiver_fast.kernels.dropout import dropout_keep, hash_rows, hash_tokens, threshold_bits, two_numbers
from perceiver_fast.kernels.grid import FEW, Grid
from perceiver_fast.kernels.grid_attention_tokens import TokenArrays, key_width
from perceiver_fast.kernels.grid_sweep_mma import add_keys, load_packed
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.reference.dropout import dropout_scale

ROWS = 2  # at a time, where channels are few
# s - shift is cut off here. By rights a weight is at most 1, but these logits are not always computed as the forward's:
# where those came from tensor cores, logits of 1e8 differ by more than this, and a weight would overflow.
MOST_EXPONENT = tl.constexpr(80.0)


@triton.jit
def weights_and_gradients(
    t, u, r, there, shift, delta, d_kept, row_hash, token_hash, threshold, DROPOUT: tl.constexpr
):  # fmt: skip
    """P without its factor, after dropout, and dS, both ``[BN, BJ]``, of one row of the grid.

    Args:
        t, u: ``[BN, BJ]``, see above; u times factor.
        r: ``[BJ]``, scales times log2(e).
        there: bool ``[BJ]``; other tokens have a weight of 0.
        shift, delta, d_kept: ``[BN]``.
        row_hash, token_hash, threshold: dropout's, ``[BN]``, ``[BJ]`` and p 2^32.
    """
    p = tl.where(there[None, :], tl.exp2(tl.minimum(t * r[None, :] - shift[:, None], MOST_EXPONENT)), 0.0)
    d_p = u * r[None, :]
    if DROPOUT:
        keep = dropout_keep(row_hash[:, None], token_hash[None, :], threshold)
        return tl.where(keep, p, 0.0), p * (tl.where(keep, d_p + d_kept[:, None], 0.0) - delta[:, None])
    else:
        return p, p * (d_p - delta[:, None])


@triton.jit(do_not_specialize=["threshold"])
def grid_attention_token_grads_kernel(
    q, d_o, stats, feat, scale, mask, keys, seed, dfeat, dscale,
    B, N, rows, columns, padded, q_batch, q_row, threshold, keep_scale,
    F: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, ROWS: tl.constexpr,
    DROPOUT: tl.constexpr, HAS_D_KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dfeat and dscale of ROWS rows and BJ columns of one batch element: dx and dr above, summed over all queries.

    Grid: one program for BJ columns, ROWS rows and a batch element, columns first.

        q       [B, N, F + rows + columns]  in   fp32; strides q_batch (may be 0), q_row, the last dense
        d_o     [B, N, F + rows + columns]  in   fp32, dense, folded
        stats   [4, B N]                    in   fp32, as grid_attention_backward_merge_kernel leaves them
        feat    [B, rows, columns, F]       in   fp32, fp16 or bf16, dense
        scale   [B, rows, columns]          in   fp32, dense
        mask    [B, rows, columns]          in   uint8, dense, 0 for masked tokens; or None
        keys    [B, rows, padded, K]        in   see grid_attention_tokens; None for precision "fma"
        seed    [2]                         in   int64: the seed, and the index of the first token; or None without dropout
        dfeat   [B, rows, columns, F]       out  dtype of feat, dense; not written for masked tokens
        dscale  [B, rows, columns]          out  fp32, dense; likewise

        B, N, rows, columns, padded  sizes; padded columns of keys in memory
        threshold, keep_scale        of dropout: p 2^32, and 1 / (1 - p)

        F, K        channels of a token, columns of a key
        C           F, padded to the power of two that a product needs
        BN, BJ      queries at a time, and columns
        ROWS        rows at a time
        DROPOUT     some weights are dropped
        HAS_D_KEPT  the result ``kept`` has a gradient
        PRECISION   of products: grid.Grid

    Queries beyond the last read as zeros: their P is not 0, but all they multiply is, and dS is. Tokens that are
    masked, or beyond the last row or column, read as zeros.
    """
    FLOAT: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32"  # of products of float32
    row_blocks, column_blocks = tl.cdiv(rows, ROWS), tl.cdiv(columns, BJ)
    program = tl.program_id(0)
    j = (program % column_blocks) * BJ + tl.arange(0, BJ)
    first = program // column_blocks % row_blocks * ROWS
    b = (program // (column_blocks * row_blocks)).to(tl.int64)
    line = b * 0 + B * N  # from one of the stats to the next, int64
    number = tl.load(seed) if DROPOUT else 0
    first_token = tl.load(seed + 1) if DROPOUT else 0
    token, there, r, token_hash, x = (), (), (), (), ()  # of every row; all [BJ], and x is F of them, or keys [BJ, K]
    for k in tl.static_range(ROWS):
        at = (b * rows + first + k) * columns + j
        inside = (j < columns) & (first + k < rows)
        if mask is not None:
            inside = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        token, there = token + (at,), there + (inside,)
        r = r + (tl.load(scale + at, mask=inside, other=0.0) * LOG2_E,)
        token_hash = token_hash + (hash_tokens(number, first_token + at - b * rows * columns) if DROPOUT else at,)
        if PRECISION == "fma":
            channels = ()
            for f in tl.static_range(F):
                channels = channels + (tl.load(feat + at * F + f, mask=inside, other=0.0).to(tl.float32),)
            x = x + (channels,)
        else:
            key_at = keys + ((b * rows + first + k) * padded + j)[:, None] * K + tl.arange(0, K)[None, :]
            x = x + (tl.load(key_at, mask=inside[:, None], other=0.0),)
    d_r, d_x = (), ()  # of every row: sums not yet over queries, or [BJ, C] where a product sums them
    for k in tl.static_range(ROWS):
        d_r = d_r + (tl.zeros([BN, BJ], tl.float32),)
        if PRECISION == "fma":
            empty = ()
            for f in tl.static_range(F):
                empty = empty + (tl.zeros([BN, BJ], tl.float32),)
            d_x = d_x + (empty,)
        else:
            d_x = d_x + (tl.zeros([BJ, C], tl.float32),)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        live = n < N
        row = b * N + n
        query, d_query = q + b * q_batch + n.to(tl.int64) * q_row, d_o + row * (F + rows + columns)
        shift = tl.load(stats + row, mask=live, other=0.0)
        # Multiplied in the order of the backward's walk: where softmax is saturated dS is a difference of nearly equal
        # numbers, here times a large q, and has to be the same bits as there.
        factor = tl.load(stats + line + row, mask=live, other=0.0) * keep_scale * LN_2
        delta = tl.load(stats + 2 * line + row, mask=live, other=0.0)
        d_kept = tl.zeros([BN], tl.float32)
        if HAS_D_KEPT:
            d_kept = tl.load(stats + 3 * line + row, mask=live, other=0.0) * keep_scale
        row_hash = hash_rows(number, row) if DROPOUT else row
        tile = live[:, None] & (j < columns)[None, :]
        table = tl.load(query[:, None] + F + rows + j[None, :], mask=tile, other=0.0)
        d_table = tl.load(d_query[:, None] + F + rows + j[None, :], mask=tile, other=0.0) * factor[:, None]
        new_r, new_x = (), ()
        if PRECISION == "fma":
            g, d_g = (), ()
            for f in tl.static_range(F):
                g = g + (tl.load(query + f, mask=live, other=0.0),)
                d_g = d_g + (tl.load(d_query + f, mask=live, other=0.0) * factor,)
        else:
            c = tl.arange(0, C)
            inner = live[:, None] & (c < F)[None, :]
            g = tl.load(query[:, None] + c[None, :], mask=inner, other=0.0)
            d_g = tl.load(d_query[:, None] + c[None, :], mask=inner, other=0.0) * factor[:, None]
            packed = load_packed(query, tl.full([BN], 1.0, tl.float32), live, F, K, PRECISION, False)
            d_packed = load_packed(d_query, factor, live, F, K, PRECISION, False)
        for k in tl.static_range(ROWS):
            here = live & (first + k < rows)
            a = tl.load(query + F + first + k, mask=here, other=0.0)
            d_a = tl.load(d_query + F + first + k, mask=here, other=0.0) * factor
            t, u = table + a[:, None], d_table + d_a[:, None]
            if PRECISION == "fma":
                for f in tl.static_range(F):
                    t += g[f][:, None] * x[k][f][None, :]
                    u += d_g[f][:, None] * x[k][f][None, :]
            else:
                t, u = add_keys(t, packed, x[k], PRECISION), add_keys(u, d_packed, x[k], PRECISION)
            p, ds = weights_and_gradients(
                t, u, r[k], there[k], shift, delta, d_kept, row_hash, token_hash[k], threshold, DROPOUT
            )
            p *= LOG2_E  # against the ln(2) in the factor of u and d_g
            new_r = new_r + (d_r[k] + ds * t + p * u,)
            if PRECISION == "fma":
                grown = ()
                for f in tl.static_range(F):
                    grown = grown + (d_x[k][f] + ds * g[f][:, None] + p * d_g[f][:, None],)
                new_x = new_x + (grown,)
            else:
                grown = tl.dot(tl.trans(ds), g, d_x[k], input_precision=FLOAT)
                new_x = new_x + (tl.dot(tl.trans(p), d_g, grown, input_precision=FLOAT),)
        d_r, d_x = new_r, new_x
    for k in tl.static_range(ROWS):
        tl.store(dscale + token[k], tl.sum(d_r[k], 0), mask=there[k])
        if PRECISION == "fma":
            for f in tl.static_range(F):
                total = tl.sum(d_x[k][f], 0) * (r[k] * LN_2)
                tl.store(dfeat + token[k] * F + f, total.to(dfeat.dtype.element_ty), mask=there[k])
        else:
            c = tl.arange(0, C)
            total = (d_x[k] * (r[k] * LN_2)[:, None]).to(dfeat.dtype.element_ty)
            tl.store(dfeat + token[k][:, None] * F + c[None, :], total, mask=there[k][:, None] & (c < F)[None, :])


def token_grads_launch(
    grid: Grid, tokens: TokenArrays, arguments: dict[str, object], dropout: float, has_d_kept: bool, arch: int
) -> Launch:
    """The launch that writes the gradients of feat and scale; masked tokens keep the zeros they have.

    Args:
        grid: the call's sizes and precision.
        tokens: their description for the kernels of the grid's precision.
        arguments: q, d_o, stats, feat, scale, mask, seed, dfeat and dscale, as the kernel takes them.
        dropout: probability of a weight being dropped.
        has_d_kept: whether the result ``kept`` has a gradient.
        arch: architecture whose configuration is taken.
    """
    few = grid.precision == "fma" or grid.features <= FEW  # few channels need no tensor cores, whatever the precision
    precision = "fma" if few else grid.precision
    config = replace(grid, precision=precision).config("grid_attention_token_grads", arch, dropout)
    rows = ROWS if few and grid.features <= FEW else 1
    q = arguments["q"]
    arguments = arguments | dict(
        keys=None if few else tokens.keys, seed=two_numbers(arguments["seed"]), B=grid.batch, N=grid.queries, rows=grid.rows, columns=grid.columns,
        padded=tokens.padded, q_batch=q.stride(0), q_row=q.stride(1), threshold=threshold_bits(dropout),
        keep_scale=dropout_scale(dropout), F=grid.features, K=key_width(grid),
        C=max(16, triton.next_power_of_2(grid.features)), BN=config.queries, BJ=config.tokens, ROWS=rows,
        DROPOUT=dropout > 0, HAS_D_KEPT=has_d_kept, PRECISION=precision,
    )  # fmt: skip
    programs = triton.cdiv(grid.rows, rows) * triton.cdiv(grid.columns, config.tokens) * grid.batch
    weights = config.queries * config.tokens * rows
    return Launch(grid_attention_token_grads_kernel, programs, arguments, config, weights)
