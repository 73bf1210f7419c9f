"""Forward of streaming attention on built keys and values.

A program owns a block of queries of one head and a split of the tokens, and keeps the running maximum, sum and output of
its softmax (Milakov and Gimelshein 2018; Dao et al. 2022), in units of log2:

    s = scale log2(e) q k^T,    peak' = max(peak, ceil(max s)),    p = 2^(s - peak')
    (total, o)' = 2^(peak - peak') (total, o) + p (1, v)

A peak that is a whole number makes the fading of earlier sums exact. One multiply-add makes the exponent of p, so that
p is exact however large s is, as long as rounding the peak leaves p within fp32: up to logits of 1e9.

With few queries the tokens are split until the GPU is full, and a second kernel merges the splits. Half precision goes
to the tensor cores as it is, with p rounded to it; scores, softmax and sums are fp32. fp32 is multiplied in fp32
("ieee"): three TF32 products would do for one tile, but tensor cores truncate as they add, and over tens of thousands of
tokens that exceeds the error of plain fp32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.gpu import architecture
from perceiver_fast.kernels import dropout as drop
from perceiver_fast.kernels.configs import Config, config
from perceiver_fast.kernels.dense_tiles import Pieces, accumulate, cut, hold, product, scaled, store, zeros
from perceiver_fast.kernels.launch import Launch, aligned_rows, share, strides
from perceiver_fast.reference.dropout import dropout_scale

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: below every logit, and finite, so that differences are no NaN
NARROW = 128  # channels up to which a tile of queries is held, and the narrow configurations are for
MERGED = 16  # splits that a program of the merges reads at a time


@triton.jit
def cross_attention_keys_kernel(seed, row_keys, token_keys, rows, tokens, BLOCK: tl.constexpr):
    """Dropout's keys of all query rows and tokens: once a call, since they cost more than a weight does."""
    number = tl.load(seed)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(row_keys + i, drop.row_keys(number, i).to(tl.int32, bitcast=True), mask=i < rows)
    tl.store(token_keys + i, drop.token_keys(number, i).to(tl.int32, bitcast=True), mask=i < tokens)


@triton.jit
def visible(mask, token, tokens, EVEN: tl.constexpr):
    """Whether tokens are there and not masked."""
    if mask is None:
        seen = token < tokens
    elif EVEN:
        seen = tl.load(mask + token) != 0
    else:
        seen = tl.load(mask + token, mask=token < tokens, other=0) != 0
    return seen


