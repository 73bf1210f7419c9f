"""Inverted grid attention: softmax over the queries, then normalised over the tokens of a grid.

    t = column[n, j] + row[n, i] + g[n] . x,   A = 2^(r t - log2(e) token_lse)     r carries log2(e)
    T = sum_m A,   P = A / max(T, EPS)          u: t with the output's gradient in the place of the query

One kernel owns tokens and walks over the queries: for token_lse, for eta, which the softmax over the queries subtracts from
the gradients of the weights, and for the gradients of the tokens. The other owns queries and walks down the rows: for the
outputs, and for the gradients of the queries. Formulas are those of cross_attention_inverted.py; all is float32 without
tensor cores, whatever the dtype of the raw channels. What is a number a query or a token torch computes in between.

In float32 delta and eta are computed twice: the second walk finds the rounding error of the first, ``.._low``. Where one
query has all of a token's weight, the gradients of the logits are nothing but that error otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from perceiver_fast.kernels.base2 import LN_2, LOG2_E
from perceiver_fast.kernels.configs import MOST, Config
from perceiver_fast.kernels.cross_attention_inverted import LOG_EPS, LOG_TINY
from perceiver_fast.kernels.dropout import threshold_bits
from perceiver_fast.kernels.grid import FLOAT32, Grid
from perceiver_fast.kernels.grid_attention_tokens import describe_tokens
from perceiver_fast.kernels.grid_inverted_kernels import grid_inverted_queries_kernel, grid_inverted_tokens_kernel
from perceiver_fast.kernels.launch import Launch, share
from perceiver_fast.reference.dropout import dropout_scale
from perceiver_fast.reference.softmax import EPS

CONFIG = Config(queries=32, tokens=32, warps=4, registers=MOST)
WIDE = Config(queries=16, tokens=32, warps=4, registers=MOST)  # of channels that are multiplied in products
ROWS = 8  # a split is of whole groups of so many


class Call:
    """One call's tokens, described, and the walks over them; ``q`` is folded, feat, scale and mask are dense."""

    def __init__(
        self, q: Tensor, feat: Tensor, scale: Tensor, mask: Tensor | None, dropout: float, seed: Tensor | None
    ):
        self.grid = grid = Grid(*q.shape[:2], feat.shape[-1], tuple(feat.shape[1:-1]), "fma")
        self.q = grid.fold(q)
        self.config = CONFIG if grid.features <= FLOAT32 else WIDE
        of_feat = replace(grid, batch=feat.shape[0])
        mask = None if mask is None else mask.contiguous()
        bits = None if mask is None else mask.view(torch.uint8)
        tokens, launches = describe_tokens(of_feat, feat, scale, bits, seed)
        for launch in launches:
            launch.run()
        self.mask, self.padded, self.heads = mask, tokens.padded, q.shape[0] // feat.shape[0]
        self.arguments = dict(
            q=self.q, d_o=None, stats=None, planes=tokens.planes, token_shift=None, token_weight=None, eta=None,
            eta_low=None, seed=seed, token_hashes=tokens.token_hashes, B=grid.batch, N=grid.queries, rows=grid.rows,
            columns=grid.columns, padded=tokens.padded, heads=self.heads, q_batch=self.q.stride(0),
            q_row=self.q.stride(1), threshold=threshold_bits(dropout), keep_scale=dropout_scale(dropout),
            C=grid.features, K=max(16, triton.next_power_of_2(grid.features)), FEW=grid.features <= FLOAT32,
            BN=self.config.queries, BJ=self.config.tokens, DROPOUT=dropout > 0,
        )  # fmt: skip

    def normalised_by(self, token_lse: Tensor) -> None:
        """Takes the tokens' log-sum-exps ``[B, M]``, as a whole number and a factor; nothing remains of holes."""
        exact = token_lse.view(-1, self.grid.rows, self.grid.columns) * LOG2_E.value
        whole = exact.floor().float()
        factor = (whole - exact).float().exp2()
        if self.mask is not None:
            seen = self.mask.view(-1, 1, *exact.shape[1:]).expand(-1, self.heads, -1, -1).reshape(exact.shape)
            whole, factor = whole.where(seen, 0.0), factor.where(seen, 0.0)
        pad = 0, self.padded - self.grid.columns
        self.arguments |= dict(token_shift=F.pad(whole, pad), token_weight=F.pad(factor, pad))

    def walk_queries(self, **outputs: Tensor | None) -> None:
        """The walk over the queries of all tokens: token_lse, eta_out, or dfeat and dscale."""
        nothing = dict(token_lse=None, eta_out=None, dfeat=None, dscale=None)
        programs = self.grid.batch * self.grid.rows * self.padded // self.config.tokens
        weights = self.config.queries * self.config.tokens
        Launch(grid_inverted_tokens_kernel, programs, self.arguments | nothing | outputs, self.config, weights).run()

    def walk_rows(self, sums_alone: bool = False) -> tuple[Tensor | None, Tensor, Tensor]:
        """The walk down the rows of all queries: ``[B, N, C + rows + columns]`` or None, and the sums of A and of y."""
        grid, like = self.grid, self.q
        across, queries = self.padded // self.config.tokens, triton.cdiv(grid.queries, self.config.queries)
        programs = grid.batch * across * queries
        splits, each = share(grid.rows, ROWS, programs, like.device)
        sums = like.new_empty(2, splits * across, grid.batch, grid.queries)
        parts = dict(column_parts=None, row_parts=None, channel_parts=None)
        if not sums_alone:
            parts = dict(
                column_parts=like.new_empty(splits, grid.batch, grid.queries, self.padded),
                row_parts=like.new_empty(across, grid.batch, grid.rows, grid.queries),
                channel_parts=like.new_empty(splits * across, grid.batch, grid.queries, self.arguments["K"]),
            )
        given = self.arguments | parts | dict(sum_parts=sums, splits=splits, per_split=each)
        weights = self.config.queries * self.config.tokens
        Launch(grid_inverted_queries_kernel, programs * splits, given, self.config, weights).run()
        total, kept = sums.sum(1)
        if sums_alone:
            return None, total, kept
        columns, rows = parts["column_parts"].sum(0)[..., : grid.columns], parts["row_parts"].sum(0).mT
        return torch.cat([parts["channel_parts"].sum(0)[..., : grid.features], rows, columns], -1), total, kept


