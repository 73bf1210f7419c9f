"""Grid attention, backward: the forward's walk, with every weight computed anew from the log-sum-exp.

    p = exp2(s - shift),  P = factor p                  shift is 0 but for extreme logits; factor = 2^(shift - lse)
    dS = P (r (d_column[n, j] + d_row[n, i] + d_g[n] . x) - delta[n])

with ``factor`` multiplied into the gradients once, not into every weight. q's gradients are sums of dS times what the
forward sums P times; those of the tokens take a kernel of their own (grid_attention_token_grads).

Over all tokens dS sums to the gradient of lse. What it sums to beyond that, the residual, comes from the rounding of
delta, and is taken out of delta and of q's gradient: where softmax is saturated, there is nothing else in them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.gpu import architecture
from perceiver_fast.kernels import grid_inverted
from perceiver_fast.kernels.base2 import LN_2, LOG2_E
from perceiver_fast.kernels.dropout import hash_rows
from perceiver_fast.kernels.grid import Grid, blocks, precision_of
from perceiver_fast.kernels.grid_attention import CHECK, check, holes, place, seen, sizes, sweep_arguments
from perceiver_fast.kernels.grid_attention_cuda import BACKWARD, Sweep, padded
from perceiver_fast.kernels.grid_attention_merge import (
    MERGED,
    grid_attention_backward_merge_kernel,
    merge_programs,
)
from perceiver_fast.kernels.grid_attention_token_grads import token_grads_launch
from perceiver_fast.kernels.grid_attention_tokens import TokenArrays, describe_tokens
from perceiver_fast.kernels.grid_sweep_fma import load_features, sweep_backward_fma
from perceiver_fast.kernels.grid_sweep_mma import load_packed, sweep_backward_mma
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.reference.dropout import dropout_scale

UNSHIFTED = tl.constexpr(60.0)  # up to this log-sum-exp, in base 2, weights are computed without a shift


@triton.jit
def grid_attention_delta_kernel(
    d_o, o, d_lse, lse, d_kept, kept, stats, rows, L, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the backward has to know of every query: ``stats``.

        lse2 = log2(e) lse,    shift = lse2 where it is extreme, else 0,    factor = 2^(shift - lse2)
        delta = d_o . o + d_kept kept - d_lse,    stats = shift, factor, factor delta, factor d_kept

    Grid: ``rows`` programs, one a query.

        d_o, o        [rows, L]  in   fp32, dense, of all axes, not folded
        lse           [rows]     in   fp64
        d_lse         [rows]     in   fp64, or None
        d_kept, kept  [rows]     in   fp32; d_kept may be None, and then kept is not read
        stats         [4, rows]  out  fp32; the last is written only with d_kept

        rows, L  B N, and entries of a query: F + sum(sizes)
        BLOCK    entries at a time
    """
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, L, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(d_o + row * L + at, mask=at < L, other=0.0).to(tl.float64)
        acc += grad * tl.load(o + row * L + at, mask=at < L, other=0.0)
    delta = tl.sum(acc, 0)
    lse2 = tl.load(lse + row) * LOG2_E
    shift = tl.where(tl.abs(lse2) <= UNSHIFTED, 0.0, lse2).to(tl.float32)
    factor = tl.exp2(shift.to(tl.float64) - lse2)
    if d_kept is not None:
        grad_kept = tl.load(d_kept + row).to(tl.float64)
        delta += grad_kept * tl.load(kept + row)
        tl.store(stats + 3 * rows + row, (factor * grad_kept).to(tl.float32))
    if d_lse is not None:
        delta -= tl.load(d_lse + row)
    tl.store(stats + row, shift)
    tl.store(stats + rows + row, factor.to(tl.float32))
    tl.store(stats + 2 * rows + row, (factor * delta).to(tl.float32))


