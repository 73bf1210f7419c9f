"""Forward of streaming attention on built keys and values.

A program owns a block of queries of one head and a split of the tokens, and keeps the running maximum, sum and output
of its softmax (Milakov and Gimelshein 2018; Dao et al. 2022), in units of log2:

    s = scale log2(e) q k^T,    peak' = max(peak, ceil(max s)),    p = 2^(s - peak')
    (total, o)' = 2^(peak - peak') (total, o) + p (1, v)

A peak that is a whole number makes the fading of earlier sums exact. One multiply-add makes the exponent of p, so that
p is exact however large s is, as long as rounding the peak leaves p within fp32: up to logits of 1e9.

With few queries the tokens are split until the GPU is full, and a second kernel merges the splits. Half precision goes
to the tensor cores as it is, with p rounded to it; scores, softmax and sums are fp32. fp32 is multiplied in fp32
("ieee"): three TF32 products would do for one tile, but tensor cores truncate as they add, and over tens of thousands
of tokens that exceeds the error of plain fp32.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.gpu import architecture
from perceiver_fast.kernels.base2 import LN_2, LOG2_E
from perceiver_fast.kernels.checks import HALF_OR_FLOAT, Check
from perceiver_fast.kernels.configs import MOST, Config, config
from perceiver_fast.kernels.cross_attention_inverted import LOG_EPS, LOG_TINY, token_terms
from perceiver_fast.kernels.dense_tiles import Pieces, accumulate, cut, hold, place, product, scaled, store, zeros
from perceiver_fast.kernels.dropout import cross_attention_hashes_kernel, dropout_keep, threshold_bits, two_numbers
from perceiver_fast.kernels.launch import Launch, aligned_rows, share, strides
from perceiver_fast.reference.dropout import dropout_scale

CHECK = Check("cross_attention")
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: below every logit, and finite, so that differences are no NaN
NARROW = 128  # up to so many channels a program holds its tile of queries, and takes the configuration for narrow heads
MERGED = 16  # splits that a program of the merges reads at a time


@triton.jit
def visible(mask, token, tokens, EVEN: tl.constexpr):
    """Whether tokens are there and not masked: ``[M]`` bool, for token indices ``[M]``.

    ``mask`` points to a batch element's bool ``[tokens]``, or is None. EVEN: no index is beyond the last token; else
    those are read as False.
    """
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


@triton.jit
def normaliser(peak, total, INVERTED: tl.constexpr):
    """Natural logarithm, fp64, of ``2^peak total``, and the factor that divides by it what is summed in units of 2^peak.

    INVERTED: the factor divides by EPS at least, as torch.nn.functional.normalize does. The logarithm is of the sum itself:
    a part of the tokens may have a smaller one than all of them.
    """
    natural = (peak.to(tl.float64) + tl.math.log2(total).to(tl.float64)) * LN_2
    inverse = 1.0 / total
    if INVERTED:
        inverse = tl.where(natural <= LOG_EPS, tl.math.exp2(peak - LOG_EPS * LOG2_E), inverse)  # NaN stays NaN
        natural = tl.where(natural <= LOG_TINY, LOG_TINY, natural)
    return natural, inverse


@triton.jit(do_not_specialize=["threshold"])
def cross_attention_fwd_kernel(
    q, k, v, mask, row_hashes, token_hashes, token_shift, token_weight, o, lse, peaks, totals,
    heads, queries, tokens, blocks, splits, tokens_per_split,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, mask_b,
    log2_scale, threshold, keep_scale,
    D: tl.constexpr, D_CHUNK: tl.constexpr, D_COUNT: tl.constexpr, D_TAIL: tl.constexpr,
    V: tl.constexpr, V_CHUNK: tl.constexpr, V_COUNT: tl.constexpr, V_TAIL: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr, HOLD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a block of queries of one head, over a split of the tokens.

        s = log2_scale q k^T,    p = 2^(s - peak),    total = sum_m p
        o = keep_scale sum_m keep p v / total,    lse = ln(2) (peak + log2(total))

    Inverted, with every token's log-sum-exp over the queries (cross_attention_inverted.py), p = 2^(s - token_shift - peak)
    token_weight, and the total is at least that of EPS.

    Grid: ``blocks * GROUPS * splits * B * H`` programs, see dense_tiles.place. One computes BLOCK_N queries, for one
    group of the channels of v; weights are computed again for every group.

        q              [B, H, N, D]     in   fp32, fp16 or bf16: the dtype of all; strides q_b, q_h, q_n
        k              [B, H, M, D]     in   dtype of q; strides k_b, k_h, k_m
        v              [B, H, M, V]     in   dtype of q; strides v_b, v_h, v_m; channels of all three are dense
        mask           [B, M]           in   bool, stride mask_b, tokens dense; or None. False: a logit of -inf
        row_hashes     [B H N]          in   int32, or None without dropout
        token_hashes   [M]              in   int32, or None without dropout
        token_shift    [B H M]          in   fp32, as token_weight, of cross_attention_tokens_kernel; both None unless inverted
        o              [B, H, N, V]     out  dtype of q, dense; SPLIT: fp32 [splits, B H N, V], not yet divided
        lse            [B H N]          out  fp64, natural logarithm; not written if SPLIT
        peaks, totals  [splits, B H N]  out  fp32, if SPLIT, else None: largest s, rounded up, and sum of p

        heads, queries, tokens    H, N, M
        blocks                    of BLOCK_N queries
        splits, tokens_per_split  how the tokens are cut; whole tiles but for the last split
        log2_scale                scale log2(e), positive
        threshold, keep_scale     of dropout: p 2^32, and 1 / (1 - p)

        D, D_CHUNK, D_COUNT, D_TAIL          channels of q and k, and how they are cut: dense_tiles.Pieces
        V, V_CHUNK, V_COUNT, V_TAIL, GROUPS  channels of v, and how a group of them is cut
        BLOCK_N, BLOCK_M                     tile of weights, queries x tokens
        SPLIT                                there are several splits
        HOLD                                 q stays in registers; else it is read again for every tile of tokens
        EVEN                                 M is a multiple of BLOCK_M: no tile needs a bound

    Queries beyond the last read as zeros and are not written. Tokens beyond the last read as zeros and, like masked
    ones, get a logit of -inf and a weight of 0. Some token has to be left: a batch element that is all masked comes
    from the op unmasked, with zero queries.
    """
    block, group, split, head = place(tl.program_id(0), blocks, splits, GROUPS)
    n = block * BLOCK_N
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    channel = group * (V_COUNT * V_CHUNK + V_TAIL)

    rows = n + tl.arange(0, BLOCK_N)  # [BLOCK_N], within the head
    row = head.to(tl.int64) * queries + rows
    q += b * q_b + h * q_h + n.to(tl.int64) * q_n
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h + channel
    if mask is not None:
        mask += b * mask_b
    if row_hashes is not None:
        row_hash = tl.load(row_hashes + row, mask=rows < queries, other=0)

    held = hold(q, q_n, queries - n, BLOCK_N, D, D_CHUNK, D_COUNT, D_TAIL, HOLD)
    sums = zeros(BLOCK_N, V_CHUNK, V_COUNT, V_TAIL)  # of p v: V_COUNT times [BLOCK_N, V_CHUNK], [BLOCK_N, V_TAIL]
    peak = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for m in tl.range(first, last, BLOCK_M):
        at = tl.cast(m, tl.int64)
        k_tile, v_tile = k + at * k_m, v + at * v_m
        s = product(  # [BLOCK_N, BLOCK_M]
            q, q_n, queries - n, held, k_tile, k_m, tokens - m,
            BLOCK_N, BLOCK_M, D, D_CHUNK, D_COUNT, D_TAIL, HOLD, EVEN,
        )  # fmt: skip
        token = m + tl.arange(0, BLOCK_M)
        if mask is not None or not EVEN:
            s = tl.where(visible(mask, token, tokens, EVEN)[None, :], s, float("-inf"))
        if token_shift is None:
            higher = tl.maximum(peak, tl.ceil(tl.max(s, 1) * log2_scale))  # [BLOCK_N]
            p = tl.math.exp2(s * log2_scale - higher[:, None])
        else:
            token_row, there = head.to(tl.int64) * tokens + token, token < tokens
            s = s * log2_scale - tl.load(token_shift + token_row, mask=there, other=0.0)[None, :]
            higher = tl.maximum(peak, tl.ceil(tl.max(s, 1)))
            p = tl.math.exp2(s - higher[:, None]) * tl.load(token_weight + token_row, mask=there, other=0.0)[None, :]
        fade = power_of_two(peak - higher)  # [BLOCK_N]: what earlier sums are worth now
        total = total * fade + tl.sum(p, 1)
        peak = higher
        if row_hashes is not None:  # after the sum: the log-sum-exp is that of all weights
            token_hash = tl.load(token_hashes + token, mask=token < tokens, other=0)
            p = tl.where(dropout_keep(row_hash[:, None], token_hash[None, :], threshold), p, 0.0)
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
        natural, inverse = normaliser(peak, total, token_shift is not None)
        factor = (keep_scale * inverse)[:, None]
        if group == 0:
            tl.store(lse + at + rows, natural, mask=rows < queries)
    store(
        sums, o + (at + n) * V + channel, V, queries - n, V - channel, factor, None, BLOCK_N, V_CHUNK, V_COUNT, V_TAIL
    )


