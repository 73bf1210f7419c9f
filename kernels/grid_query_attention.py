"""Forward of attention from described queries to few keys: what a query is made of meets the keys' tables.

    S[m, n] = r_m (sum_a tables_a[n, i_a(m)] + tables[n, :F] . x_m) + bias[n],    P = softmax over n,    o = P v

A program owns a block of queries, consecutive in the grid's row-major order, and walks over the keys, with the running
maximum, sum and output of its softmax as in cross_attention.py. An axis costs a pair one read of its table, at the row
of the query's index there: those of neighbouring queries are mostly the same rows, and come from the cache. Logits are
natural ones, with the roundings of plain PyTorch; one multiply-add makes the exponent of base 2.

Tables, biases, scales, logits and sums are float32. Raw channels and values are float32 or in half precision, which goes
to the tensor cores as it is. With ``sum_heads`` a program takes its heads in turn and adds their outputs up in float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.gpu import architecture
from perceiver_fast.kernels.base2 import LN_2, LOG2_E
from perceiver_fast.kernels.checks import HALF_OR_FLOAT, Check
from perceiver_fast.kernels.cross_attention import LOWEST, power_of_two
from perceiver_fast.kernels.dense_tiles import Pieces, accumulate, place, store, zeros
from perceiver_fast.kernels.dropout import cross_attention_hashes_kernel, dropout_keep, threshold_bits, two_numbers
from perceiver_fast.kernels.grid_query_keys import DOUBLED, FORWARD, Keys, Variant, describe_keys
from perceiver_fast.kernels.grid_query_tiles import (
    axes_sum,
    grid_rows,
    hold_features,
    logits,
    plus,
    store_vectors,
    times,
    vector_zeros,
)
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.reference.dropout import dropout_scale
from perceiver_fast.reference.softmax import EMPTY_LSE

CHECK = Check("grid_query_attention")
MOST_QUERIES = 2**31 - 2**16  # their indices are taken apart in 32 bits


@triton.jit
def _walk(
    t, x, bias, v, row_hash, key_hashes, rows, r, held, left, padded, x_m, v_n, v_c, threshold, channel,
    F: tl.constexpr, F_CHUNK: tl.constexpr, F_COUNT: tl.constexpr, F_TAIL: tl.constexpr, FEW_F: tl.constexpr,
    C: tl.constexpr, C_CHUNK: tl.constexpr, C_COUNT: tl.constexpr, C_TAIL: tl.constexpr, FEW_C: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """A block of queries over all keys of a head: sums of p v, the peak, and the sum of p; p = 2^(log2(e) s - peak)."""
    if FEW_C:
        sums = vector_zeros(BLOCK_M, C)
    else:
        sums = zeros(BLOCK_M, C_CHUNK, C_COUNT, C_TAIL)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, padded, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        s = logits(  # [BLOCK_M, BLOCK_N]
            axes_sum(t, padded, rows, n, BLOCK_M, BLOCK_N), r, t, padded, n, bias, x, x_m, left, held,
            BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, HOLD,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.ceil(tl.max(s, 1) * LOG2_E))  # [BLOCK_M]
        p = tl.math.exp2(s * LOG2_E - higher[:, None])
        fade = power_of_two(peak - higher)  # what earlier sums are worth now
        total = total * fade + tl.sum(p, 1)
        peak = higher
        if row_hash is not None:  # after the sum: the log-sum-exp is that of all weights
            p = tl.where(dropout_keep(row_hash[:, None], tl.load(key_hashes + n)[None, :], threshold), p, 0.0)
        if FEW_C:
            new = ()
            for c in tl.static_range(C):
                value = tl.load(v + n * v_n + c * v_c).to(tl.float32)
                new = new + (sums[c] * fade + tl.sum(p * value[None, :], 1),)
            sums = new
        else:
            sums = accumulate(
                times(sums, fade, False), p, v + tl.cast(first, tl.int64) * v_n + channel, v_n, BLOCK_N, C - channel,
                BLOCK_N, C_CHUNK, C_COUNT, C_TAIL, True, GROUPS * C_COUNT * C_CHUNK <= C,
            )  # fmt: skip
    return sums, peak, total


@triton.jit(do_not_specialize=["threshold"])
def grid_query_attention_fwd_kernel(
    t, x, scale, bias, v, blank, row_hashes, key_hashes, o, lse,
    heads, queries, padded, length, n1, n2, n3, blocks,
    x_b, x_m, r_b, v_h, v_n, v_c, o_b, o_m, o_h, threshold, keep_scale,
    AXES: tl.constexpr,
    F: tl.constexpr, F_CHUNK: tl.constexpr, F_COUNT: tl.constexpr, F_TAIL: tl.constexpr, FEW_F: tl.constexpr,
    C: tl.constexpr, C_CHUNK: tl.constexpr, C_COUNT: tl.constexpr, C_TAIL: tl.constexpr, FEW_C: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUM: tl.constexpr, HOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a block of queries, of one head or (SUM) of all.

    Grid: ``blocks * GROUPS * B * H`` programs, or ``blocks * GROUPS * B`` if SUM, see dense_tiles.place. One computes
    BLOCK_M queries, for one group of the channels of v; weights are computed again for every group.

        t           [B, H, length, padded]  in   fp32: the keys' tables, see grid_query_keys.Keys
        x           [B or 1, M, F]          in   fp32, fp16 or bf16; strides x_b (may be 0), x_m; None without raw channels
        scale       [B or 1, M]             in   fp32, stride r_b (may be 0); or None: one
        bias        [B, H, padded]          in   fp32; -inf for what is masked or padding
        v           see grid_query_keys     in   dtype of x; strides v_h, v_n, v_c
        blank       [B]                     in   uint8: 1 where all keys are masked, and queries do not matter; or None
        row_hashes  [B H M]                 in   int32, or None without dropout
        key_hashes  [padded]                in   int32, or None without dropout
        o           [B, M, H, C]            out  dtype of v; strides o_b, o_m, o_h; SUM: [B, M, C]
        lse         [B H M]                 out  fp64, natural logarithm; or None

        heads, queries, padded, length   H, M, keys in memory, rows of the tables
        n1, n2, n3                       sizes of the axes, 0 for those that are not there; points have none
        blocks                           of BLOCK_M queries
        threshold, keep_scale            of dropout: p 2^32, and 1 / (1 - p)

        AXES                             of the grid, 0 to 3
        F, F_CHUNK, F_COUNT, F_TAIL      raw channels, and how they are cut: dense_tiles.Pieces
        C, C_CHUNK, C_COUNT, C_TAIL      channels of v, and how a group of them is cut
        FEW_F, FEW_C                     they are multiplied one by one instead
        GROUPS                           of the channels of v
        BLOCK_M, BLOCK_N                 tile of weights, queries x keys
        SUM                              heads are added up
        HOLD                             raw channels of a tile stay in registers
        PRECISION                        of products of matrices: "bf16" on tensor cores, or "ieee"

    Queries beyond the last read as the last with zero raw channels, and are not written.
    """
    block, group, _, head = place(tl.program_id(0), blocks, 1, GROUPS)
    if SUM:
        b, h = head.to(tl.int64), 0
    else:
        b, h = (head // heads).to(tl.int64), head % heads
    first = block * BLOCK_M
    left = queries - first
    m = first + tl.arange(0, BLOCK_M)
    there = m < queries
    rows = grid_rows(tl.minimum(m, queries - 1), n1, n2, n3, F, AXES)
    channel = group * (C_COUNT * C_CHUNK + C_TAIL)
    r = None
    if scale is not None:
        r = tl.load(scale + b * r_b + m, mask=there, other=0.0)
    features_left = left
    if blank is not None:
        features_left = tl.where(tl.load(blank + b) != 0, 0, left)
        if scale is not None:
            r = tl.where(tl.load(blank + b) != 0, 0.0, r)
    if x is not None:
        x += b * x_b + tl.cast(first, tl.int64) * x_m
    held = hold_features(x, x_m, features_left, r, BLOCK_M, F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, HOLD)
    out = o + b * o_b + tl.cast(first, tl.int64) * o_m + channel
    if SUM:
        if FEW_C:
            added = vector_zeros(BLOCK_M, C)
        else:
            added = zeros(BLOCK_M, C_CHUNK, C_COUNT, C_TAIL)
        for each in tl.range(0, heads):
            at = b * heads + each
            row_hash = None
            if row_hashes is not None:
                row_hash = tl.load(row_hashes + at * queries + m, mask=there, other=0)
            sums, peak, total = _walk(
                t + at * length * padded, x, bias + at * padded, v + at * v_h, row_hash, key_hashes, rows, r, held,
                features_left, padded, x_m, v_n, v_c, threshold, channel,
                F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, GROUPS, BLOCK_M, BLOCK_N, HOLD,
            )  # fmt: skip
            added = plus(added, times(sums, keep_scale / total, FEW_C))
            if lse is not None:
                natural = (peak.to(tl.float64) + tl.math.log2(total).to(tl.float64)) * LN_2
                tl.store(lse + at * queries + m, natural, mask=there & (group == 0))
    else:
        at = b * heads + h
        row_hash = None
        if row_hashes is not None:
            row_hash = tl.load(row_hashes + at * queries + m, mask=there, other=0)
        sums, peak, total = _walk(
            t + at * length * padded, x, bias + at * padded, v + at * v_h, row_hash, key_hashes, rows, r, held,
            features_left, padded, x_m, v_n, v_c, threshold, channel,
            F, F_CHUNK, F_COUNT, F_TAIL, FEW_F, C, C_CHUNK, C_COUNT, C_TAIL, FEW_C, GROUPS, BLOCK_M, BLOCK_N, HOLD,
        )  # fmt: skip
        added = times(sums, keep_scale / total, FEW_C)
        out += h * o_h
        if lse is not None:
            natural = (peak.to(tl.float64) + tl.math.log2(total).to(tl.float64)) * LN_2
            tl.store(lse + at * queries + m, natural, mask=there & (group == 0))
    if FEW_C:
        store_vectors(added, out, o_m, left, BLOCK_M)
    else:
        store(added, out, o_m, left, C - channel, 1.0, None, BLOCK_M, C_CHUNK, C_COUNT, C_TAIL)


def pieces(prefix: str, found: Pieces) -> dict[str, int]:
    """How channels are cut, under the names of a kernel's constants."""
    return {f"{prefix}_CHUNK": found.chunk, f"{prefix}_COUNT": found.count, f"{prefix}_TAIL": found.tail}


def common(
    keys: Keys, feat: Tensor, scale: Tensor | None, variant: Variant, dropout: float, seed: Tensor | None
) -> tuple[list[Launch], dict[str, object]]:
    """The launches that come first, dropout's hashes, and the arguments that all passes take.

    feat ``[B or 1, *sizes, F]`` and scale are dense; C_CHUNK and so on cut the channels of v for a product of rows.
    """
    batch, heads, length, padded = keys.tables.shape
    features, channels, queries = variant.features, variant.channels, math.prod(feat.shape[1:-1])
    launches, hashes = [], dict(row_hashes=None, key_hashes=None)
    if dropout > 0:
        rows = batch * heads * queries
        row_hashes, key_hashes = (keys.v.new_empty(size, dtype=torch.int32) for size in (rows, padded))
        hashes = dict(row_hashes=row_hashes, key_hashes=key_hashes)
        numbers = dict(
            row_hashes=row_hashes, token_hashes=key_hashes, seed=two_numbers(seed), rows=rows, tokens=padded, BLOCK=256
        )
        launches.append(Launch(cross_attention_hashes_kernel, triton.cdiv(max(rows, padded), 256), numbers))
    shared = feat.shape[0] == 1
    n1, n2, n3 = [0] * (3 - len(keys.groups)) + keys.sizes
    few = variant.few_channels
    v_h, *between = keys.v.stride()[1:]
    arguments = dict(
        t=keys.tables, x=feat if features else None, scale=scale, bias=keys.bias, v=keys.v, blank=keys.blank,
        heads=heads, queries=queries, padded=padded, length=length, n1=n1, n2=n2, n3=n3,
        x_b=0 if shared else queries * features, x_m=features, r_b=0 if shared else queries,
        v_h=v_h, v_n=between[few], v_c=between[not few],
        threshold=threshold_bits(dropout), keep_scale=dropout_scale(dropout),
        AXES=len(keys.groups), F=features, C=channels, FEW_F=variant.few_features, FEW_C=variant.few_channels,
        PRECISION=variant.precision,
    )  # fmt: skip
    arguments |= pieces("F", variant.read(features)) | pieces("C", variant.read(channels))
    return launches, arguments | hashes


def out_strides(t: Tensor, sum_heads: bool) -> tuple[int, int, int]:
    """From batch element, query and head to the next, of an output or its gradient."""
    return t.stride(0), t.stride(1), 0 if sum_heads else t.stride(2)


def forward_launches(
    out: Tensor | None, tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, need_lse, arch: int
) -> tuple[Tensor, Tensor, list[Launch]]:
    """The output (``out`` if given, its channels dense), lse or an empty tensor, and the launches that compute them."""
    (batch, heads), queries, channels = tables.shape[:2], math.prod(feat.shape[1:-1]), v.shape[-1]
    shape = (batch, queries, channels) if sum_heads else (batch, queries, heads, channels)
    o = v.new_empty(shape) if out is None else out
    lse = tables.new_empty((batch, heads, queries) if need_lse else (0,), dtype=torch.float64)
    if batch * queries == 0:
        return o, lse, []
    feat, scale = feat.contiguous(), None if scale is None else scale.contiguous()
    keys = describe_keys(tables, v, bias, mask, tuple(feat.shape[1:-1]) if grid else (), feat.shape[-1])
    variant = Variant(v.dtype, feat.shape[-1], channels, arch)
    launches, arguments = common(keys, feat, scale, variant, dropout, seed)
    config = variant.config("forward")
    summed = sum_heads and heads > 1
    cut_v = Pieces(0, 0, 0) if variant.few_channels else variant.summed(channels, DOUBLED if summed else FORWARD)
    blocks = triton.cdiv(queries, config.queries)
    programs = blocks * cut_v.groups * batch * (1 if summed else heads)
    o_b, o_m, o_h = out_strides(o, sum_heads)
    arguments |= pieces("C", cut_v) | dict(
        o=o, lse=lse if need_lse else None, blocks=blocks, o_b=o_b, o_m=o_m, o_h=o_h, GROUPS=cut_v.groups,
        BLOCK_M=config.queries, BLOCK_N=config.tokens, SUM=summed, HOLD=variant.holds(feat.shape[-1]),
    )  # fmt: skip
    launches.append(
        Launch(grid_query_attention_fwd_kernel, programs, arguments, config, config.queries * config.tokens)
    )
    return o, lse, launches


def check(tables, feat, scale, bias, v, mask, grid, dropout, seed) -> None:
    """Raises what these kernels cannot take: the public function never asks for it, who calls the registered op may.

    Raises:
        RuntimeError: another dtype, rank or size, or more than 2,147,418,112 queries.
    """
    CHECK.dtype("tables", tables, torch.float32)
    CHECK.dtype("feat", feat, *HALF_OR_FLOAT)
    CHECK.dtype("v", v, feat.dtype)
    for name, t in (("scale", scale), ("bias", bias)):
        CHECK.dtype(name, t, torch.float32)
    CHECK.rank("tables", tables, 4, "[B, H, N, L]")
    CHECK.rank("v", v, 4, "[B, H, N, C]")
    axes = feat.dim() - 2
    CHECK.expect(
        axes >= 1 if grid else axes == 1, "feat [B, *sizes, F]" if grid else "feat [B, M, F]", list(feat.shape)
    )
    (batch, heads, keys), (rows, *sizes, features) = tables.shape[:3], feat.shape
    CHECK.expect(not grid or all(sizes), "a grid without empty axes", f"sizes {sizes}")
    CHECK.expect(rows in (batch, 1), f"feat of tables' batch size {batch} or of one", rows)
    CHECK.expect(heads > 0 and keys > 0, "at least one head and one key", f"tables of shape {list(tables.shape)}")
    CHECK.expect(v.shape[3] > 0, "v of at least one channel", "none")
    CHECK.expect(math.prod(sizes) <= MOST_QUERIES, f"at most {MOST_QUERIES} queries a call", math.prod(sizes))
    length = features + (sum(sizes) if grid else 0)
    form = "[B, H, N, F + sum(sizes)]" if grid else "[B, H, N, F]"
    CHECK.shape("tables", tables, (batch, heads, keys, length), form)
    CHECK.shape("scale", scale, (rows, *sizes), "[B, *sizes] like feat" if grid else "[B, M] like feat")
    CHECK.shape("bias", bias, (batch, heads, keys), "[B, H, N]")
    CHECK.shape("v", v, (batch, heads, keys, v.shape[3]), "[B, H, N, C]")
    CHECK.tensor("mask", mask, torch.bool, (batch, keys), "[B, N]")
    CHECK.dropout(dropout, seed)


def forward(
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
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Kernel of the operator ``grid_query_attention_forward``.

    Args:
        tables: ``[B, H, N, L]`` float32, as scale and bias.
        feat: ``[B or 1, *sizes, F]``: float32, or a half-precision dtype, which then is that of weights and values.
        v: ``[B, H, N, C]``, the dtype of feat.
        scale, bias, mask, grid, dropout, seed, sum_heads: see :mod:`perceiver_fast.ops.grid_query_attention`.
        need_lse: whether the log-sum-exps are asked for.

    Returns:
        o ``[B, M, H, C]``, or ``[B, M, C]`` with sum_heads, the dtype of v, and lse ``[B, H, M]`` float64 (-3.4e38 where
        all keys are masked), or an empty tensor.

    Raises:
        RuntimeError: see :func:`check`.
    """
    check(tables, feat, scale, bias, v, mask, grid, dropout, seed)
    arguments = tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, need_lse
    o, lse, launches = forward_launches(None, *arguments, architecture(tables.device))
    for launch in launches:
        launch.run()
    if need_lse and mask is not None:
        lse = lse.masked_fill(~mask.any(1)[:, None, None], EMPTY_LSE)
    return o, lse


def into(
    out: Tensor,
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
) -> None:
    """Kernel of the operator ``grid_query_attention_into``: the forward's o, written into ``out``, of its dtype and shape.

    It is written where it is if its channels are dense, else copied there.

    Raises:
        RuntimeError: see :func:`check`.
    """
    check(tables, feat, scale, bias, v, mask, grid, dropout, seed)
    (batch, heads), queries, channels = tables.shape[:2], math.prod(feat.shape[1:-1]), v.shape[-1]
    shape = (batch, queries, channels) if sum_heads else (batch, queries, heads, channels)
    CHECK.tensor("out", out, v.dtype, shape, "[B, M, C]" if sum_heads else "[B, M, H, C]")
    direct = out.stride(-1) == 1 or channels == 1
    arguments = tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, False
    o, _, launches = forward_launches(out if direct else None, *arguments, architecture(tables.device))
    for launch in launches:
        launch.run()
    if not direct:
        out.copy_(o)