def forward(
    q: Tensor, feat: Tensor, scale: Tensor, mask: Tensor | None, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``grid_attention_forward``, inverted: q may have several times feat's batch, its heads.

    Returns:
        o ``[B, N, L]`` float32, lse ``[B, N]`` float64, the logarithm of T, kept ``[B, N]``, the sums of the
        weights, and token_lse ``[B, M]`` float64.
    """
    call = Call(q, feat.contiguous(), scale.contiguous(), mask, dropout, seed if dropout > 0 else None)
    token_lse = q.new_empty(q.shape[0], call.grid.rows * call.grid.columns, dtype=torch.float64)
    call.walk_queries(token_lse=token_lse)
    call.normalised_by(token_lse)
    sums, total, kept = call.walk_rows()
    total = total.double()
    factor = (dropout_scale(dropout) / total.clamp_min(EPS)).float()
    lse = total.log().clamp_min(LOG_TINY.value)
    return call.grid.unfold(sums * (factor * LN_2.value).unsqueeze(-1)), lse, kept * factor, token_lse


def backward(
    d_o: Tensor, d_lse: Tensor | None, d_kept: Tensor | None, q: Tensor, feat: Tensor, scale: Tensor, mask: Tensor | None, dropout: float,
    seed: Tensor | None, o: Tensor, lse: Tensor, kept: Tensor, token_lse: Tensor, token_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator ``grid_attention_backward``, inverted: dq, and of every element of q's batch dfeat and dscale."""
    call = Call(q, feat.contiguous(), scale.contiguous(), mask, dropout, seed if dropout > 0 else None)
    call.normalised_by(token_lse)
    owned, divided = lse > LOG_EPS.value, lse.clamp_min(LOG_EPS.value)  # else the normaliser is a constant
    delta = (d_o.double() * o).sum(-1)
    delta = delta if d_kept is None else delta + d_kept.double() * kept
    stats = torch.zeros(4, *q.shape[:2], device=q.device)
    delta = delta.where(owned, 0.0)
    if d_lse is not None:
        delta = delta - d_lse * (divided - lse).exp()
    stats[0], stats[1] = (-divided).exp(), delta
    if d_kept is not None:
        stats[3] = d_kept
    call.arguments |= dict(d_o=call.grid.fold(d_o.contiguous()), stats=stats)
    exact = feat.dtype == torch.float32
    if exact:
        _, _, error = call.walk_rows(sums_alone=True)
        stats[2] = (error if d_lse is None else error - d_lse) * stats[0] * owned
    for name in ("eta", "eta_low") if exact else ("eta",):
        found = stats.new_empty(call.arguments["token_shift"].shape)
        call.walk_queries(eta_out=found)
        call.arguments[name] = found
    sums, _, _ = call.walk_rows()
    dq = call.grid.unfold(sums * LN_2.value)
    if not token_grads:
        return dq, feat.new_empty(0), scale.new_empty(0)
    dfeat = stats.new_empty(q.shape[0], *feat.shape[1:])
    dscale = stats.new_empty(q.shape[0], *scale.shape[1:])
    call.walk_queries(dfeat=dfeat, dscale=dscale)
    return dq, dfeat.to(feat.dtype), dscale