@triton.jit
def cross_attention_merge_kernel(
    parts, peaks, totals, o, lse, rows, splits, blocks,
    V: tl.constexpr, BLOCK_V: tl.constexpr, MERGED: tl.constexpr, INVERTED: tl.constexpr,
):  # fmt: skip
    """``(o, total) = sum_s 2^(peak_s - peak) (o_s, total_s)``, in the order of the splits, and o divided by the total.

    Grid: ``rows * blocks`` programs; one has BLOCK_V channels of one query row.

        parts          [splits, rows, V]  in   fp32, what cross_attention_fwd_kernel left in o
        peaks, totals  [splits, rows]     in   fp32; splits beyond the last read as LOWEST and 0, and weigh nothing
        o              [rows, V]          out  fp32, fp16 or bf16; channels beyond V are not written
        lse            [rows]             out  fp64, natural logarithm

        rows, splits     B H N, and how many splits there are
        blocks           of BLOCK_V channels
        V, BLOCK_V       channels of v, and how many of them a program has
        MERGED           splits read at a time
        INVERTED         the total is at least that of EPS
    """
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    column = pid % blocks * BLOCK_V + tl.arange(0, BLOCK_V)  # channels
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
        weight = tl.math.exp2(tl.load(peaks + at, mask=there, other=LOWEST) - peak)  # [MERGED]
        total += tl.sum(weight * tl.load(totals + at, mask=there, other=0.0))
        part = tl.load(parts + at[:, None] * V + column, mask=there[:, None] & (column < V), other=0.0)
        sums += tl.sum(part * weight[:, None], 0)
    natural, inverse = normaliser(peak, total, INVERTED)
    tl.store(o + row * V + column, (sums * inverse).to(o.dtype.element_ty), mask=column < V)
    if pid % blocks == 0:
        tl.store(lse + row, natural)


