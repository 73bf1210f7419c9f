"""Backward of attention from described queries: the weights are computed again from the log-sum-exp.

    u = keep keep_scale d_o v^T,    delta = sum_n P u,    dS = P (u - delta),    d_v = keep_scale (keep P)^T d_o
    d_bias = sum_m dS,    d_tables[n, :F] = sum_m dS r x,    d_tables_a[n, i] = sum of dS r over the queries of index i
    d_x = r sum_n dS tables[n, :F],    d_scale = sum_n dS (tables[n, :F] . x + the part by axes)

Queries' sums come first: P's are divided by their sum, and delta is a sum of two numbers, the second the rounding error of
the first (in half precision, whose rounding is larger, it is zero). So the sum of dS over the keys is zero up to rounding
however well the log-sum-exp is known, and a query that one key has nearly all of gets its tiny gradients, not that error.

Sums over queries are left in parts, one a split of the queries, and added up in order: results are the same bits every
time. Rows of a grid, all axes but the last, leave a part each; so that these fit in memory, a grid with many of them is
taken a slab at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.gpu import architecture
from perceiver_fast.kernels.base2 import LOG2_E
from perceiver_fast.kernels.dense_tiles import Pieces, place
from perceiver_fast.kernels.dropout import dropout_keep
from perceiver_fast.kernels.grid_query_attention import CHECK, check, common, out_strides
from perceiver_fast.kernels.grid_query_attention_gradients import (
    grid_query_attention_axes_kernel,
    grid_query_attention_dkv_kernel,
    grid_query_attention_dq_kernel,
)
from perceiver_fast.kernels.grid_query_keys import Keys, Variant, describe_keys, join
from perceiver_fast.kernels.grid_query_tiles import (
    axes_sum,
    grid_rows,
    hold_features,
    hold_gradients,
    logits,
    weight_gradients,
)
from perceiver_fast.kernels.launch import Launch, share

SIZES = (
    "heads", "count", "splits", "others", "part_split", "part_other", "part_x", "part_y", "out_x", "out_y", "ys",
    "blocks",
)  # fmt: skip
ROW_PARTS = 2**24  # numbers that the rows of a slab leave, at most, if a slab is more than one index of the first axis


@triton.jit(do_not_specialize=["threshold"])
def grid_query_attention_terms_kernel(
    t, x, scale, bias, v, blank, row_hashes, key_hashes, d_o, lse, shift, inverse, delta, low,
    heads, queries, padded, length, n1, n2, n3, blocks,
    x_b, x_m, r_b, v_h, v_n, v_c, g_b, g_m, g_h, threshold, keep_scale,
    AXES: tl.constexpr,
    F: tl.constexpr, F_CHUNK: tl.constexpr, F_COUNT: tl.constexpr, F_TAIL: tl.constexpr, FEW_F: tl.constexpr,
    C: tl.constexpr, C_CHUNK: tl.constexpr, C_COUNT: tl.constexpr, C_TAIL: tl.constexpr, FEW_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOLD_F: tl.constexpr, HOLD_C: tl.constexpr,
    TWICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the other passes need of every query: a shift and the weights' inverse sum, and delta in two parts.

        shift = floor(log2(e) lse),    inverse = 1 / sum_n 2^(log2(e) s - shift),    delta + low = sum_n P u

    Grid: ``blocks * B * H`` programs of BLOCK_M queries.

        t .. key_hashes            in   as grid_query_attention_fwd_kernel takes them
        d_o                        in   as grid_query_attention_dq_kernel takes it
        lse                        [B H M]  in   fp64
        shift, inverse, delta, low [B H M]  out  fp32

        heads .. FEW_C, HOLD_F, HOLD_C   as in grid_query_attention_dq_kernel
        TWICE                            keys are walked over once more, for low; else it is zero
    """
    block, _, _, head = place(tl.program_id(0), blocks, 1, 1)
    at = head.to(tl.int64)
    b, h, first = at // heads, at % heads, block * BLOCK_M
    left = queries - first
    m = first + tl.arange(0, BLOCK_M)
    there = m < queries
    rows = grid_rows(tl.minimum(m, queries - 1), n1, n2, n3, F, AXES)
    line = at * queries + m
    whole = tl.floor(tl.load(lse + line, mask=there, other=0.0) * LOG2_E).to(tl.float32)
    r = None
    if scale is not None:
        r = tl.load(scale + b * r_b + m, mask=there, other=0.0)
    features_left = left
    if blank is not None:
        is_blank = tl.load(blank + b) != 0
        features_left = tl.where(is_blank, 0, left)
        whole = tl.where(is_blank, 0.0, whole)  # logits are zero
        if scale is not None:
            r = tl.where(is_blank, 0.0, r)
    if x is not None:
        x += b * x_b + tl.cast(first, tl.int64) * x_m
    held = hold_features(x, x_m, features_left, r, BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, HOLD_F)
    g = d_o + b * g_b + h * g_h + tl.cast(first, tl.int64) * g_m
    held_g = hold_gradients(g, g_m, left, BLOCK_M, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, HOLD_C)
    t += at * length * padded
    bias += at * padded
    v += at * v_h
    if row_hashes is not None:
        row_hash = tl.load(row_hashes + line, mask=there, other=0)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    factor = tl.zeros([BLOCK_M], tl.float32)
    for turn in tl.static_range(1 + TWICE):
        added = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, padded, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            s = logits(  # [BLOCK_M, BLOCK_N]
                axes_sum(t, padded, rows, n, BLOCK_M, BLOCK_N), r, t, padded, n, bias, x, x_m, features_left, held,
                BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, HOLD_F,
            )  # fmt: skip
            u = weight_gradients(
                g, g_m, left, held_g, v, v_n, v_c, start, n,
                BLOCK_M, BLOCK_N, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, HOLD_C,
            )  # fmt: skip
            if row_hashes is not None:
                keep = dropout_keep(row_hash[:, None], tl.load(key_hashes + n)[None, :], threshold)
                u = tl.where(keep, u * keep_scale, 0.0)
            p = tl.math.exp2(s * LOG2_E - whole[:, None])
            if turn == 0:
                total += tl.sum(p, 1)
                added += tl.sum(p * u, 1)
            else:
                added += tl.sum(p * (u - mean[:, None]), 1)
        if turn == 0:
            factor = 1.0 / total
            mean = added * factor
        else:
            rest = added * factor
    tl.store(shift + line, whole, mask=there)
    tl.store(inverse + line, factor, mask=there)
    tl.store(delta + line, mean, mask=there)
    tl.store(low + line, rest, mask=there)