@triton.jit(do_not_specialize=["threshold"])
def grid_attention_backward_kernel(
    q, d_o, stats, planes, scale, keys, values, seed, token_hashes, column_parts, row_parts, sum_parts,
    B, N, rows, columns, padded, q_batch, q_row, splits, per_split, threshold, keep_scale,
    F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    DROPOUT: tl.constexpr, HAS_D_KEPT: tl.constexpr, HOLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of dS over a split of the rows and a block of columns, for a block of queries, of which dq is made.

        p = 2^(s - shift),    dS = p (keep keep_scale factor (r (d_column + d_row + d_g . x) + d_kept) - factor delta)

    Grid: one program for BN queries, BJ columns, a split and a batch element, see grid_attention.place.

        q, planes, scale, keys, values, seed, token_hashes    in   as grid_attention_forward_kernel takes them
        d_o           [B, N, F + rows + columns]              in   fp32, dense, folded
        stats         [4, B N]                                in   fp32, of grid_attention_delta_kernel
        column_parts  [splits, B, N, padded]                  out  fp32: sum of dS r by column
        row_parts     [column blocks, B, rows, N]             out  fp32: sum of dS r by row
        sum_parts     [splits, column blocks, B, F + 1, N]    out  fp32: sums of dS r x, and of dS

        B .. threshold  as in grid_attention_forward_kernel
        keep_scale      of dropout: 1 / (1 - p)
        F .. PRECISION  as there
        HAS_D_KEPT      the result ``kept`` has a gradient

    Queries beyond the last read as zeros, also in ``stats``, and nothing of theirs is written.
    """
    n, block, j, split, b = place(tl.program_id(0), N, columns, splits, BN, BJ)
    live = n < N  # [BN]
    inside = live[:, None] & (j < columns)[None, :]
    row = b * N + n
    query, d_query = q + b * q_batch + n.to(tl.int64) * q_row, d_o + row * (F + rows + columns)
    stats += row
    line = b * 0 + B * N  # from one of the stats to the next, int64
    shift = tl.load(stats, mask=live, other=0.0)
    own = tl.load(stats + line, mask=live, other=0.0) * keep_scale
    delta = tl.load(stats + 2 * line, mask=live, other=0.0)
    d_kept = tl.zeros([BN], tl.float32)
    if HAS_D_KEPT:
        d_kept = tl.load(stats + 3 * line, mask=live, other=0.0) * keep_scale
    factor = own * LN_2  # ln(2) against the log2(e) that the tokens' scales carry
    table = tl.load(query[:, None] + F + rows + j[None, :], mask=inside, other=0.0)
    d_table = tl.load(d_query[:, None] + F + rows + j[None, :], mask=inside, other=0.0) * factor[:, None]
    row_hash = tl.zeros([BN], tl.uint32)
    if DROPOUT:
        row_hash = hash_rows(tl.load(seed), row)
        token_hashes += j
    rows_out = row_parts + ((block * B + b) * rows) * N + n
    step = b * 0 + N  # from row to row there, int64
    part = (split * B + b) * N + n
    sums_out = sum_parts + ((split * tl.cdiv(columns, BJ) + block) * B + b) * N * (F + 1) + n
    first, last = split * per_split, tl.minimum(rows, (split + 1) * per_split)
    if PRECISION == "fma":
        g, d_features = load_features(query, live, F), load_features(d_query, live, F)
        d_g = ()
        for f in tl.static_range(F):
            d_g = d_g + (d_features[f] * factor,)
        planes += b * rows * (F + 2) * padded + j
        column_sums, sums, residual = sweep_backward_fma(
            table, d_table, query + F, d_query + F, live, g, d_g, planes, padded, first, last, shift, factor, delta,
            d_kept, rows_out, step, row_hash, token_hashes, threshold, F, BN, BJ, DROPOUT, HOLES,
        )  # fmt: skip
        for f in tl.static_range(F):
            tl.store(sums_out + f * N, sums[f], mask=live)
    else:
        g = load_packed(query, tl.full([BN], 1.0, tl.float32), live, F, K, PRECISION, True)
        d_g = load_packed(d_query, factor, live, F, K, PRECISION, False)
        at = b * rows * padded
        scale, keys, values = scale + 2 * at + j, keys + at * K, values + at * V
        column_sums, acc, residual = sweep_backward_mma(
            table, d_table, query + F, d_query + F, live, g, d_g, scale, keys, values, padded, first, last, j, shift,
            factor, delta, d_kept, rows_out, step, row_hash, token_hashes, threshold,
            F, K, V, GROUP, BN, BJ, DROPOUT, HOLES, PRECISION,
        )  # fmt: skip
        c = tl.arange(0, V)
        tl.store(sums_out[:, None] + c[None, :] * N, acc, mask=live[:, None] & (c < F)[None, :])
    tl.store(column_parts + part[:, None] * padded + j[None, :], column_sums, mask=live[:, None])
    tl.store(sums_out + F * N, residual, mask=live)


def backward_launches(
    d_o: Tensor, d_lse: Tensor | None, d_kept: Tensor | None, q: Tensor, feat: Tensor, scale: Tensor,
    mask: Tensor | None, dropout: float, seed: Tensor | None, o: Tensor, folded_d_o: Tensor, lse: Tensor, kept: Tensor,
    token_grads: bool, arch: int, in_cuda: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Launch | Sweep]]:  # fmt: skip
    """Folded dq, what to take out of it times o ``[B, N, 1]`` where o is not folded, dfeat, dscale, and the launches that compute them.

    q is folded, and d_o is given both folded and as it comes; all are dense but q. The gradients of the tokens are
    empty without ``token_grads``. ``in_cuda``: the sweep is the CUDA library's.
    """
    grid = Grid(*q.shape[:2], feat.shape[-1], tuple(feat.shape[1:-1]), precision_of(feat.dtype, feat.shape[-1]))
    count, length = grid.batch * grid.queries, o.shape[-1]
    stats = q.new_empty(4, count)
    delta = dict(d_o=d_o, o=o, d_lse=d_lse, lse=lse, d_kept=d_kept, kept=kept, stats=stats, rows=count, L=length)
    launches: list[Launch | Sweep] = [Launch(grid_attention_delta_kernel, count, delta | dict(BLOCK=256))]
    config = BACKWARD if in_cuda else grid.config("grid_attention_backward", arch, dropout)
    cut = blocks(grid, config, q.device)
    if in_cuda:
        tokens = TokenArrays(padded(grid.columns), None)
    else:
        tokens, described = describe_tokens(grid, feat, scale, mask, seed)
        launches += described
    parts = dict(
        column_parts=q.new_empty(cut.splits, grid.batch, grid.queries, tokens.padded),
        row_parts=q.new_empty(cut.columns, grid.batch, grid.rows, grid.queries),
        sum_parts=q.new_empty(cut.partials, grid.batch, grid.features + 1, grid.queries),
    )
    common = sizes(grid, cut, tokens.padded) | parts | dict(stats=stats, F=grid.features)
    if in_cuda:
        given = q, feat, scale, mask, folded_d_o, stats, *parts.values(), cut.splits, cut.rows_per_split
        launches.append(Sweep("grid_attention_gradient_sums", given))
    else:
        sweep = common | sweep_arguments(grid, tokens, q, seed, dropout, config) | dict(HOLES=holes(grid, mask, config))
        sweep |= dict(d_o=folded_d_o, per_split=cut.rows_per_split, keep_scale=dropout_scale(dropout))
        sweep |= dict(BJ=config.tokens, HAS_D_KEPT=d_kept is not None)
        programs = cut.queries * cut.columns * cut.splits * grid.batch
        launches.append(Launch(grid_attention_backward_kernel, programs, sweep, config, config.queries * config.tokens))
    dq, correction = q.new_empty(q.shape), q.new_empty(*q.shape[:2], 1)
    merge = common | dict(d_lse=d_lse, kept=kept if dropout > 0 else None, dq=dq, correction=correction)
    merge |= MERGED | dict(
        o=o if grid.is_folded else None, column_blocks=cut.columns, PARTS=triton.next_power_of_2(cut.partials)
    )
    launches.append(Launch(grid_attention_backward_merge_kernel, merge_programs(grid), merge))
    if not token_grads:
        return dq, correction, feat.new_empty(0), scale.new_empty(0), launches
    dfeat, dscale = torch.zeros_like(feat), torch.zeros_like(scale)
    arguments = dict(q=q, d_o=folded_d_o, stats=stats, feat=feat, scale=scale, mask=mask, seed=seed)
    arguments |= dict(dfeat=dfeat, dscale=dscale)
    launches.append(token_grads_launch(grid, tokens, arguments, dropout, d_kept is not None, arch))
    return dq, correction, dfeat, dscale, launches


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
    """Kernel of the operator ``grid_attention_backward``: gradients of q, and of feat and scale if asked for.

    Args:
        d_o: ``[B, N, L]`` float32.
        d_lse: ``[B, N]`` float64, or None.
        d_kept: ``[B, N]`` float32, or None.
        q, feat, scale, mask, dropout, seed, inverted: as the forward's.
        o, lse, kept, token_lse: what the forward returned.
        token_grads: whether the gradients of feat and scale are asked for; they are empty otherwise.

    Raises:
        RuntimeError: see :func:`perceiver_fast.kernels.grid_attention.check`.
    """
    return _backward(
        d_o, d_lse, d_kept, q, feat, scale, mask, dropout, seed, inverted, o, lse, kept, token_lse, token_grads,
        in_cuda=False,
    )  # fmt: skip


def backward_in_cuda(
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
    """:func:`backward` with the CUDA library's sweep, of the calls that the op's declaration gives to it."""
    return _backward(
        d_o, d_lse, d_kept, q, feat, scale, mask, dropout, seed, inverted, o, lse, kept, token_lse, token_grads,
        in_cuda=True,
    )  # fmt: skip


def _backward(
    d_o, d_lse, d_kept, q, feat, scale, mask, dropout, seed, inverted, o, lse, kept, token_lse, token_grads, in_cuda
) -> tuple[Tensor, Tensor, Tensor]:
    check(q, feat, scale, mask, dropout, seed, inverted)
    rows = q.shape[:2]
    for name, t in (("d_o", d_o), ("o", o)):
        CHECK.tensor(name, t, torch.float32, q.shape, "[B, N, L]")
    for name, t in (("lse", lse), ("d_lse", d_lse)):
        CHECK.tensor(name, t, torch.float64, rows, "[B, N]")
    sums = dropout > 0 or inverted
    CHECK.expect(d_kept is None or sums, "no d_kept without dropout", "one")
    CHECK.tensor("kept", kept, torch.float32, rows if sums else (0,), "[B, N]" if sums else "empty")
    CHECK.tensor("d_kept", d_kept, torch.float32, rows, "[B, N]")
    of_tokens = (q.shape[0], scale.shape[1:].numel()) if inverted else (0,)
    CHECK.tensor("token_lse", token_lse, torch.float64, of_tokens, "[B, M]" if inverted else "empty")
    if q.shape[0] * q.shape[1] == 0:
        tokens = (t.new_zeros(q.shape[0], *t.shape[1:]) if token_grads else t.new_empty(0) for t in (feat, scale))
        return q.new_empty(q.shape), *tokens
    if inverted:
        return grid_inverted.backward(
            d_o, d_lse, d_kept, q, feat, scale, mask, dropout, seed, o, lse, kept, token_lse, token_grads
        )
    grid = Grid(*q.shape[:2], feat.shape[-1], tuple(feat.shape[1:-1]), "")
    q, mask, empty = seen(q, mask)
    if empty is not None:  # their weights are those of zero logits
        lse = torch.where(empty[:, None], math.log(grid.rows * grid.columns), lse)
        d_lse = None if d_lse is None else d_lse.masked_fill(empty[:, None], 0.0)
    d_o, o, lse, kept, feat, scale = (t.contiguous() for t in (d_o, o, lse, kept, feat, scale))
    d_lse, d_kept = (None if t is None else t.contiguous() for t in (d_lse, d_kept))
    dq, correction, dfeat, dscale, launches = backward_launches(
        d_o, d_lse, d_kept, grid.fold(q), feat, scale, mask, dropout, seed if dropout > 0 else None, o, grid.fold(d_o),
        lse, kept, token_grads, architecture(q.device), in_cuda,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    if not grid.is_folded:
        dq = torch.addcmul(grid.unfold(dq), correction, o, value=-1)
    if empty is not None:
        dq = dq.masked_fill(empty[:, None, None], 0.0)
    return dq, dfeat, dscale