def variant(kernel: str, dtype: torch.dtype, channels: int, arch: int, inverted: bool = False) -> Config:
    """The configuration of a kernel ("forward", "dq" or "dkv") whose widest matrix has ``channels``.

    For fp32 the table has no tile of 64 rows on sm_100: Triton 3.7 would take tensor cores for it, "ieee" or not.
    Inverted, its bound on registers is lifted: the tokens' terms need some.
    """
    width = "fp32"
    if dtype != torch.float32:
        width = f"half, {next((str(width) for width in (64, NARROW) if channels <= width), 'wide')}"
    found = config(f"cross_attention_{kernel}[{width}]", arch)
    return replace(found, registers=MOST) if inverted else found


def read(channels: int, dtype: torch.dtype) -> Pieces:
    """How the channels that a product of rows sums over are cut: wide rows are streamed, in small pieces."""
    return cut(channels, 64 if channels <= NARROW and dtype != torch.float32 else 32)


def summed(channels: int, dtype: torch.dtype, dropout: float, arch: int) -> Pieces:
    """How the channels of what is summed are cut: into groups of as many as registers hold.

    Those are fewer in fp32, and fewer beside dropout's hashes. From sm_100 on they are fewer in any case: these tiles
    are too small for that architecture's tensor memory, and ptxas needs more registers for them than before.
    """
    if dtype == torch.float32:
        return cut(channels, 32, 128)
    return cut(channels, 64, 192 if dropout or arch >= 100 else 256)


