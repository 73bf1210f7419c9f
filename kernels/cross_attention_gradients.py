"""Gradients of streaming attention: the two kernels that walk over all pairs of queries and tokens.

The formulas are those of cross_attention_backward.py, which launches them. One kernel owns queries and walks over
tokens for dq, the other owns tokens and walks over queries for dk and dv. No two programs write the same element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels.cross_attention import visible
from perceiver_fast.kernels.dense_tiles import accumulate, hold, place, product, store, zeros
from perceiver_fast.kernels.dropout import dropout_keep


@triton.jit(do_not_specialize=["threshold"])
def cross_attention_dq_kernel(
    q, k, v, d_o, mask, row_hashes, token_hashes, token_shift, token_weight, eta, eta_low, shift, weight, delta, flags,
    dq, residues, sizes,
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

        dq = scale sum_m dS k,    dS = 2^(log2_scale q k^T - shift) weight (keep keep_scale d_o v^T - delta)

    Inverted, dS = 2^(log2_scale q k^T - token_shift) token_weight (weight (keep keep_scale d_o v^T - delta) - eta - eta_low).

    Grid: ``blocks * GROUPS * splits * B * H`` programs, see dense_tiles.place.

        q .. token_weight                            in   as cross_attention_fwd_kernel takes them
        eta, eta_low          [B H M]                in   fp32, see cross_attention_inverted.py; or None: zero
        d_o                   [B, H, N, V]           in   dtype of q; strides g_b, g_h, g_n, channels dense
        shift, weight, delta  [B H N]                in   fp32, of cross_attention_terms_kernel
        flags                 [B H, blocks]          in   int32: 0 where nothing is to be done; or None: all is
        dq                    [splits, B, H, N, D]   out  dtype of q, or fp32 with several splits; dense; or None
        residues, sizes       [splits, B H N]        out  fp32: a row's sum of dS, and of its magnitudes; or both None

        heads, queries, tokens    H, N, M
        blocks                    of BLOCK_N queries
        splits, tokens_per_split  how the tokens are cut; whole tiles but for the last split
        log2_scale, scale         scale log2(e), and scale
        threshold, keep_scale     of dropout: p 2^32, and 1 / (1 - p)

        D, D_CHUNK, D_COUNT, D_TAIL  channels of q and k, and how they are cut for q k^T: dense_tiles.Pieces
        V, V_CHUNK, V_COUNT, V_TAIL  channels of v, and how they are cut for d_o v^T
        CHUNK, COUNT, TAIL, GROUPS   how the channels of dq are cut, of one group
        BLOCK_N, BLOCK_M     tile of weights, queries x tokens
        HOLD                 q and d_o stay in registers; else they are read again for every tile of tokens
        EVEN                 M is a multiple of BLOCK_M: no tile needs a bound

    Queries beyond the last have a weight of 0 and are not written. Masked tokens, and those beyond the last, have a
    logit of -inf and a weight of 0.
    """
    block, group, split, head = place(tl.program_id(0), blocks, splits, GROUPS)
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
    if row_hashes is not None:
        row_hash = tl.load(row_hashes + row, mask=there, other=0)
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
        s = product(  # [BLOCK_N, BLOCK_M]
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
        if row_hashes is not None:
            token_hash = tl.load(token_hashes + token, mask=token < tokens, other=0)
            keep = dropout_keep(row_hash[:, None], token_hash[None, :], threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        if token_shift is None:
            ds = tl.math.exp2(s * log2_scale - row_shift) * row_weight * (dp - row_delta)
        else:
            token_row, inside = head.to(tl.int64) * tokens + token, token < tokens
            x = row_weight * (dp - row_delta)
            if eta is not None:
                x -= tl.load(eta + token_row, mask=inside, other=0.0)[None, :]
            if eta_low is not None:
                x -= tl.load(eta_low + token_row, mask=inside, other=0.0)[None, :]
            a = tl.math.exp2(s * log2_scale - tl.load(token_shift + token_row, mask=inside, other=0.0)[None, :])
            ds = a * tl.load(token_weight + token_row, mask=inside, other=0.0)[None, :] * x
        if residues is not None:
            residue += tl.sum(ds, 1)
            size += tl.sum(tl.abs(ds), 1)
        if dq is not None:
            sums = accumulate(
                sums, ds, k_tile + channel, k_m, tokens - m, D - channel,
                BLOCK_M, CHUNK, COUNT, TAIL, EVEN, GROUPS * COUNT * CHUNK <= D,
            )  # fmt: skip

    part = split.to(tl.int64) * (tl.num_programs(0) // (blocks * GROUPS * splits)) * queries
    if residues is not None:
        if group == 0:
            tl.store(residues + part + row, residue, mask=there)
            tl.store(sizes + part + row, size, mask=there)
    if dq is not None:
        out = dq + (part + head.to(tl.int64) * queries + n) * D + channel
        store(sums, out, D, left, D - channel, scale, None, BLOCK_N, CHUNK, COUNT, TAIL)


@triton.jit(do_not_specialize=["threshold"])
def cross_attention_dkv_kernel(
    q, k, v, d_o, mask, row_hashes, token_hashes, token_shift, token_weight, eta, eta_low, shift, weight, delta,
    dk, dv, eta_out,
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
    """What is not None of dk, dv and eta, of a block of tokens, a split of the queries and a group of channels.

        dv = keep_scale sum_n keep P d_o,    dk = scale sum_n dS q,    eta = sum_n dS

    with P and dS as in cross_attention_dq_kernel.

    Grid: ``blocks * GROUPS * splits * B * H`` programs, see dense_tiles.place.

        q .. token_weight                            in   as cross_attention_fwd_kernel takes them
        eta, eta_low          [B H M]                in   as cross_attention_dq_kernel takes them
        d_o                   [B, H, N, V]           in   dtype of q; strides g_b, g_h, g_n, channels dense
        shift, weight, delta  [B H N]                in   fp32; delta as cross_attention_settle_kernel left it
        dk                    [splits, B, H, M, D]   out  dtype of q, or fp32 with several splits; dense; or None
        dv                    [splits, B, H, M, V]   out  likewise
        eta_out               [splits, B H M]        out  fp32; or None

        heads, queries, tokens     H, N, M
        blocks                     of BLOCK_M tokens
        splits, queries_per_split  how the queries are cut; whole tiles but for the last split
        log2_scale, scale          scale log2(e), and scale
        threshold, keep_scale      of dropout: p 2^32, and 1 / (1 - p)

        D, D_CHUNK, D_COUNT, D_TAIL  channels of q and k, and how they are cut for k q^T: dense_tiles.Pieces
        V, V_CHUNK, V_COUNT, V_TAIL  channels of v, and how they are cut for v d_o^T
        K_SUM, K_SUMS, K_REST        chunk, count and tail of a group of dk's channels
        V_SUM, V_SUMS, V_REST        chunk, count and tail of a group of dv's channels
        GROUPS                       of the channels of dk and of dv
        BLOCK_N, BLOCK_M             tile of weights, queries x tokens
        HOLD                         k and v stay in registers; else they are read again for every tile of queries
        EVEN                         N is a multiple of BLOCK_N: no tile needs a bound

    Tiles are ``[tokens, queries]``, so that P^T and dS^T are what the products want. Queries beyond the last have a
    weight of 0. Sums of one token take nothing from another's, so those of masked tokens may hold anything: they are
    written as zeros. Tokens beyond the last are not written.
    """
    block, group, split, head = place(tl.program_id(0), blocks, splits, GROUPS)
    b, h, m = (head // heads).to(tl.int64), (head % heads).to(tl.int64), block * BLOCK_M
    first = split * queries_per_split
    last = tl.minimum(first + queries_per_split, queries)
    k_channel, v_channel = group * (K_SUMS * K_SUM + K_REST), group * (V_SUMS * V_SUM + V_REST)

    token = m + tl.arange(0, BLOCK_M)
    inside = token < tokens
    token_row = head.to(tl.int64) * tokens + token
    seen = None
    if mask is not None:
        seen = visible(mask + b * mask_b, token, tokens, False)
    if row_hashes is not None:
        token_hash = tl.load(token_hashes + token, mask=inside, other=0)
    if token_shift is not None:
        own_shift = tl.load(token_shift + token_row, mask=inside, other=0.0)[:, None]
        own_weight = tl.load(token_weight + token_row, mask=inside, other=0.0)[:, None]
    at = tl.cast(m, tl.int64)
    k += b * k_b + h * k_h + at * k_m
    v += b * v_b + h * v_h + at * v_m
    q += b * q_b + h * q_h
    d_o += b * g_b + h * g_h

    left = tokens - m
    held_k = hold(k, k_m, left, BLOCK_M, D, D_CHUNK, D_COUNT, D_TAIL, HOLD)
    held_v = ()
    if dk is not None or eta_out is not None:
        held_v = hold(v, v_m, left, BLOCK_M, V, V_CHUNK, V_COUNT, V_TAIL, HOLD)
    if dk is not None:
        k_sums = zeros(BLOCK_M, K_SUM, K_SUMS, K_REST)
    if dv is not None:
        v_sums = zeros(BLOCK_M, V_SUM, V_SUMS, V_REST)
    eta_sum = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(first, last, BLOCK_N):
        at = tl.cast(n, tl.int64)
        q_tile, g_tile = q + at * q_n, d_o + at * g_n
        rows = n + tl.arange(0, BLOCK_N)
        row, there = head.to(tl.int64) * queries + rows, rows < queries
        s = product(  # [BLOCK_M, BLOCK_N]
            k, k_m, left, held_k, q_tile, q_n, queries - n,
            BLOCK_M, BLOCK_N, D, D_CHUNK, D_COUNT, D_TAIL, HOLD, EVEN,
        )  # fmt: skip
        row_weight = tl.load(weight + row, mask=there, other=0.0)[None, :]
        if token_shift is None:
            p = tl.math.exp2(s * log2_scale - tl.load(shift + row, mask=there, other=0.0)[None, :]) * row_weight
        else:
            if not EVEN:
                s = tl.where(there[None, :], s, float("-inf"))
            a = tl.math.exp2(s * log2_scale - own_shift) * own_weight
            p = a * row_weight
        if row_hashes is not None:
            row_hash = tl.load(row_hashes + row, mask=there, other=0)
            keep = dropout_keep(row_hash[None, :], token_hash[:, None], threshold)
        if dv is not None:
            dropped = p
            if row_hashes is not None:
                dropped = tl.where(keep, p, 0.0)
            v_sums = accumulate(
                v_sums, dropped, g_tile + v_channel, g_n, queries - n, V - v_channel,
                BLOCK_N, V_SUM, V_SUMS, V_REST, EVEN, GROUPS * V_SUMS * V_SUM <= V,
            )  # fmt: skip
        if dk is not None or eta_out is not None:
            dp = product(
                v, v_m, left, held_v, g_tile, g_n, queries - n,
                BLOCK_M, BLOCK_N, V, V_CHUNK, V_COUNT, V_TAIL, HOLD, EVEN,
            )  # fmt: skip
            if row_hashes is not None:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dp -= tl.load(delta + row, mask=there, other=0.0)[None, :]
            if token_shift is None:
                ds = p * dp
            else:
                x = row_weight * dp
                if eta is not None:
                    x -= tl.load(eta + token_row, mask=inside, other=0.0)[:, None]
                if eta_low is not None:
                    x -= tl.load(eta_low + token_row, mask=inside, other=0.0)[:, None]
                ds = a * x
            if eta_out is not None:
                eta_sum += tl.sum(ds, 1)
            if dk is not None:
                k_sums = accumulate(
                    k_sums, ds, q_tile + k_channel, q_n, queries - n, D - k_channel,
                    BLOCK_N, K_SUM, K_SUMS, K_REST, EVEN, GROUPS * K_SUMS * K_SUM <= D,
                )  # fmt: skip

    out = (split.to(tl.int64) * (tl.num_programs(0) // (blocks * GROUPS * splits)) + head) * tokens + m
    if eta_out is not None:
        if seen is not None:
            eta_sum = tl.where(seen, eta_sum, 0.0)
        tl.store(eta_out + out + tl.arange(0, BLOCK_M), eta_sum, mask=inside)
    if dk is not None:
        store(k_sums, dk + out * D + k_channel, D, left, D - k_channel, scale, seen, BLOCK_M, K_SUM, K_SUMS, K_REST)
    if dv is not None:
        store(
            v_sums, dv + out * V + v_channel, V, left, V - v_channel, keep_scale, seen, BLOCK_M, V_SUM, V_SUMS, V_REST
        )