@triton.jit
def power_of_two(x):
    """2^x of whole numbers ``x <= 0``, written as bits: exact, and no exponential. Zero from -127 down."""
    return ((tl.maximum(x, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["threshold"])
def cross_attention_fwd_kernel(
    q, k, v, mask, row_keys, token_keys, o, lse, peaks, totals,
    heads, queries, tokens, blocks, splits, tokens_per_split,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, mask_b,
    log2_scale, threshold, keep_scale,
    D: tl.constexpr, D_CHUNK: tl.constexpr, D_COUNT: tl.constexpr, D_TAIL: tl.constexpr,
    V: tl.constexpr, V_CHUNK: tl.constexpr, V_COUNT: tl.constexpr, V_TAIL: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr, HOLD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # Programs that read the same keys and values follow each other: blocks of queries, groups of channels, splits, heads.
    pid = tl.program_id(0)
    n = pid % blocks * BLOCK_N
    group = pid // blocks % GROUPS
    split = pid // (blocks * GROUPS) % splits
    head = pid // (blocks * GROUPS) // splits
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    channel = group * (V_COUNT * V_CHUNK + V_TAIL)

    rows = n + tl.arange(0, BLOCK_N)
    row = head.to(tl.int64) * queries + rows
    q += b * q_b + h * q_h + n.to(tl.int64) * q_n
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h + channel
    if mask is not None:
        mask += b * mask_b
    if row_keys is not None:
        row_key = tl.load(row_keys + row, mask=rows < queries, other=0).to(tl.uint32, bitcast=True)

    held = hold(q, q_n, queries - n, BLOCK_N, D, D_CHUNK, D_COUNT, D_TAIL, HOLD)
    sums = zeros(BLOCK_N, V_CHUNK, V_COUNT, V_TAIL)
    peak = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for m in tl.range(first, last, BLOCK_M):
        at = tl.cast(m, tl.int64)
        k_tile, v_tile = k + at * k_m, v + at * v_m
        s = product(
            q, q_n, queries - n, held, k_tile, k_m, tokens - m,
            BLOCK_N, BLOCK_M, D, D_CHUNK, D_COUNT, D_TAIL, HOLD, EVEN,
        )  # fmt: skip
        token = m + tl.arange(0, BLOCK_M)
        if mask is not None or not EVEN:
            s = tl.where(visible(mask, token, tokens, EVEN)[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.ceil(tl.max(s, 1) * log2_scale))
        p = tl.math.exp2(s * log2_scale - higher[:, None])
        fade = power_of_two(peak - higher)
        total = total * fade + tl.sum(p, 1)
        peak = higher
        if row_keys is not None:  # after the sum: the log-sum-exp is that of all weights
            token_key = tl.load(token_keys + token, mask=token < tokens, other=0).to(tl.uint32, bitcast=True)
            kept = drop.keep(row_key[:, None], token_key[None, :], threshold)
            p = tl.where(kept, p, 0.0)
        sums = accumulate(
            scaled(sums, fade), p, v_tile, v_m, tokens - m, V - channel,
            BLOCK_M, V_CHUNK, V_COUNT, V_TAIL, EVEN, GROUPS * V_COUNT * V_CHUNK <= V,
        )  # fmt: skip

    if SPLIT:
        at = (split.to(tl.int64) * (tl.num_programs(0) // (blocks * GROUPS * splits)) + head) * queries
        factor = keep_scale
        if group == 0:
            tl.store(peaks + at + rows, peak, mask=rows < queries)
            tl.store(totals + at + rows, total, mask=rows < queries)
    else:
        at = head.to(tl.int64) * queries
        factor = (keep_scale / total)[:, None]
        if group == 0:
            natural = (peak.to(tl.float64) + tl.math.log2(total).to(tl.float64)) * LN_2
            tl.store(lse + at + rows, natural, mask=rows < queries)
    store(
        sums, o + (at + n) * V + channel, V, queries - n, V - channel, factor, None, BLOCK_N, V_CHUNK, V_COUNT, V_TAIL
    )


@triton.jit
def cross_attention_merge_kernel(
    parts, peaks, totals, o, lse, rows, splits, blocks,
    V: tl.constexpr, BLOCK_V: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """``sum_s 2^(peak_s - peak) (o_s, total_s)``, in the order of the splits, and o divided by the total."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    column = pid % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    peak = tl.full([], LOWEST, tl.float32)
    for s in tl.range(0, splits, MERGED):
        split = s + tl.arange(0, MERGED)
        peak = tl.maximum(
            peak, tl.max(tl.load(peaks + split.to(tl.int64) * rows + row, mask=split < splits, other=LOWEST))
        )
    sums = tl.zeros([BLOCK_V], tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for s in tl.range(0, splits, MERGED):
        split = s + tl.arange(0, MERGED)
        at, there = split.to(tl.int64) * rows + row, split < splits
        weight = tl.math.exp2(tl.load(peaks + at, mask=there, other=LOWEST) - peak)
        total += tl.sum(weight * tl.load(totals + at, mask=there, other=0.0))
        part = tl.load(parts + at[:, None] * V + column, mask=there[:, None] & (column < V), other=0.0)
        sums += tl.sum(part * weight[:, None], 0)
    tl.store(o + row * V + column, (sums / total).to(o.dtype.element_ty), mask=column < V)
    if pid % blocks == 0:
        tl.store(lse + row, (peak.to(tl.float64) + tl.math.log2(total).to(tl.float64)) * LN_2)


def variant(kernel: str, dtype: torch.dtype, channels: int, arch: int) -> Config:
    """The configuration of a kernel whose widest matrix has ``channels``.

    Of fp32 no tile has 64 rows on sm_100: Triton 3.7 would put its products on tensor cores, "ieee" or not.
    """
    if dtype == torch.float32:
        return config(f"cross_attention_{kernel}[fp32]", arch)
    width = next((str(width) for width in (64, NARROW) if channels <= width), "wide")
    return config(f"cross_attention_{kernel}[half, {width}]", arch)


def read(channels: int, dtype: torch.dtype) -> Pieces:
    """How the channels of scores are cut: wide ones are streamed, in small pieces."""
    return cut(channels, 64 if channels <= NARROW and dtype != torch.float32 else 32)


def summed(channels: int, dtype: torch.dtype, dropout: float, arch: int) -> Pieces:
    """How the channels of sums are cut: all that registers hold, which is less of fp32, and less with dropout's hashes.

    From sm_100 on ptxas needs some more, where tiles are too small for that architecture's own tensor memory.
    """
    if dtype == torch.float32:
        return cut(channels, 32, 128)
    return cut(channels, 64, 192 if dropout or arch >= 100 else 256)


def common(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, seed: Tensor | None
) -> tuple[list[Launch], dict[str, object]]:
    """What precedes every pass, and the arguments that all of them take. ``q``, ``k`` and ``v`` have aligned rows."""
    (batch, heads, queries, dim), (tokens, value_dim) = q.shape, v.shape[2:]
    rows, first, keys = batch * heads * queries, [], dict(row_keys=None, token_keys=None)
    if dropout > 0:
        keys = {n: q.new_empty(size, dtype=torch.int32) for n, size in (("row_keys", rows), ("token_keys", tokens))}
        numbers = dict(seed=seed, rows=rows, tokens=tokens, BLOCK=256)
        first.append(Launch(cross_attention_keys_kernel, triton.cdiv(max(rows, tokens), 256), keys | numbers))
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    cut_d, cut_v = read(dim, q.dtype), read(value_dim, q.dtype)
    arguments = dict(
        q=q, k=k, v=v, mask=mask, heads=heads, queries=queries, tokens=tokens,
        mask_b=0 if mask is None else mask.stride(0),
        log2_scale=scale * LOG2_E, keep_scale=dropout_scale(dropout),
        threshold=drop.threshold_bits(dropout),
        D=dim, D_CHUNK=cut_d.chunk, D_COUNT=cut_d.count, D_TAIL=cut_d.tail,
        V=value_dim, V_CHUNK=cut_v.chunk, V_COUNT=cut_v.count, V_TAIL=cut_v.tail,
    )  # fmt: skip
    return first, arguments | keys | strides("q", "bhn", q) | strides("k", "bhm", k) | strides("v", "bhm", v)


def forward_launches(q, k, v, mask, scale, dropout, seed, arch: int) -> tuple[Tensor, Tensor, list[Launch]]:
    """``o``, ``lse`` and the launches that compute them."""
    q, k, v = (aligned_rows(t) for t in (q, k, v))
    (batch, heads, queries, dim), (tokens, value_dim) = q.shape, v.shape[2:]
    o, lse = q.new_empty(batch, heads, queries, value_dim), q.new_empty(batch, heads, queries, dtype=torch.float64)
    rows = lse.numel()
    if rows == 0:
        return o, lse, []
    c = variant("forward", q.dtype, max(dim, value_dim), arch)
    cut_v = summed(value_dim, q.dtype, dropout, arch)
    blocks = triton.cdiv(queries, c.queries)
    programs = batch * heads * blocks * cut_v.groups
    splits, each = share(tokens, c.tokens, programs, q.device)
    parts, peaks, totals = o, None, None
    if splits > 1:
        parts = o.new_empty(splits, rows, value_dim, dtype=torch.float32)
        peaks, totals = (parts.new_empty(splits, rows) for _ in range(2))
    hold = dim <= (64 if q.dtype == torch.float32 else NARROW)
    launches, arguments = common(q, k, v, mask, scale, dropout, seed)
    arguments |= dict(
        o=parts, lse=lse, peaks=peaks, totals=totals, blocks=blocks, splits=splits, tokens_per_split=each,
        V_CHUNK=cut_v.chunk, V_COUNT=cut_v.count, V_TAIL=cut_v.tail, GROUPS=cut_v.groups,
        BLOCK_N=c.queries, BLOCK_M=c.tokens, SPLIT=splits > 1, HOLD=hold, EVEN=tokens % c.tokens == 0,
    )  # fmt: skip
    launches.append(Launch(cross_attention_fwd_kernel, programs * splits, arguments, c, c.queries * c.tokens))
    if splits > 1:
        width = min(128, triton.next_power_of_2(value_dim))
        across = triton.cdiv(value_dim, width)
        merge = dict(parts=parts, peaks=peaks, totals=totals, o=o, lse=lse, rows=rows, splits=splits, blocks=across)
        merge |= dict(V=value_dim, BLOCK_V=width, MERGED=MERGED)
        launches.append(Launch(cross_attention_merge_kernel, rows * across, merge))
    return o, lse, launches


def check(q: Tensor, v: Tensor, scale: float, inverted: bool) -> None:
    """What :func:`perceiver_fast.ops.cross_attention.cross_attention` sees to, of those who call the ops themselves."""
    if inverted:
        raise RuntimeError("cross_attention: the Triton kernels expected a softmax over tokens, got inverted attention")
    if not scale > 0:
        raise RuntimeError(f"cross_attention: the Triton kernels expected a positive scale, got {scale}")
    if v.shape[3] == 0:
        raise RuntimeError("cross_attention: the Triton kernels expected values of at least one channel, got none")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(f"cross_attention: the Triton kernels expected float32, bfloat16 or float16, got {q.dtype}")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    inverted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of the op ``cross_attention_forward``; the last result is empty."""
    check(q, v, scale, inverted)
    o, lse, launches = forward_launches(q, k, v, mask, scale, dropout, seed, architecture(q.device))
    for launch in launches:
        launch.run()
    return o, lse, lse.new_empty(0)