@triton.jit(do_not_specialize=SIZES)
def grid_query_attention_sum_kernel(
    parts, out, blank, heads, count, splits, others, part_split, part_other, part_x, part_y, out_x, out_y,
    ys, blocks, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[x, y, n] = sum over splits, then others, of parts``, in order; x is ``b H + h``.

    Grid: ``blocks * ys`` programs for every x. Elements n beyond ``count`` are neither read nor written.

        parts   in   fp32; strides part_split, part_other, part_x, part_y, n dense
        out     out  fp32, fp16 or bf16; strides out_x, out_y, n dense
        blank   in   uint8 [B]: 1 where the sum is to be zero; or None

        heads, count, ys, blocks   H, elements n, indices y, and blocks of BLOCK elements n
        splits, others             what is summed
        ADD                        to what out holds
    """
    program = tl.program_id(0)
    n = program % blocks * BLOCK + tl.arange(0, BLOCK)
    y = (program // blocks % ys).to(tl.int64)
    x = (program // blocks // ys).to(tl.int64)
    inside = n < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(0, splits):
        for other in tl.range(0, others):
            at = tl.cast(split, tl.int64) * part_split + tl.cast(other, tl.int64) * part_other + x * part_x + y * part_y
            total += tl.load(parts + at + n, mask=inside, other=0.0)
    if blank is not None:
        total = tl.where(tl.load(blank + x // heads) != 0, 0.0, total)
    to = out + x * out_x + y * out_y + n
    if ADD:
        total += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


def _sum(
    parts: Tensor, out: Tensor, keys: Keys | None, shape: tuple[int, int, int], splits: int,
    others: int = 1, between: int = 0, at: tuple[int, int] | None = None, add: bool = False,
) -> Launch:  # fmt: skip
    """A launch that adds up parts ``[splits, x, ..]`` to ``out [x, ..]``, of which y and n are the first, dense elements.

    Args:
        keys: whose blank elements of the batch get zeros; None: all have their sum.
        shape: x, y and n, what there is of each.
        splits, others: what is summed; others are ``between`` apart.
        at: from y to y, in parts and in out.
        add: to what is there.
    """
    xs, ys, count = shape
    part_y, out_y = at or (0, 0)
    arguments = dict(
        parts=parts, out=out, blank=None if keys is None else keys.blank, heads=1 if keys is None else keys.v.shape[1],
        count=count, splits=splits, others=others, part_split=parts.stride(0), part_other=between,
        part_x=parts.stride(1), part_y=part_y, out_x=out.stride(0), out_y=out_y, ys=ys,
        blocks=triton.cdiv(count, 128), ADD=add, BLOCK=128,
    )  # fmt: skip
    return Launch(grid_query_attention_sum_kernel, xs * ys * arguments["blocks"], arguments)


def _key_launches(
    keys: Keys, variant: Variant, arguments: dict, d_table: Tensor, d_bias: Tensor | None, d_v: Tensor
) -> list[Launch]:
    """What sums over all queries: gradients ``[B H, ..]`` of the raw channels' table, of biases and of values."""
    heads, rows, padded, features, channels = *d_v.shape[:2], keys.bias.shape[-1], variant.features, variant.channels
    config = variant.config("dkv")
    blocks, launches = padded // config.tokens, []
    cut_f = Pieces(0, 0, 0) if variant.few_features else variant.summed(features, variant.backward)
    cut_v = Pieces(0, 0, 0) if variant.few_channels else variant.summed(channels, variant.backward)
    of_tables = features > 0 or d_bias is not None
    # Both in one walk if registers hold the sums of both; else P is computed for each.
    few = variant.few_features or variant.few_channels
    held = sum(cut.count * cut.chunk + cut.tail for cut in (cut_f, cut_v))
    both = cut_f.groups == cut_v.groups and (few or held <= 3 * variant.backward // 4)
    for tables, values in ((of_tables, True),) if both or not of_tables else ((True, False), (False, True)):
        groups = max(cut.groups for cut, wanted in ((cut_f, tables), (cut_v, values)) if wanted)
        programs = heads * blocks * groups
        splits, each = share(arguments["queries"], config.queries, programs, d_v.device)
        t_parts = d_table.new_empty(splits, heads, padded, features) if tables and features else None
        b_parts = d_table.new_empty(splits, heads, padded) if tables and d_bias is not None else None
        v_parts = d_table.new_empty(splits, heads, padded, channels) if values else None
        walk = arguments | dict(
            t_parts=t_parts, bias_parts=b_parts, v_parts=v_parts, blocks=blocks, splits=splits,
            queries_per_split=each, GROUPS=groups, BLOCK_M=config.queries, BLOCK_N=config.tokens,
            F_SUM=cut_f.chunk, F_SUMS=cut_f.count, F_REST=cut_f.tail,
            C_SUM=cut_v.chunk, C_SUMS=cut_v.count, C_REST=cut_v.tail,
        )  # fmt: skip
        weights = config.queries * config.tokens
        launches.append(Launch(grid_query_attention_dkv_kernel, programs * splits, walk, config, weights))
        if t_parts is not None:
            launches.append(_sum(t_parts, d_table, keys, (heads, 1, rows * features), splits))
        if b_parts is not None:
            launches.append(_sum(b_parts, d_bias, keys, (heads, 1, rows), splits))
        if v_parts is not None:
            launches.append(_sum(v_parts, d_v, None, (heads, 1, rows * channels), splits))
    return launches


def _axes_launches(keys: Keys, variant: Variant, arguments: dict, d_joined: Tensor) -> list[Launch]:
    """Gradients of the joined axes' tables, ``[B H, sum of sizes, padded]``."""
    heads, length, padded = d_joined.shape
    config = variant.config("axes")
    n1, n2, n3 = [1] * (3 - len(keys.sizes)) + keys.sizes
    blocks, across = padded // config.tokens, triton.cdiv(n3, config.queries)
    slab = max(1, min(n1, ROW_PARTS // (across * heads * n2 * padded)))  # indices of the first axis
    slabs = triton.cdiv(n1, slab)
    splits, each = share(slab * n2, 1, heads * blocks * across, d_joined.device)
    column_parts = d_joined.new_empty(slabs * splits, heads, n3 * padded)
    launches, weights = [], config.queries * config.tokens
    for index in range(slabs):
        first, end = index * slab, min(n1, (index + 1) * slab)
        row_parts = None
        if len(keys.sizes) > 1:
            row_parts = d_joined.new_empty(across, heads, (end - first) * n2 * padded)
        # A short last slab has splits without rows, which leave zeros.
        walk = arguments | dict(
            column_parts=column_parts[index * splits :], row_parts=row_parts, blocks=blocks, splits=splits,
            rows_per_split=each, first_row=first * n2, end_row=end * n2, across=across,
            BLOCK_M=config.queries, BLOCK_N=config.tokens,
        )  # fmt: skip
        programs = heads * blocks * across * splits
        launches.append(Launch(grid_query_attention_axes_kernel, programs, walk, config, weights))
        start = 0
        if len(keys.sizes) > 2:
            to, start = d_joined[:, first:], n1
            shape, at = (heads, end - first, padded), (n2 * padded, padded)
            launches.append(_sum(row_parts, to, keys, shape, across, n2, padded, at))
        if len(keys.sizes) > 1:
            to, shape = d_joined[:, start:], (heads, 1, n2 * padded)
            launches.append(_sum(row_parts, to, keys, shape, across, end - first, n2 * padded, add=index > 0))
    launches.append(_sum(column_parts, d_joined[:, length - n3 :], keys, (heads, 1, n3 * padded), slabs * splits))
    return launches


def _query_launches(keys: Keys, variant: Variant, arguments: dict, feat, d_feat, d_scale) -> list[Launch]:
    """Gradients of raw channels and of scales, where there are any."""
    batch, queries = d_feat.shape[0], arguments["queries"]
    if variant.features == 0 and d_scale is None:
        return []
    config = variant.config("dq")
    cut = Pieces(0, 0, 0) if variant.few_features else variant.summed(variant.features, variant.backward)
    blocks = triton.cdiv(queries, config.queries)
    parts = None
    if d_scale is not None:
        parts = d_scale if cut.groups == 1 else d_scale.new_empty(cut.groups, batch, queries)
    walk = arguments | dict(
        d_x=d_feat if variant.features else None, scale_parts=parts, blocks=blocks, batch=batch,
        CHUNK=cut.chunk, COUNT=cut.count, TAIL=cut.tail, GROUPS=cut.groups,
        BLOCK_M=config.queries, BLOCK_N=config.tokens, HOLD_F=variant.holds(variant.features),
        HOLD_C=variant.holds(variant.channels),
    )  # fmt: skip
    programs, weights = blocks * cut.groups * batch, config.queries * config.tokens
    launches = [Launch(grid_query_attention_dq_kernel, programs, walk, config, weights)]
    if parts is not None and cut.groups > 1:
        launches.append(_sum(parts, d_scale.flatten(1), None, (batch, 1, queries), cut.groups))
    return launches


def backward_launches(
    d_o, tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, lse, token_grads, arch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Launch]]:
    """The gradients of the raw channels' table ``[B H, N, F]`` and of those of joined axes ``[B H, sum of sizes, padded]``,
    d_feat, d_scale, d_bias and d_v, and the launches that compute them. Those that are not asked for are empty.
    """
    batch, heads = tables.shape[:2]
    features, channels = feat.shape[-1], v.shape[-1]
    feat, d_o, lse = feat.contiguous(), d_o.contiguous(), lse.contiguous()
    scale = None if scale is None else scale.contiguous()
    keys = describe_keys(tables, v, bias, mask, tuple(feat.shape[1:-1]) if grid else (), features)
    variant = Variant(v.dtype, features, channels, arch)
    launches, arguments = common(keys, feat, scale, variant, dropout, seed)
    shift, inverse, delta, low = lse.new_empty(4, lse.numel(), dtype=torch.float32)
    g_b, g_m, g_h = out_strides(d_o, sum_heads)
    arguments |= dict(d_o=d_o, shift=shift, inverse=inverse, delta=delta, low=low, g_b=g_b, g_m=g_m, g_h=g_h)
    config = variant.config("terms")
    blocks = triton.cdiv(arguments["queries"], config.queries)
    terms = arguments | dict(
        lse=lse, blocks=blocks, BLOCK_M=config.queries, BLOCK_N=config.tokens, HOLD_F=variant.holds(features),
        HOLD_C=variant.holds(channels), TWICE=not variant.half,
    )  # fmt: skip
    weights = config.queries * config.tokens
    launches.append(Launch(grid_query_attention_terms_kernel, batch * heads * blocks, terms, config, weights))
    d_table = tables.new_empty(batch * heads, tables.shape[2], features)
    d_joined = tables.new_empty(batch * heads, sum(keys.sizes), keys.bias.shape[-1])
    d_bias = tables.new_empty(bias.shape) if bias is not None else None
    d_v = v.new_empty(v.shape)
    flat = None if d_bias is None else d_bias.flatten(0, 1)
    launches += _key_launches(keys, variant, arguments, d_table, flat, d_v.flatten(0, 1))
    if keys.groups:
        launches += _axes_launches(keys, variant, arguments, d_joined)
    d_feat = feat.new_empty((batch, *feat.shape[1:]) if token_grads else (0,))
    d_scale = tables.new_empty((batch, *feat.shape[1:-1])) if token_grads and scale is not None else None
    if token_grads:
        launches += _query_launches(keys, variant, arguments, feat, d_feat, d_scale)
    d_scale, d_bias = (tables.new_empty(0) if d is None else d for d in (d_scale, d_bias))
    return d_table, d_joined, d_feat, d_scale, d_bias, d_v, launches


def _apart(d_joined: Tensor, groups: list[tuple[int, ...]]) -> list[Tensor]:
    """What joined axes ``[.., sum of sizes]`` collected, summed for every axis of their own."""
    parts = []
    for part, group in zip(d_joined.split([math.prod(group) for group in groups], -1), groups):
        part = part.unflatten(-1, group)
        for axis in range(-len(group), 0):
            others = [other for other in range(-len(group), 0) if other != axis]
            parts.append(part.sum(others) if others else part)
    return parts


def backward(
    d_o: Tensor,
    tables: Tensor,
    feat: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    v: Tensor,
    mask: Tensor | None,
    grid: bool,
    dropout: float,
    seed: Tensor | None,
    sum_heads: bool,
    lse: Tensor,
    token_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel of the operator ``grid_query_attention_backward``.

    Args:
        d_o: like the forward's o, of any strides.
        tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads: as the forward's.
        lse: ``[B, H, M]`` float64, what the forward returned.
        token_grads: whether the gradients of feat and scale are asked for; they are empty otherwise.

    Returns:
        d_tables, d_feat ``[B, *sizes, F]`` and d_scale ``[B, *sizes]``, even where the batch shares them, d_bias, d_v.

    Raises:
        RuntimeError: see :func:`perceiver_fast.kernels.grid_query_attention.check`.
    """
    check(tables, feat, scale, bias, v, mask, grid, dropout, seed)
    (batch, heads), queries = tables.shape[:2], math.prod(feat.shape[1:-1])
    shape = (batch, queries, v.shape[3]) if sum_heads else (batch, queries, heads, v.shape[3])
    CHECK.tensor("d_o", d_o, v.dtype, shape, "[B, M, C]" if sum_heads else "[B, M, H, C]")
    CHECK.tensor("lse", lse, torch.float64, (batch, heads, queries), "[B, H, M]")
    if batch * queries == 0:  # without queries the keys' gradients are zero
        d_feat = feat.new_empty((batch, *feat.shape[1:]) if token_grads else (0,))
        d_scale = tables.new_empty((batch, *feat.shape[1:-1]) if token_grads and scale is not None else (0,))
        d_bias = tables.new_zeros((0,) if bias is None else bias.shape)
        return torch.zeros_like(tables), d_feat, d_scale, d_bias, torch.zeros_like(v)
    arguments = d_o, tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, lse, token_grads
    d_table, d_joined, *others, launches = backward_launches(*arguments, architecture(tables.device))
    for launch in launches:
        launch.run()
    axes = _apart(d_joined[..., : tables.shape[2]].mT, join(tuple(feat.shape[1:-1]))) if grid else []
    return torch.cat([d_table, *axes], -1).view(tables.shape), *others
