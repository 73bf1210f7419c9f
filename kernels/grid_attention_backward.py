"""Grid attention, backward: the forward's walk, with every weight computed anew from the log-sum-exp.

    p = exp2(s - shift),  P = factor p                  shift is 0 but for extreme logits; factor = 2^(shift - lse)
    dS = P (r (d_column[n, j] + d_row[n, i] + d_g[n] . x) - delta[n])

with ``factor`` multiplied into the gradients once, not into every weight. Sums over tokens of dS times what the forward
summed P times are the gradients of q; those of the tokens take a kernel of their own (grid_attention_token_grads).

sum_m dS is the gradient of lse; what it is beyond that comes from the rounding of delta, and is taken out of both: where
softmax is saturated, that is all there is.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.kernels import dropout as hashing
from perceiver_fast.kernels.grid import GROUP, Grid, blocks, precision_of
from perceiver_fast.kernels.grid_attention import place, seen
from perceiver_fast.kernels.grid_attention_token_grads import token_gradients
from perceiver_fast.kernels.grid_attention_tokens import LN2, describe_tokens, key_width, value_width
from perceiver_fast.kernels.grid_sweep_fma import load_features, sweep_backward_fma
from perceiver_fast.kernels.grid_sweep_mma import load_packed, sweep_backward_mma
from perceiver_fast.ops.library import architecture
from perceiver_fast.reference.dropout import dropout_scale, dropout_threshold

UNSHIFTED = tl.constexpr(60.0)


@triton.jit
def grid_attention_delta_kernel(
    d_o, o, d_lse, lse, d_kept, kept, stats, rows, L,
    HAS_LSE: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of every query, ``stats [4, rows]``: shift, factor, factor (d_o . o - d_lse), factor d_kept."""
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, L, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(d_o + row * L + at, mask=at < L, other=0.0).to(tl.float64)
        acc += grad * tl.load(o + row * L + at, mask=at < L, other=0.0)
    delta = tl.sum(acc, 0)
    lse2 = tl.load(lse + row) * 1.4426950408889634
    shift = tl.where(tl.abs(lse2) <= UNSHIFTED, 0.0, lse2).to(tl.float32)
    factor = tl.exp2(shift.to(tl.float64) - lse2)
    if HAS_KEPT:
        grad_kept = tl.load(d_kept + row).to(tl.float64)
        delta += grad_kept * tl.load(kept + row)
        tl.store(stats + 3 * rows + row, (factor * grad_kept).to(tl.float32))
    if HAS_LSE:
        delta -= tl.load(d_lse + row)
    tl.store(stats + row, shift)
    tl.store(stats + rows + row, factor.to(tl.float32))
    tl.store(stats + 2 * rows + row, (factor * delta).to(tl.float32))