def common(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, seed: Tensor | None
) -> tuple[list[Launch], dict[str, object]]:
    """The launches that come first, dropout's hashes, and the arguments that all passes take.

    ``q``, ``k`` and ``v`` have aligned rows; V_CHUNK, V_COUNT and V_TAIL cut the channels of v for a product of rows.
    """
    (batch, heads, queries, dim), (tokens, value_dim) = q.shape, v.shape[2:]
    rows, first, hashes = batch * heads * queries, [], dict(row_hashes=None, token_hashes=None)
    if dropout > 0:
        hashes = dict(zip(hashes, (q.new_empty(size, dtype=torch.int32) for size in (rows, tokens))))
        numbers = dict(seed=two_numbers(seed), rows=rows, tokens=tokens, BLOCK=256)
        first.append(Launch(cross_attention_hashes_kernel, triton.cdiv(max(rows, tokens), 256), hashes | numbers))
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    cut_d, cut_v = read(dim, q.dtype), read(value_dim, q.dtype)
    arguments = dict(
        q=q, k=k, v=v, mask=mask, heads=heads, queries=queries, tokens=tokens,
        mask_b=0 if mask is None else mask.stride(0),
        log2_scale=scale * LOG2_E.value, keep_scale=dropout_scale(dropout),
        threshold=threshold_bits(dropout),
        D=dim, D_CHUNK=cut_d.chunk, D_COUNT=cut_d.count, D_TAIL=cut_d.tail,
        V=value_dim, V_CHUNK=cut_v.chunk, V_COUNT=cut_v.count, V_TAIL=cut_v.tail,
    )  # fmt: skip
    return first, arguments | hashes | strides("q", "bhn", q) | strides("k", "bhm", k) | strides("v", "bhm", v)


def forward_launches(q, k, v, mask, scale, dropout, seed, arch: int) -> tuple[Tensor, Tensor, list[Launch]]:
    """``o [B, H, N, V]``, ``lse [B, H, N]`` and the launches that compute them, of attention that is not inverted."""
    o, lse, _, launches = all_launches(q, k, v, mask, scale, dropout, seed, arch)
    return o, lse, launches


