"""Backward of streaming attention: the weights are computed again from the log-sum-exp.

    P = 2^(log2(e) (S - lse)),    dP = d_o v^T,    dS = P (dP - delta),    delta = sum d_o o - d_lse
    dv = P^T d_o,    dk = scale dS^T q,    dq = scale dS k

One kernel owns queries and walks over tokens for dq, another owns tokens and walks over queries for dk and dv; sums that
were split are added up in order, so that results are the same bits every time. Every matrix is read as it lies.

dS sums to d_lse over the tokens. What is left beside that is the error of delta, which came from rounded outputs. Beside
weights' gradients of ordinary size it is nothing; where softmax is saturated they are tiny, and in fp32 delta is set
right before dk is computed, and the blocks of queries concerned compute dq once more. Which, the GPU decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.gpu import architecture
from perceiver_fast.kernels import dropout as drop
from perceiver_fast.kernels.cross_attention import MERGED, check, common, summed, variant, visible
from perceiver_fast.kernels.dense_tiles import Pieces, accumulate, hold, load, product, store, zeros
from perceiver_fast.kernels.launch import Launch, aligned_rows, share, strides

LOG2_E = tl.constexpr(1.4426950408889634)
TOLERANCE = tl.constexpr(16 * 2.0**-23)  # of a row's sum of dS, in units of its sum of magnitudes


@triton.jit
def cross_attention_terms_kernel(
    d_o, d_lse, o, lse, shift, weight, delta, heads, queries, blocks, g_b, g_h, g_n,
    V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Per query delta, and its log-sum-exp as a whole number and a factor: P = 2^(log2(e) S - shift) weight.

    A float32 of a large log-sum-exp would be wrong by more than a weight can bear.
    """
    pid = tl.program_id(0)
    head, n = (pid // blocks).to(tl.int64), pid % blocks * BLOCK_N
    rows = n + tl.arange(0, BLOCK_N)
    at, there = head * queries + rows, rows < queries
    d_o += head // heads * g_b + head % heads * g_h + tl.cast(n, tl.int64) * g_n
    o += (head * queries + n) * V
    total = tl.zeros([BLOCK_N], tl.float32)
    for channel in tl.range(0, V, BLOCK_V):
        x = load(d_o, g_n, queries - n, channel, V, BLOCK_N, BLOCK_V, False, False).to(tl.float32)
        y = load(o, V, queries - n, channel, V, BLOCK_N, BLOCK_V, False, False).to(tl.float32)
        total += tl.sum(x * y, 1)
    if d_lse is not None:
        total -= tl.load(d_lse + at, mask=there, other=0.0).to(tl.float32)
    exact = tl.load(lse + at, mask=there, other=0.0) * LOG2_E
    whole = tl.floor(exact).to(tl.float32)  # the nearest float32 where there are none of its size between whole numbers
    tl.store(shift + at, whole, mask=there)
    tl.store(weight + at, tl.math.exp2((whole.to(tl.float64) - exact).to(tl.float32)), mask=there)
    tl.store(delta + at, total, mask=there)


@triton.jit(do_not_specialize=["threshold"])
def cross_attention_dq_kernel(
    q, k, v, d_o, mask, row_keys, token_keys, shift, weight, delta, flags, dq, residues, sizes,
    heads, queries, tokens, blocks, splits, tokens_per_split,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, g_b, g_h, g_n, mask_b,
    log2_scale, scale, threshold, keep_scale,
    D: tl.constexpr, D_CHUNK: tl.constexpr, D_COUNT: tl.constexpr, D_TAIL: tl.constexpr,
    V: tl.constexpr, V_CHUNK: tl.constexpr, V_COUNT: tl.constexpr, V_TAIL: tl.constexpr,
    CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    HOLD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, a split of the tokens and a group of channels; with ``flags``, of the blocks flagged.

    ``residues`` and ``sizes`` get every row's sum of dS and of its magnitudes.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    group = pid // blocks % GROUPS
    split = pid // (blocks * GROUPS) % splits
    head = pid // (blocks * GROUPS) // splits
    if flags is not None:
        if tl.load(flags + head * blocks + block) == 0:
            return
    b, h, n = (head // heads).to(tl.int64), (head % heads).to(tl.int64), block * BLOCK_N
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    channel = group * (COUNT * CHUNK + TAIL)

    rows = n + tl.arange(0, BLOCK_N)
    row, there = head.to(tl.int64) * queries + rows, rows < queries
    at = tl.cast(n, tl.int64)
    q += b * q_b + h * q_h + at * q_n
    d_o += b * g_b + h * g_h + at * g_n
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    if mask is not None:
        mask += b * mask_b
    if row_keys is not None:
        row_key = tl.load(row_keys + row, mask=there, other=0).to(tl.uint32, bitcast=True)
    row_shift = tl.load(shift + row, mask=there, other=0.0)[:, None]
    row_weight = tl.load(weight + row, mask=there, other=0.0)[:, None]
    row_delta = tl.load(delta + row, mask=there, other=0.0)[:, None]

    left = queries - n
    held_q = hold(q, q_n, left, BLOCK_N, D, D_CHUNK, D_COUNT, D_TAIL, HOLD)
    held_g = hold(d_o, g_n, left, BLOCK_N, V, V_CHUNK, V_COUNT, V_TAIL, HOLD)
    sums = zeros(BLOCK_N, CHUNK, COUNT, TAIL)
    residue = tl.zeros([BLOCK_N], tl.float32)
    size = tl.zeros([BLOCK_N], tl.float32)
    for m in tl.range(first, last, BLOCK_M):
        at = tl.cast(m, tl.int64)
        k_tile, v_tile = k + at * k_m, v + at * v_m
        s = product(
            q, q_n, left, held_q, k_tile, k_m, tokens - m,
            BLOCK_N, BLOCK_M, D, D_CHUNK, D_COUNT, D_TAIL, HOLD, EVEN,
        )  # fmt: skip
        dp = product(
            d_o, g_n, left, held_g, v_tile, v_m, tokens - m,
            BLOCK_N, BLOCK_M, V, V_CHUNK, V_COUNT, V_TAIL, HOLD, EVEN,
        )  # fmt: skip
        token = m + tl.arange(0, BLOCK_M)
        if mask is not None or not EVEN:
            s = tl.where(visible(mask, token, tokens, EVEN)[None, :], s, float("-inf"))
        if row_keys is not None:
            token_key = tl.load(token_keys + token, mask=token < tokens, other=0).to(tl.uint32, bitcast=True)
            kept = drop.keep(row_key[:, None], token_key[None, :], threshold)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = tl.math.exp2(s * log2_scale - row_shift) * row_weight * (dp - row_delta)
        if residues is not None:
            residue += tl.sum(ds, 1)
            size += tl.sum(tl.abs(ds), 1)
        sums = accumulate(
            sums, ds, k_tile + channel, k_m, tokens - m, D - channel,
            BLOCK_M, CHUNK, COUNT, TAIL, EVEN, GROUPS * COUNT * CHUNK <= D,
        )  # fmt: skip

    part = split.to(tl.int64) * (tl.num_programs(0) // (blocks * GROUPS * splits)) * queries
    if residues is not None:
        if group == 0:
            tl.store(residues + part + row, residue, mask=there)
            tl.store(sizes + part + row, size, mask=there)
    out = dq + (part + head.to(tl.int64) * queries + n) * D + channel
    store(sums, out, D, left, D - channel, scale, None, BLOCK_N, CHUNK, COUNT, TAIL)


@triton.jit
def cross_attention_settle_kernel(
    residues, sizes, d_lse, delta, flags, queries, blocks, splits, rows, BLOCK_N: tl.constexpr
):
    """Take out of delta what dS says it is wrong by, where that matters, and flag the blocks of queries concerned."""
    pid = tl.program_id(0)
    row = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    at, there = (pid // blocks).to(tl.int64) * queries + row, row < queries
    error = tl.zeros([BLOCK_N], tl.float32)
    size = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.range(0, splits):
        part = tl.cast(split, tl.int64) * rows + at
        error += tl.load(residues + part, mask=there, other=0.0)
        size += tl.load(sizes + part, mask=there, other=0.0)
    if d_lse is not None:
        error -= tl.load(d_lse + at, mask=there, other=0.0).to(tl.float32)
    wrong = tl.abs(error) > size * TOLERANCE
    tl.store(delta + at, tl.load(delta + at, mask=there, other=0.0) + error, mask=there & wrong)
    tl.store(flags + pid, tl.max(wrong.to(tl.int32)))


@triton.jit(do_not_specialize=["threshold"])
def cross_attention_dkv_kernel(
    q, k, v, d_o, mask, row_keys, token_keys, shift, weight, delta, dk, dv,
    heads, queries, tokens, blocks, splits, queries_per_split,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, g_b, g_h, g_n, mask_b,
    log2_scale, scale, threshold, keep_scale,
    D: tl.constexpr, D_CHUNK: tl.constexpr, D_COUNT: tl.constexpr, D_TAIL: tl.constexpr,
    V: tl.constexpr, V_CHUNK: tl.constexpr, V_COUNT: tl.constexpr, V_TAIL: tl.constexpr,
    K_SUM: tl.constexpr, K_SUMS: tl.constexpr, K_REST: tl.constexpr,
    V_SUM: tl.constexpr, V_SUMS: tl.constexpr, V_REST: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    HOLD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dk, dv or both (what is not None) of a block of tokens, a split of the queries and a group of channels.

    Tiles are ``[tokens, queries]``, so that P^T and dS^T are what the products want. A token's sums are its own: those of
    masked ones are thrown away at the end. Queries beyond the last have weight zero.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    group = pid // blocks % GROUPS
    split = pid // (blocks * GROUPS) % splits
    head = pid // (blocks * GROUPS) // splits
    b, h, m = (head // heads).to(tl.int64), (head % heads).to(tl.int64), block * BLOCK_M
    first = split * queries_per_split
    last = tl.minimum(first + queries_per_split, queries)
    k_channel, v_channel = group * (K_SUMS * K_SUM + K_REST), group * (V_SUMS * V_SUM + V_REST)

    token = m + tl.arange(0, BLOCK_M)
    seen = None
    if mask is not None:
        seen = visible(mask + b * mask_b, token, tokens, False)
    if row_keys is not None:
        token_key = tl.load(token_keys + token, mask=token < tokens, other=0).to(tl.uint32, bitcast=True)
    at = tl.cast(m, tl.int64)
    k += b * k_b + h * k_h + at * k_m
    v += b * v_b + h * v_h + at * v_m
    q += b * q_b + h * q_h
    d_o += b * g_b + h * g_h

    left = tokens - m
    held_k = hold(k, k_m, left, BLOCK_M, D, D_CHUNK, D_COUNT, D_TAIL, HOLD)
    held_v = ()
    if dk is not None:
        held_v = hold(v, v_m, left, BLOCK_M, V, V_CHUNK, V_COUNT, V_TAIL, HOLD)
        k_sums = zeros(BLOCK_M, K_SUM, K_SUMS, K_REST)
    if dv is not None:
        v_sums = zeros(BLOCK_M, V_SUM, V_SUMS, V_REST)
    for n in tl.range(first, last, BLOCK_N):
        at = tl.cast(n, tl.int64)
        q_tile, g_tile = q + at * q_n, d_o + at * g_n
        rows = n + tl.arange(0, BLOCK_N)
        row, there = head.to(tl.int64) * queries + rows, rows < queries
        s = product(
            k, k_m, left, held_k, q_tile, q_n, queries - n,
            BLOCK_M, BLOCK_N, D, D_CHUNK, D_COUNT, D_TAIL, HOLD, EVEN,
        )  # fmt: skip
        p = tl.math.exp2(s * log2_scale - tl.load(shift + row, mask=there, other=0.0)[None, :])
        p = p * tl.load(weight + row, mask=there, other=0.0)[None, :]
        if row_keys is not None:
            row_key = tl.load(row_keys + row, mask=there, other=0).to(tl.uint32, bitcast=True)
            kept = drop.keep(row_key[None, :], token_key[:, None], threshold)
        if dv is not None:
            dropped = p
            if row_keys is not None:
                dropped = tl.where(kept, p, 0.0)
            v_sums = accumulate(
                v_sums, dropped, g_tile + v_channel, g_n, queries - n, V - v_channel,
                BLOCK_N, V_SUM, V_SUMS, V_REST, EVEN, GROUPS * V_SUMS * V_SUM <= V,
            )  # fmt: skip
        if dk is not None:
            dp = product(
                v, v_m, left, held_v, g_tile, g_n, queries - n,
                BLOCK_M, BLOCK_N, V, V_CHUNK, V_COUNT, V_TAIL, HOLD, EVEN,
            )  # fmt: skip
            if row_keys is not None:
                dp = tl.where(kept, dp * keep_scale, 0.0)
            ds = p * (dp - tl.load(delta + row, mask=there, other=0.0)[None, :])
            k_sums = accumulate(
                k_sums, ds, q_tile + k_channel, q_n, queries - n, D - k_channel,
                BLOCK_N, K_SUM, K_SUMS, K_REST, EVEN, GROUPS * K_SUMS * K_SUM <= D,
            )  # fmt: skip

    out = (split.to(tl.int64) * (tl.num_programs(0) // (blocks * GROUPS * splits)) + head) * tokens + m
    if dk is not None:
        store(k_sums, dk + out * D + k_channel, D, left, D - k_channel, scale, seen, BLOCK_M, K_SUM, K_SUMS, K_REST)
    if dv is not None:
        store(
            v_sums, dv + out * V + v_channel, V, left, V - v_channel, keep_scale, seen, BLOCK_M, V_SUM, V_SUMS, V_REST
        )


@triton.jit
def cross_attention_add_kernel(parts, out, count, splits, BLOCK: tl.constexpr, MERGED: tl.constexpr):
    """``out = sum_s parts[s]``, in the order of the splits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.range(0, splits, MERGED):
        split = (s + tl.arange(0, MERGED)).to(tl.int64)[:, None]
        part = tl.load(parts + split * count + i[None, :], mask=(split < splits) & (i < count)[None, :], other=0.0)
        total += tl.sum(part, 0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


def _summing(prefix: tuple[str, str, str], cut: Pieces) -> dict[str, int]:
    return dict(zip(prefix, (cut.chunk, cut.count, cut.tail)))


def _split(out: Tensor, splits: int) -> tuple[Tensor, list[Launch]]:
    """Where ``splits`` programs leave their parts of ``out``, and the launches that add them up."""
    if splits == 1:
        return out, []
    parts = out.new_empty(splits, *out.shape, dtype=torch.float32)
    numbers = dict(parts=parts, out=out, count=out.numel(), splits=splits, BLOCK=128, MERGED=MERGED)
    return parts, [Launch(cross_attention_add_kernel, triton.cdiv(out.numel(), 128), numbers)]


def backward_launches(
    d_o, d_lse, q, k, v, mask, scale, dropout, seed, o, lse, arch: int
) -> tuple[Tensor, Tensor, Tensor, list[Launch]]:
    """The gradients and the launches that compute them."""
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    q, k, v, d_o = (aligned_rows(t) for t in (q, k, v, d_o))
    (batch, heads, queries, dim), (tokens, value_dim) = q.shape, v.shape[2:]
    rows, pairs, dtype = lse.numel(), batch * heads, q.dtype
    if rows == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), []
    d_lse = None if d_lse is None else d_lse.contiguous()
    wide = max(dim, value_dim)
    narrow = wide <= 64
    shift, weight, delta = lse.new_empty(3, rows, dtype=torch.float32)
    launches, arguments = common(q, k, v, mask, scale, dropout, seed)
    arguments |= dict(
        d_o=d_o, shift=shift, weight=weight, delta=delta, scale=scale, HOLD=narrow and dtype != torch.float32
    )
    arguments |= strides("g", "bhn", d_o)
    terms = dict(d_o=d_o, d_lse=d_lse, o=o.contiguous(), lse=lse, shift=shift, weight=weight, delta=delta)
    terms |= dict(heads=heads, queries=queries, blocks=triton.cdiv(queries, 16), V=value_dim, BLOCK_N=16, BLOCK_V=64)
    terms |= strides("g", "bhn", d_o)
    launches.append(Launch(cross_attention_terms_kernel, pairs * terms["blocks"], terms))

    c = variant("dq", dtype, wide, arch)
    cut = summed(dim, dtype, dropout, arch)
    blocks = triton.cdiv(queries, c.queries)
    programs = pairs * blocks * cut.groups
    splits, each = share(tokens, c.tokens, programs, q.device)
    parts, adding = _split(dq, splits)
    flags, residues, sizes = None, None, None
    if dtype == torch.float32:
        flags = lse.new_ones(pairs * blocks, dtype=torch.int32)
        residues, sizes = lse.new_empty(2, splits, rows, dtype=torch.float32)
    for_queries = arguments | _summing(("CHUNK", "COUNT", "TAIL"), cut) | dict(
        flags=flags, dq=parts, residues=residues, sizes=sizes, blocks=blocks, splits=splits, tokens_per_split=each,
        GROUPS=cut.groups, BLOCK_N=c.queries, BLOCK_M=c.tokens, EVEN=tokens % c.tokens == 0,
    )  # fmt: skip
    walk = Launch(cross_attention_dq_kernel, programs * splits, for_queries, c, c.queries * c.tokens)
    launches.append(walk)
    if flags is not None:
        settle = dict(residues=residues, sizes=sizes, d_lse=d_lse, delta=delta, flags=flags)
        settle |= dict(queries=queries, blocks=blocks, splits=splits, rows=rows, BLOCK_N=c.queries)
        launches += [Launch(cross_attention_settle_kernel, pairs * blocks, settle), walk]
    launches += adding

    c = variant("dkv", dtype, wide, arch)
    cut_k, cut_v = (summed(channels, dtype, dropout, arch) for channels in (dim, value_dim))
    blocks = triton.cdiv(tokens, c.tokens)
    # Both in one walk if a thread holds the sums of both; else P is computed for each.
    for out_k, out_v in ((dk, dv),) if narrow else ((None, dv), (dk, None)):
        groups = max(cut.groups for cut, out in ((cut_k, out_k), (cut_v, out_v)) if out is not None)
        programs = pairs * blocks * groups
        splits, each = share(queries, c.queries, programs, q.device)
        (parts_k, adding_k), (parts_v, adding_v) = (
            (None, []) if out is None else _split(out, splits) for out in (out_k, out_v)
        )
        for_tokens = arguments | _summing(("K_SUM", "K_SUMS", "K_REST"), cut_k) | dict(
            dk=parts_k, dv=parts_v, blocks=blocks, splits=splits, queries_per_split=each, GROUPS=groups,
            BLOCK_N=c.queries, BLOCK_M=c.tokens, EVEN=queries % c.queries == 0,
        )  # fmt: skip
        for_tokens |= _summing(("V_SUM", "V_SUMS", "V_REST"), cut_v)
        launches.append(Launch(cross_attention_dkv_kernel, programs * splits, for_tokens, c, c.queries * c.tokens))
        launches += adding_k + adding_v
    return dq, dk, dv, launches


def backward(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    inverted: bool,
    o: Tensor,
    lse: Tensor,
    token_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of the op ``cross_attention_backward``."""
    check(q, v, scale, inverted)
    arch = architecture(q.device)
    *grads, launches = backward_launches(d_o, d_lse, q, k, v, mask, scale, dropout, seed, o, lse, arch)
    for launch in launches:
        launch.run()
    return tuple(grads)