@triton.jit
def grid_attention_backward_kernel(
    q, d_o, stats, planes, scale, keys, values, seed, token_keys, column_parts, row_parts, sum_parts,
    B, N, rows, columns, padded, q_batch, q_row, splits, per_split, threshold, kept_scale,
    F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    DROPOUT: tl.constexpr, HAS_KEPT: tl.constexpr, HOLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, block, j, split, b = place(tl.program_id(0), N, columns, splits, BN, BJ)
    live = n < N
    inside = live[:, None] & (j < columns)[None, :]
    row = b * N + n
    query, d_query = q + b * q_batch + n.to(tl.int64) * q_row, d_o + row * (F + rows + columns)
    stats += row
    line = b * 0 + B * N
    shift = tl.load(stats, mask=live, other=0.0)
    own = tl.load(stats + line, mask=live, other=0.0) * kept_scale
    delta = tl.load(stats + 2 * line, mask=live, other=0.0)
    d_kept = tl.zeros([BN], tl.float32)
    if HAS_KEPT:
        d_kept = tl.load(stats + 3 * line, mask=live, other=0.0) * kept_scale
    factor = own * LN2  # channels and scale of the tokens carry log2(e)
    table = tl.load(query[:, None] + F + rows + j[None, :], mask=inside, other=0.0)
    d_table = tl.load(d_query[:, None] + F + rows + j[None, :], mask=inside, other=0.0) * factor[:, None]
    row_key = tl.zeros([BN], tl.uint32)
    if DROPOUT:
        row_key = hashing.row_keys(tl.load(seed), row)
        token_keys += j
        threshold = threshold.to(tl.uint32)
    rows_out = row_parts + ((block * B + b) * rows) * N + n
    part = (split * B + b) * N + n
    sums_out = sum_parts + (((split * tl.cdiv(columns, BJ) + block) * B + b) * N + n) * (F + 1)
    first, last = split * per_split, tl.minimum(rows, (split + 1) * per_split)
    if PRECISION == "fma":
        g, d_features = load_features(query, live, F), load_features(d_query, live, F)
        d_g = ()
        for f in tl.static_range(F):
            d_g = d_g + (d_features[f] * factor,)
        planes += b * rows * (F + 2) * padded + j
        column_sums, sums, residual = sweep_backward_fma(
            table, d_table, query + F, d_query + F, live, g, d_g, planes, padded, first, last, shift, factor, delta,
            d_kept, rows_out, N, row_key, token_keys, threshold, F, BN, BJ, DROPOUT, HOLES,
        )  # fmt: skip
        for f in tl.static_range(F):
            tl.store(sums_out + f, sums[f], mask=live)
    else:
        g = load_packed(query, tl.full([BN], 1.0, tl.float32), live, F, K, PRECISION, True)
        d_g = load_packed(d_query, factor, live, F, K, PRECISION, False)
        at = b * rows * padded
        scale, keys, values = scale + at, keys + at * K, values + at * V
        column_sums, acc, residual = sweep_backward_mma(
            table, d_table, query + F, d_query + F, live, g, d_g, scale, keys, values, padded, first, last, j, shift,
            factor, delta, d_kept, rows_out, N, row_key, token_keys, threshold,
            F, K, V, GROUP, BN, BJ, DROPOUT, PRECISION,
        )  # fmt: skip
        c = tl.arange(0, V)
        tl.store(sums_out[:, None] + c[None, :], acc, mask=live[:, None] & (c < F)[None, :])
    tl.store(column_parts + part[:, None] * padded + j[None, :], column_sums, mask=live[:, None])
    tl.store(sums_out + F, residual, mask=live)


@triton.jit
def grid_attention_backward_merge_kernel(
    column_parts, row_parts, sum_parts, d_lse, kept, stats, dq, correction,
    B, N, rows, columns, padded, splits, column_blocks,
    F: tl.constexpr, BJ: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_LSE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One query's partial gradients summed; delta in ``stats`` loses its rounding, and ``correction`` times o is dq's.

    What dq needs is the residual times sum_m P r [x ; ..], which is o. Under dropout it is o over what was kept but for
    the draw, and exactly that where one token has all the weight, or many have some.
    """
    row = tl.program_id(0).to(tl.int64)
    b, n = row // N, row % N
    k = tl.arange(0, PARTS)
    there = k < splits * column_blocks
    part = sum_parts + (k * (B * N) + row) * (F + 1)
    out = dq + row * (F + rows + columns)
    for f in tl.static_range(F):
        tl.store(out + f, tl.sum(tl.load(part + f, mask=there, other=0.0), 0) * LN2)
    residual = tl.sum(tl.load(part + F, mask=there, other=0.0), 0)
    if HAS_LSE:
        residual -= tl.load(d_lse + row).to(tl.float32)
    line = row * 0 + B * N
    delta = stats + 2 * line + row
    tl.store(delta, tl.load(delta) + residual * tl.load(stats + line + row))  # sum_m p = 1 / factor
    if DROPOUT:
        share = tl.load(kept + row)
        residual = tl.where(share > 0, residual / share, 0.0)
    tl.store(correction + row, residual)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK], tl.float32)
        for block in range(column_blocks):
            acc += tl.load(row_parts + ((block * B + b) * rows + i) * N + n, mask=i < rows, other=0.0)
        tl.store(out + F + i, acc * LN2, mask=i < rows)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK], tl.float32)
        for split in range(splits):
            acc += tl.load(column_parts + (split * (B * N) + row) * padded + j, mask=j < columns, other=0.0)
        tl.store(out + F + rows + j, acc * LN2, mask=j < columns)


def backward(
    d_o: Tensor,
    d_lse: Tensor | None,
    d_kept: Tensor | None,
    q: Tensor,
    feat: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    inverted: bool,
    o: Tensor,
    lse: Tensor,
    kept: Tensor,
    token_lse: Tensor,
    token_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``perceiver_fast::grid_attention_backward`` on a GPU: gradients of q, and of feat and scale if asked for.

    Arguments as the forward's, and its results; d_lse ``[B, N]`` float64, d_kept ``[B, N]`` or None.
    """
    grid = Grid(*q.shape[:2], feat.shape[-1], tuple(feat.shape[1:-1]), precision_of(feat.dtype, feat.shape[-1]))
    dfeat = torch.zeros_like(feat) if token_grads else feat.new_empty(0)
    dscale = torch.zeros_like(scale) if token_grads else scale.new_empty(0)
    if grid.batch * grid.queries == 0:
        return q.new_empty(q.shape), dfeat, dscale
    q, mask, empty = seen(q, mask)
    if empty is not None:  # their weights are those of zero logits
        lse = torch.where(empty[:, None], math.log(grid.rows * grid.columns), lse)
        d_lse = None if d_lse is None else d_lse.masked_fill(empty[:, None], 0.0)
    q, o, d_o = grid.fold(q), o.contiguous(), d_o.contiguous()
    d_lse, d_kept = (None if t is None else t.contiguous() for t in (d_lse, d_kept))
    count = grid.batch * grid.queries
    stats = q.new_empty(4, count)
    flags = dict(HAS_LSE=d_lse is not None, HAS_KEPT=d_kept is not None)
    grid_attention_delta_kernel[(count,)](
        d_o, o, d_lse, lse.contiguous(), d_kept, kept, stats, count, o.shape[-1], BLOCK=256, **flags, num_warps=2
    )
    folded = grid.fold(d_o)
    config = grid.config("grid_attention_backward", architecture(q.device))
    cut = blocks(grid, config, q.device)
    feat, scale = feat.contiguous(), scale.contiguous()
    tokens = describe_tokens(grid, feat, scale, mask, seed, config.tokens)
    column_parts = q.new_empty(cut.splits, grid.batch, grid.queries, tokens.padded)
    row_parts = q.new_empty(cut.columns, grid.batch, grid.rows, grid.queries)
    sum_parts = q.new_empty(cut.partials, grid.batch, grid.queries, grid.features + 1)
    programs = cut.queries * cut.columns * cut.splits * grid.batch
    kept_scale = dropout_scale(dropout)
    grid_attention_backward_kernel[(programs,)](
        q, folded, stats, tokens.planes, tokens.scale, tokens.keys, tokens.values, seed, tokens.token_keys,
        column_parts, row_parts, sum_parts,
        grid.batch, grid.queries, grid.rows, grid.columns, tokens.padded, q.stride(0), q.stride(1),
        cut.splits, cut.rows_per_split, dropout_threshold(dropout), kept_scale,
        F=grid.features, K=key_width(grid), V=value_width(grid), GROUP=GROUP, BN=config.queries, BJ=config.tokens,
        DROPOUT=dropout > 0, HAS_KEPT=flags["HAS_KEPT"], HOLES=tokens.holes, PRECISION=grid.precision,
        **config.options(dropout > 0),
    )  # fmt: skip
    dq = q.new_empty(grid.batch, grid.queries, grid.length)
    correction = q.new_empty(grid.batch, grid.queries, 1)
    grid_attention_backward_merge_kernel[(count,)](
        column_parts, row_parts, sum_parts, d_lse, kept, stats, dq, correction,
        grid.batch, grid.queries, grid.rows, grid.columns, tokens.padded, cut.splits, cut.columns,
        F=grid.features, BJ=config.tokens, PARTS=triton.next_power_of_2(cut.partials), BLOCK=128,
        HAS_LSE=flags["HAS_LSE"], DROPOUT=dropout > 0, num_warps=4,
    )  # fmt: skip
    dq = torch.addcmul(grid.unfold(dq), correction, o, value=-1)
    if empty is not None:
        dq = dq.masked_fill(empty[:, None, None], 0.0)
    if token_grads:
        token_gradients(
            grid, q, folded, stats, feat, scale, mask, tokens, dropout, seed, d_kept is not None, dfeat, dscale
        )
    return dq, dfeat, dscale