def all_launches(
    q, k, v, mask, scale, dropout, seed, arch: int, inverted: bool = False
) -> tuple[Tensor, Tensor, Tensor, list[Launch]]:
    """``o [B, H, N, V]``, ``lse [B, H, N]``, token_lse, ``[B, H, M]`` or empty, and the launches that compute them.

    A token's log-sum-exp over the queries is a query's over the tokens with the two exchanged, and no values.
    """
    q, k, v = (aligned_rows(t) for t in (q, k, v))
    (batch, heads, queries, dim), (tokens, value_dim) = q.shape, v.shape[2:]
    o, lse = q.new_empty(batch, heads, queries, value_dim), q.new_empty(batch, heads, queries, dtype=torch.float64)
    rows = lse.numel()
    token_lse, first = lse.new_empty(0), []
    if inverted and rows > 0:
        _, token_lse, _, first = all_launches(k, q, q[..., :0], None, scale, 0.0, None, arch)
    elif inverted:
        token_lse = lse.new_empty(batch, heads, tokens).fill_(-math.inf)
    if rows == 0:
        return o, lse, token_lse, []
    c = variant("forward", q.dtype, max(dim, value_dim), arch, inverted)
    cut_v = summed(value_dim, q.dtype, dropout, arch)
    blocks = triton.cdiv(queries, c.queries)
    programs = batch * heads * blocks * cut_v.groups
    splits, each = share(tokens, c.tokens, programs, q.device)
    parts, peaks, totals = o, None, None
    if splits > 1:
        parts = o.new_empty(splits, rows, value_dim, dtype=torch.float32)
        peaks, totals = (parts.new_empty(splits, rows) for _ in range(2))
    hold = dim <= (64 if q.dtype == torch.float32 else NARROW)
    hashes, arguments = common(q, k, v, mask, scale, dropout, seed)
    terms, arrays = token_terms(token_lse if inverted else None, arguments)
    launches = first + hashes + terms
    arguments |= arrays | dict(
        o=parts, lse=lse, peaks=peaks, totals=totals, blocks=blocks, splits=splits, tokens_per_split=each,
        V_CHUNK=cut_v.chunk, V_COUNT=cut_v.count, V_TAIL=cut_v.tail, GROUPS=cut_v.groups,
        BLOCK_N=c.queries, BLOCK_M=c.tokens, SPLIT=splits > 1, HOLD=hold, EVEN=tokens % c.tokens == 0,
    )  # fmt: skip
    launches.append(Launch(cross_attention_fwd_kernel, programs * splits, arguments, c, c.queries * c.tokens))
    if splits > 1:
        width = min(128, triton.next_power_of_2(max(value_dim, 1)))
        across = triton.cdiv(max(value_dim, 1), width)
        merge = dict(parts=parts, peaks=peaks, totals=totals, o=o, lse=lse, rows=rows, splits=splits, blocks=across)
        merge |= dict(V=value_dim, BLOCK_V=width, MERGED=MERGED, INVERTED=inverted)
        launches.append(Launch(cross_attention_merge_kernel, rows * across, merge))
    return o, lse, token_lse, launches


def check(q, k, v, mask, scale, dropout, seed) -> None:
    """Raises what these kernels cannot take: the public function never asks for it, who calls the registered op may.

    Raises:
        RuntimeError: another dtype, rank or size, a scale that is not positive, or no channels.
    """
    CHECK.dtype("q", q, *HALF_OR_FLOAT)
    for name, t, form in (("q", q, "[B, H, N, d]"), ("k", k, "[B, H, M, d]"), ("v", v, "[B, H, M, dv]")):
        CHECK.rank(name, t, 4, form)
    (batch, heads, _, dim), tokens = q.shape, k.shape[2]
    CHECK.tensor("k", k, q.dtype, (batch, heads, tokens, dim), "[B, H, M, d] with q's B, H and d")
    CHECK.tensor("v", v, q.dtype, (batch, heads, tokens, v.shape[3]), "[B, H, M, dv] with q's B and H, k's M")
    CHECK.expect(dim > 0 and v.shape[3] > 0, "at least one channel of q and of v", f"{dim} and {v.shape[3]}")
    CHECK.expect(tokens > 0, "at least one token", "none")
    CHECK.tensor("mask", mask, torch.bool, (batch, tokens), "[B, M]")
    CHECK.expect(0 < scale < math.inf, "a positive scale", scale)
    CHECK.dropout(dropout, seed)


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
    """Kernel of the operator ``cross_attention_forward``.

    Args:
        q: ``[B, H, N, D]`` float32, bfloat16 or float16, of any strides, as k and v.
        k: ``[B, H, M, D]``, the dtype of q.
        v: ``[B, H, M, V]``, the dtype of q.
        mask: bool ``[B, M]``, False for tokens that get no weight, or None. No batch element is all False, but where
            attention is inverted.
        scale: of the logits, positive.
        dropout: probability of a weight being dropped.
        seed: int64 ``[1]``, or None without dropout.
        inverted: softmax over the queries, then normalised over the tokens.

    Returns:
        o ``[B, H, N, V]``, the dtype of q, lse ``[B, H, N]`` float64, and inverted the log-sum-exp of every token over
        the queries ``[B, H, M]`` float64, or else an empty tensor.

    Raises:
        RuntimeError: see :func:`check`.
    """
    check(q, k, v, mask, scale, dropout, seed)
    *results, launches = all_launches(q, k, v, mask, scale, dropout, seed, architecture(q.device), inverted)
    for launch in launches:
        launch.run()
    return tuple(results)
