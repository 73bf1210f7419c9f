"""Gradients of grid_query_attention: the kernels that walk over pairs of queries and keys.

The formulas are those of grid_query_attention_backward.py, which launches them. One kernel owns queries and walks over
keys, for raw channels and scales; two own keys and walk over queries: for what is a sum over all of them, and for the
tables of axes, whose entries each collect from the queries of one index. No two programs write the same element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels.base2 import LOG2_E
from perceiver_fast.kernels.dense_tiles import accumulate, load, place, store, zeros
from perceiver_fast.kernels.dropout import dropout_keep
from perceiver_fast.kernels.grid_query_tiles import (
    axes_sum,
    grid_rows,
    hold_features,
    hold_gradients,
    load_scaled,
    load_table,
    logits,
    store_vectors,
    vector_zeros,
    weight_gradients,
)


@triton.jit
def load_stats(shift, inverse, delta, low, at, there):
    """Of queries: P = 2^(log2(e) s - shift) inverse, and delta in two parts. Where none is there, P is zero."""
    return (
        tl.load(shift + at, mask=there, other=float("inf")),
        tl.load(inverse + at, mask=there, other=0.0),
        tl.load(delta + at, mask=there, other=0.0),
        tl.load(low + at, mask=there, other=0.0),
    )


@triton.jit(do_not_specialize=["threshold"])
def grid_query_attention_dq_kernel(
    t, x, scale, bias, v, blank, row_hashes, key_hashes, d_o, shift, inverse, delta, low, d_x, scale_parts,
    heads, queries, padded, length, n1, n2, n3, blocks, batch,
    x_b, x_m, r_b, v_h, v_n, v_c, g_b, g_m, g_h, threshold, keep_scale,
    AXES: tl.constexpr,
    F: tl.constexpr, F_CHUNK: tl.constexpr, F_COUNT: tl.constexpr, F_TAIL: tl.constexpr, FEW_F: tl.constexpr,
    C: tl.constexpr, C_CHUNK: tl.constexpr, C_COUNT: tl.constexpr, C_TAIL: tl.constexpr, FEW_C: tl.constexpr,
    CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOLD_F: tl.constexpr, HOLD_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of raw channels and of scales: of a block of queries and a group of raw channels, over all heads.

        y = sum over heads and keys of dS tables[n, :F],    d_x = r y,    d_scale = sum of dS axes + x . y

    Grid: ``blocks * GROUPS * B`` programs, see dense_tiles.place.

        t .. key_hashes               in   as grid_query_attention_fwd_kernel takes them
        d_o                [B, M, H, C]    in   dtype of v; strides g_b, g_m, g_h (0 where heads were added up)
        shift, inverse     [B H M]         in   fp32, of grid_query_attention_terms_kernel, as delta and low
        d_x                [B, M, F]       out  dtype of x, dense; or None
        scale_parts        [GROUPS, B, M]  out  fp32: d_scale of every group's channels, the first one's with axes; or None

        heads .. blocks, strides, threshold, keep_scale, AXES .. FEW_C   as there; C is cut for a product of rows
        batch                        B
        CHUNK, COUNT, TAIL, GROUPS   how the raw channels of d_x are cut, of one group
        HOLD_F, HOLD_C               raw channels, and the output's gradient, of a tile stay in registers
    """
    block, group, _, image = place(tl.program_id(0), blocks, 1, GROUPS)
    b, first = image.to(tl.int64), block * BLOCK_M
    left = queries - first
    m = first + tl.arange(0, BLOCK_M)
    there = m < queries
    rows = grid_rows(tl.minimum(m, queries - 1), n1, n2, n3, F, AXES)
    channel = group * (COUNT * CHUNK + TAIL)
    r = None
    if scale is not None:
        r = tl.load(scale + b * r_b + m, mask=there, other=0.0)
    features_left, alive = left, 1.0
    if blank is not None:
        features_left = tl.where(tl.load(blank + b) != 0, 0, left)
        alive = tl.where(tl.load(blank + b) != 0, 0.0, 1.0)
        if scale is not None:
            r = tl.where(tl.load(blank + b) != 0, 0.0, r)
    if x is not None:
        x += b * x_b + tl.cast(first, tl.int64) * x_m
    held = hold_features(x, x_m, features_left, r, BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, HOLD_F)
    if FEW_F:
        sums = vector_zeros(BLOCK_M, F)
    else:
        sums = zeros(BLOCK_M, CHUNK, COUNT, TAIL)
    axes_total = tl.zeros([BLOCK_M], tl.float32)
    for h in tl.range(0, heads):
        at = b * heads + h
        line = at * queries + m
        row_shift, row_inverse, row_delta, row_low = load_stats(shift, inverse, delta, low, line, there)
        if row_hashes is not None:
            row_hash = tl.load(row_hashes + line, mask=there, other=0)
        t_head, bias_head, v_head = t + at * length * padded, bias + at * padded, v + at * v_h
        g = d_o + b * g_b + h * g_h + tl.cast(first, tl.int64) * g_m
        held_g = hold_gradients(g, g_m, left, BLOCK_M, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, HOLD_C)
        for start in tl.range(0, padded, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            axes = axes_sum(t_head, padded, rows, n, BLOCK_M, BLOCK_N)
            s = logits(  # [BLOCK_M, BLOCK_N]
                axes, r, t_head, padded, n, bias_head, x, x_m, features_left, held,
                BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, HOLD_F,
            )  # fmt: skip
            u = weight_gradients(
                g, g_m, left, held_g, v_head, v_n, v_c, start, n,
                BLOCK_M, BLOCK_N, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, HOLD_C,
            )  # fmt: skip
            if row_hashes is not None:
                keep = dropout_keep(row_hash[:, None], tl.load(key_hashes + n)[None, :], threshold)
                u = tl.where(keep, u * keep_scale, 0.0)
            p = tl.math.exp2(s * LOG2_E - row_shift[:, None]) * row_inverse[:, None]
            ds = p * ((u - row_delta[:, None]) - row_low[:, None])
            if scale_parts is not None:
                axes_total += tl.sum(ds * axes, 1)
            new = ()
            if FEW_F:
                for f in tl.static_range(F):
                    new = new + (sums[f] + tl.sum(ds * tl.load(t_head + f * padded + n)[None, :], 1),)
            else:
                tile = ds.to(x.dtype.element_ty)
                for i in tl.static_range(COUNT):
                    y = load_table(t_head, padded, n, channel + i * CHUNK, F, CHUNK).to(x.dtype.element_ty)
                    new = new + (tl.dot(tile, tl.trans(y), sums[i], input_precision="ieee"),)
                if TAIL:
                    y = load_table(t_head, padded, n, channel + COUNT * CHUNK, F, TAIL).to(x.dtype.element_ty)
                    new = new + (tl.dot(tile, tl.trans(y), sums[COUNT], input_precision="ieee"),)
            sums = new

    if scale_parts is not None:
        of_scale = tl.where(group == 0, 1.0, 0.0) * axes_total
        row = tl.arange(0, BLOCK_M)
        if FEW_F:
            for f in tl.static_range(F):
                of_scale += sums[f] * tl.load(x + row * x_m + f, mask=row < features_left, other=0.0).to(tl.float32)
        else:
            for i in tl.static_range(COUNT):
                y = load(x, x_m, features_left, channel + i * CHUNK, F, BLOCK_M, CHUNK, False, False)
                of_scale += tl.sum(sums[i] * y.to(tl.float32), 1)
            if TAIL:
                y = load(x, x_m, features_left, channel + COUNT * CHUNK, F, BLOCK_M, TAIL, False, False)
                of_scale += tl.sum(sums[COUNT] * y.to(tl.float32), 1)
        tl.store(scale_parts + (group.to(tl.int64) * batch + b) * queries + m, of_scale * alive, mask=there)
    if d_x is not None:
        factor = tl.zeros([BLOCK_M], tl.float32) + alive
        if scale is not None:
            factor = factor * r
        out = d_x + (b * queries + first) * F + channel
        if FEW_F:
            scaled = ()
            for f in tl.static_range(F):
                scaled = scaled + (sums[f] * factor,)
            store_vectors(scaled, out, F, left, BLOCK_M)
        else:
            store(sums, out, F, left, F - channel, factor[:, None], None, BLOCK_M, CHUNK, COUNT, TAIL)


@triton.jit(do_not_specialize=["threshold"])
def grid_query_attention_dkv_kernel(
    t, x, scale, bias, v, blank, row_hashes, key_hashes, d_o, shift, inverse, delta, low, t_parts, bias_parts, v_parts,
    heads, queries, padded, length, n1, n2, n3, blocks, splits, queries_per_split,
    x_b, x_m, r_b, v_h, v_n, v_c, g_b, g_m, g_h, threshold, keep_scale,
    AXES: tl.constexpr,
    F: tl.constexpr, F_CHUNK: tl.constexpr, F_COUNT: tl.constexpr, F_TAIL: tl.constexpr, FEW_F: tl.constexpr,
    C: tl.constexpr, C_CHUNK: tl.constexpr, C_COUNT: tl.constexpr, C_TAIL: tl.constexpr, FEW_C: tl.constexpr,
    F_SUM: tl.constexpr, F_SUMS: tl.constexpr, F_REST: tl.constexpr,
    C_SUM: tl.constexpr, C_SUMS: tl.constexpr, C_REST: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the raw channels' table, of biases and of values (what is not None): sums over a split of the queries.

        d_t = sum_m dS r x,    d_bias = sum_m dS,    d_v = keep_scale sum_m keep P d_o

    Grid: ``blocks * GROUPS * splits * B * H`` programs, see dense_tiles.place; one has BLOCK_N keys.

        t .. low       in   as grid_query_attention_dq_kernel takes them
        t_parts        [splits, B H, padded, F]  out  fp32, dense; or None
        bias_parts     [splits, B H, padded]     out  fp32, dense; or None
        v_parts        [splits, B H, padded, C]  out  fp32, dense; or None

        heads .. n3, strides, threshold, keep_scale, AXES .. FEW_C   as there
        blocks                     of BLOCK_N keys
        splits, queries_per_split  how the queries are cut; whole tiles but for the last split
        F_SUM, F_SUMS, F_REST      chunk, count and tail of a group of d_t's channels
        C_SUM, C_SUMS, C_REST      chunk, count and tail of a group of d_v's channels
        GROUPS                     of the channels of d_t and of d_v

    Padding and masked keys have weights of zero. What an element of the batch that is all masked holds in t_parts and
    bias_parts is to be left out.
    """
    block, group, split, head = place(tl.program_id(0), blocks, splits, GROUPS)
    at = head.to(tl.int64)
    b, h = at // heads, at % heads
    start = block * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    begin = split * queries_per_split
    end = tl.minimum(begin + queries_per_split, queries)
    t += at * length * padded
    bias += at * padded
    v += at * v_h
    f_channel, c_channel = group * (F_SUMS * F_SUM + F_REST), group * (C_SUMS * C_SUM + C_REST)
    if row_hashes is not None:
        key_hash = tl.load(key_hashes + n)
    is_blank = False
    if blank is not None:
        is_blank = tl.load(blank + b) != 0
    t_sums = ()
    v_sums = ()
    if t_parts is not None:
        if FEW_F:
            t_sums = vector_zeros(BLOCK_N, F)
        else:
            t_sums = zeros(BLOCK_N, F_SUM, F_SUMS, F_REST)
    if v_parts is not None:
        if FEW_C:
            v_sums = vector_zeros(BLOCK_N, C)
        else:
            v_sums = zeros(BLOCK_N, C_SUM, C_SUMS, C_REST)
    bias_sum = tl.zeros([BLOCK_N], tl.float32)
    for first in tl.range(begin, end, BLOCK_M):
        left = queries - first
        m = first + tl.arange(0, BLOCK_M)
        there = m < queries
        rows = grid_rows(tl.minimum(m, queries - 1), n1, n2, n3, F, AXES)
        r = None
        if scale is not None:
            r = tl.load(scale + b * r_b + m, mask=there, other=0.0)
        features_left = left
        if blank is not None:
            features_left = tl.where(is_blank, 0, left)
            if scale is not None:
                r = tl.where(is_blank, 0.0, r)
        x_tile = x
        if x is not None:
            x_tile = x + b * x_b + tl.cast(first, tl.int64) * x_m
        g = d_o + b * g_b + h * g_h + tl.cast(first, tl.int64) * g_m
        line = at * queries + m
        row_shift, row_inverse, row_delta, row_low = load_stats(shift, inverse, delta, low, line, there)
        held = hold_features(x_tile, x_m, features_left, r, BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, False)
        s = logits(  # [BLOCK_M, BLOCK_N]
            axes_sum(t, padded, rows, n, BLOCK_M, BLOCK_N), r, t, padded, n, bias, x_tile, x_m, features_left, held,
            BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, False,
        )  # fmt: skip
        p = tl.math.exp2(s * LOG2_E - row_shift[:, None]) * row_inverse[:, None]
        if row_hashes is not None:
            row_hash = tl.load(row_hashes + line, mask=there, other=0)
            keep = dropout_keep(row_hash[:, None], key_hash[None, :], threshold)
        held_g = hold_gradients(g, g_m, left, BLOCK_M, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, False)
        if v_parts is not None:
            dropped = p
            if row_hashes is not None:
                dropped = tl.where(keep, p, 0.0)
            if FEW_C:
                new = ()
                for c in tl.static_range(C):
                    new = new + (v_sums[c] + tl.sum(dropped * held_g[c][:, None], 0),)
                v_sums = new
            else:
                v_sums = accumulate(
                    v_sums, tl.trans(dropped), g + c_channel, g_m, left, C - c_channel,
                    BLOCK_M, C_SUM, C_SUMS, C_REST, False, GROUPS * C_SUMS * C_SUM <= C,
                )  # fmt: skip
        if t_parts is not None or bias_parts is not None:
            u = weight_gradients(
                g, g_m, left, held_g, v, v_n, v_c, start, n,
                BLOCK_M, BLOCK_N, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, False,
            )  # fmt: skip
            if row_hashes is not None:
                u = tl.where(keep, u * keep_scale, 0.0)
            ds = p * ((u - row_delta[:, None]) - row_low[:, None])
            if bias_parts is not None:
                bias_sum += tl.sum(ds, 0)
            if t_parts is not None:
                new_t = ()
                if FEW_F:
                    for f in tl.static_range(F):
                        new_t = new_t + (t_sums[f] + tl.sum(ds * held[f][:, None], 0),)
                else:
                    tile = tl.trans(ds.to(x.dtype.element_ty))
                    for i in tl.static_range(F_SUMS):
                        y = load_scaled(x_tile, x_m, features_left, r, f_channel + i * F_SUM, F, BLOCK_M, F_SUM)
                        new_t = new_t + (tl.dot(tile, y, t_sums[i], input_precision="ieee"),)
                    if F_REST:
                        y = load_scaled(x_tile, x_m, features_left, r, f_channel + F_SUMS * F_SUM, F, BLOCK_M, F_REST)
                        new_t = new_t + (tl.dot(tile, y, t_sums[F_SUMS], input_precision="ieee"),)
                t_sums = new_t

    part = (split.to(tl.int64) * (tl.num_programs(0) // (blocks * GROUPS * splits)) + at) * padded + start
    if t_parts is not None:
        if FEW_F:
            store_vectors(t_sums, t_parts + part * F, F, BLOCK_N, BLOCK_N)
        else:
            to = t_parts + part * F + f_channel
            store(t_sums, to, F, BLOCK_N, F - f_channel, 1.0, None, BLOCK_N, F_SUM, F_SUMS, F_REST)
    if bias_parts is not None:
        tl.store(bias_parts + part + tl.arange(0, BLOCK_N), bias_sum, mask=n < tl.where(group == 0, padded, 0))
    if v_parts is not None:
        if FEW_C:
            scaled = ()
            for c in tl.static_range(C):
                scaled = scaled + (v_sums[c] * keep_scale,)
            store_vectors(scaled, v_parts + part * C, C, BLOCK_N, BLOCK_N)
        else:
            to = v_parts + part * C + c_channel
            store(v_sums, to, C, BLOCK_N, C - c_channel, keep_scale, None, BLOCK_N, C_SUM, C_SUMS, C_REST)


@triton.jit(do_not_specialize=["threshold"])
def grid_query_attention_axes_kernel(
    t, x, scale, bias, v, blank, row_hashes, key_hashes, d_o, shift, inverse, delta, low, column_parts, row_parts,
    heads, queries, padded, length, n1, n2, n3, blocks, splits, rows_per_split, first_row, end_row, across,
    x_b, x_m, r_b, v_h, v_n, v_c, g_b, g_m, g_h, threshold, keep_scale,
    AXES: tl.constexpr,
    F: tl.constexpr, F_CHUNK: tl.constexpr, F_COUNT: tl.constexpr, F_TAIL: tl.constexpr, FEW_F: tl.constexpr,
    C: tl.constexpr, C_CHUNK: tl.constexpr, C_COUNT: tl.constexpr, C_TAIL: tl.constexpr, FEW_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the tables of axes: of BLOCK_M columns (of the last axis) and BLOCK_N keys, over a split of the rows.

        column_parts = sum over rows of dS r,    row_parts = sum over columns of dS r

    Grid: ``blocks * across * splits * B * H`` programs, see dense_tiles.place with ``across`` for the groups.

        t .. low      in   as grid_query_attention_dq_kernel takes them
        column_parts  [splits, B H, n3, padded]                         out  fp32, dense
        row_parts     [across, B H, end_row - first_row, padded]        out  fp32, dense; or None with one axis

        heads .. n3, strides, threshold, keep_scale, AXES .. FEW_C   as there; a row is an index of the other axes together
        blocks, across              of BLOCK_N keys, and of BLOCK_M columns
        splits, rows_per_split      how the rows are cut
        first_row, end_row          what rows there are in this launch
    """
    program = tl.program_id(0)
    block = program % blocks
    column_block = program // blocks % across
    split = program // (blocks * across) % splits
    at = (program // (blocks * across) // splits).to(tl.int64)
    b, h = at // heads, at % heads
    heads_all = tl.num_programs(0) // (blocks * across * splits)
    start = block * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    j = column_block * BLOCK_M + tl.arange(0, BLOCK_M)
    there = j < n3
    left = n3 - column_block * BLOCK_M
    begin = first_row + split * rows_per_split
    end = tl.minimum(begin + rows_per_split, end_row)
    t += at * length * padded
    bias += at * padded
    v += at * v_h
    if row_hashes is not None:
        key_hash = tl.load(key_hashes + n)
    is_blank = False
    if blank is not None:
        is_blank = tl.load(blank + b) != 0
    last = (F + n1 + n2 + tl.minimum(j, n3 - 1)).to(tl.int64)
    columns = tl.load(t + last[:, None] * padded + n[None, :])  # [BLOCK_M, BLOCK_N]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row in tl.range(begin, end):
        axes = columns
        if AXES > 1:
            outer = tl.load(t + tl.cast(F + n1 + row % n2, tl.int64) * padded + n)
            if AXES > 2:
                outer = tl.load(t + tl.cast(F + row // n2, tl.int64) * padded + n) + outer
            axes = outer[None, :] + columns
        first = tl.cast(row, tl.int64) * n3 + column_block * BLOCK_M
        m = first + tl.arange(0, BLOCK_M)
        r = None
        if scale is not None:
            r = tl.load(scale + b * r_b + m, mask=there, other=0.0)
        features_left = left
        if blank is not None:
            features_left = tl.where(is_blank, 0, left)
            if scale is not None:
                r = tl.where(is_blank, 0.0, r)
        x_tile = x
        if x is not None:
            x_tile = x + b * x_b + first * x_m
        g = d_o + b * g_b + h * g_h + first * g_m
        line = at * queries + m
        row_shift, row_inverse, row_delta, row_low = load_stats(shift, inverse, delta, low, line, there)
        held = hold_features(x_tile, x_m, features_left, r, BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, False)
        s = logits(
            axes, r, t, padded, n, bias, x_tile, x_m, features_left, held,
            BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, False,
        )  # fmt: skip
        held_g = hold_gradients(g, g_m, left, BLOCK_M, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, False)
        u = weight_gradients(
            g, g_m, left, held_g, v, v_n, v_c, start, n,
            BLOCK_M, BLOCK_N, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, False,
        )  # fmt: skip
        if row_hashes is not None:
            row_hash = tl.load(row_hashes + line, mask=there, other=0)
            keep = dropout_keep(row_hash[:, None], key_hash[None, :], threshold)
            u = tl.where(keep, u * keep_scale, 0.0)
        p = tl.math.exp2(s * LOG2_E - row_shift[:, None]) * row_inverse[:, None]
        ds = p * ((u - row_delta[:, None]) - row_low[:, None])
        if scale is not None:
            ds = ds * r[:, None]
        sums += ds
        if row_parts is not None:
            line_out = (column_block * heads_all + at) * (end_row - first_row) + row - first_row
            tl.store(row_parts + line_out * padded + n, tl.sum(ds, 0))
    out = (split * heads_all + at) * n3
    tl.store(column_parts + (out + j)[:, None] * padded + n[None, :], sums, mask=there[:, None])
